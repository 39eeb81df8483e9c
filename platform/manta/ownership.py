"""What Manta may write over or delete: only files that it made itself, and never through a link.

A folder in the home has files of known names (`clear` deletes those, and nothing else). What a
person asked for at a place of their own (`out=`) has a list of its files next to it, with their
sha256, and is replaced only while it still is what the list says.
"""

import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from manta import storage
from manta.errors import ConfigError, DataError

LIST = "manta-files.json"
MOST_NAME_BYTES = 200  # of the 255 that file systems allow, as Manta adds prefixes and endings


def is_link(path: str) -> bool:
    """Whether a path on this machine is a symbolic link, to whatever or nothing."""
    return storage.is_local(path) and Path(storage.filesystem(path)[1]).is_symlink()


def refuse_links(folder: str, names: Iterable[str]) -> None:
    """Raises DataError if one of these files or folders in a folder is a symbolic link: what Manta
    writes there would end up elsewhere."""
    for name in names:
        if is_link(path := storage.join(folder, name)):
            raise DataError(
                f"{path} is a symbolic link, and Manta neither writes nor deletes through one; put "
                f"the real file or folder there (the whole of {folder} may be a link)"
            )


def paths_in(folder: str) -> Iterator[str]:
    """The files and links under a folder, relative to it; a link's own content is left out."""
    inside = storage.filesystem(folder)[1]
    if not storage.is_local(folder):
        for item in storage.list_files(folder):
            if item.is_file:
                yield item.path[len(inside) :].lstrip("/")
        return
    for top, folders, files in os.walk(inside):
        for name in [*files, *(f for f in folders if Path(top, f).is_symlink())]:
            yield str(Path(top, name).relative_to(inside))


def is_inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or something under it, wherever links lead."""
    if storage.is_local(path) and storage.is_local(folder):
        real, top = (Path(storage.filesystem(p)[1]).resolve() for p in (path, folder))
        return real.is_relative_to(top)
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def clear(folder: str, own: re.Pattern[str]) -> None:
    """Deletes the files under a folder whose relative path matches `own`, then the folders that are
    left empty. All else stays, and so does what is behind a link."""
    inside = Path(storage.filesystem(folder)[1])
    found = {path: bool(own.fullmatch(path)) for path in paths_in(folder)}
    if not storage.is_local(folder):
        if all(found.values()):
            storage.delete_folder(folder)
        else:
            for path in (path for path, is_own in found.items() if is_own):
                storage.delete_file(storage.join(folder, path))
        return
    for path, is_own in found.items():
        if is_own and not (inside / path).is_symlink():
            (inside / path).unlink(missing_ok=True)
    for top, _, _ in os.walk(inside, topdown=False):
        with suppress(OSError):  # not empty, or a link to a folder
            Path(top).rmdir()


@contextmanager
def scratch(folder: str, name: str) -> Iterator[str]:
    """A new folder in `folder` for the block, under a name that nothing else has; it is deleted
    afterwards."""
    path = storage.join(folder, f"{name}-{uuid.uuid4().hex[:8]}")
    try:
        yield path
    finally:
        storage.delete_folder(path)


def remove_scratch(folder: str, name: str) -> None:
    """Deletes what is left of `scratch` with this folder and name where a process was killed. Only
    for those who hold a lock that every process with such a folder holds."""
    for item in storage.list_files(folder, recursive=False):
        if re.fullmatch(f"{re.escape(name)}-[0-9a-f]{{8}}", item.base_name):
            path = storage.join(folder, item.base_name)
            if not item.is_file and not is_link(path):
                storage.delete_folder(path)


def new_file(given: str | None, default: str, overwrite: bool, is_folder: bool = False) -> Path:
    """The place for the new file or folder `out`, which has to be on this machine. `default` is in
    the home, where a file of that name is Manta's.

    Raises:
        ConfigError: something is there that may not be replaced, nothing can be made there, or it
            is not on this machine.
    """
    path = storage.absolute(given or default)
    if not storage.is_local(path):
        raise ConfigError(f"out={path}: output is written on this machine; give a local path")
    out = Path(storage.filesystem(path)[1])
    if len(os.fsencode(out.name)) > MOST_NAME_BYTES:
        raise ConfigError(f"out={out}: its name is longer than {MOST_NAME_BYTES} bytes: shorten it")
    if out.is_symlink():
        raise ConfigError(
            f"out={out}: it is a symbolic link, and nothing is written through one; give the path "
            "that it leads to, or another out="
        )
    if out.exists():
        if not overwrite:
            raise ConfigError(f"out={out}: it already exists; give overwrite=true, or another out=")
        why = _why_it_stays(out, is_folder, is_ours=given is None and not is_folder)
        if why is not None:
            raise ConfigError(
                f"out={out}: {why}, and overwrite=true replaces only what Manta wrote there; move "
                "it away, or give another out="
            )
    if given is None:
        out.parent.mkdir(parents=True, exist_ok=True)
    if not out.parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.parent}; make it first")
    return out


def _why_it_stays(out: Path, is_folder: bool, is_ours: bool) -> str | None:
    """Why what is at `out` may not be replaced, or None if it may."""
    if out.is_dir() != is_folder:
        return f"it is a {'folder' if out.is_dir() else 'file'}"
    if is_ours:
        return None
    if not _list_of(out, is_folder).is_file():
        return f"no earlier {LIST} says that Manta wrote it"
    listed = _read_list(_list_of(out, is_folder))
    there = set(paths_in(str(out))) - {LIST} if is_folder else {out.name}
    folder = out if is_folder else out.parent
    for name in sorted(there):
        if name not in listed:
            return f"{name} is not on its {LIST}"
        if (folder / name).is_symlink() or storage.sha256(str(folder / name)) != listed[name]:
            return f"{name} has been changed since Manta wrote it"
    return None


def record(out: Path) -> Path:
    """Writes the list of what was just made at `out`, so that it may be replaced later; returns its
    path."""
    is_folder = out.is_dir()
    names = sorted(paths_in(str(out))) if is_folder else [out.name]
    folder = out if is_folder else out.parent
    content = {name: storage.sha256(str(folder / name)) for name in names}
    file = _list_of(out, is_folder)
    storage.write_json(str(file), content)
    return file


def _list_of(out: Path, is_folder: bool) -> Path:
    return out / LIST if is_folder else out.with_name(f".{out.name}.{LIST}")


def _read_list(file: Path) -> dict[str, object]:
    content = storage.read_json(str(file))
    return content if isinstance(content, dict) else {}
