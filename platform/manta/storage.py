"""Files at a local path or an object store's URI, through pyarrow's filesystems.

Every path is an absolute string: "/home/me/manta/runs/a" or "s3://bucket/manta/runs/a".
A folder of results is *committed* by its manifest, which is written last and atomically.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from manta.config import config
from manta.errors import ConfigError, DataError
from manta.security import SECRET_IN_ADDRESS, has_secret
from manta.terminal import line

CHUNK_BYTES = 1 << 20
# How much of an upload may wait in memory to be sent: pyarrow accepts all that it is given, and
# sends it in parts of 10 MiB, eight at a time.
UPLOAD_BYTES = 160 << 20
UNFINISHED = ".tmp"
UNFINISHED_ENDING = r"\.[0-9a-f]{8}\.tmp"  # what `_beside` appends to a name
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux
OBJECT_STORES = ("s3", "gs", "gcs", "abfs")


@config
class HomeConfig:
    """The key that all jobs have that read or write data and runs."""

    home: str | None = None
    """Folder or URI (s3://...) for data and runs; null: $MANTA_HOME, or ~/manta."""

    @property
    def home_folder(self) -> str:
        """The folder for everything that Manta makes."""
        if has_secret(os.environ.get("MANTA_HOME", "")):
            raise ConfigError(f"MANTA_HOME: {SECRET_IN_ADDRESS}")
        return absolute(self.home or os.environ.get("MANTA_HOME") or "~/manta")


def absolute(path: str) -> str:
    """The whole of a path, or an address as it is, without a slash at its end.

    Raises:
        ConfigError: no file can have this path.
    """
    _check_characters(path)
    if "://" in path:
        return path.rstrip("/")
    try:
        found = str(Path(path).expanduser().absolute())
    except RuntimeError:  # ~name, where nobody has this name
        raise ConfigError(f"{line(path)}: nobody has this name here; give the folder") from None
    _check_characters(found)
    longest, size = max(map(len, found.encode().split(b"/"))), len(found.encode())
    if longest > LONGEST_NAME or size > LONGEST_PATH:
        why = f"has a name of {longest} bytes" if longest > LONGEST_NAME else f"has {size} bytes"
        raise ConfigError(
            f"{line(path)}: this path {why}, and file systems take names of up to {LONGEST_NAME} "
            f"and paths of up to {LONGEST_PATH}: check it"
        )
    return found


def _check_characters(path: str) -> None:
    """Raises ConfigError for a path that is not UTF-8, which pyarrow cannot open, or has a NUL."""
    name = path.encode(errors="backslashreplace").decode().replace("\0", r"\x00")
    if name != path:
        raise ConfigError(
            f"{line(name)}: this path is not UTF-8, or has a NUL character; rename the file"
        )


def is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


def join(path: str, *parts: str) -> str:
    return "/".join([path.rstrip("/"), *parts])


def filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path, and the path inside it.

    Raises:
        ConfigError: the storage cannot be opened, or pyarrow and fsspec do not know its scheme; the
            path is not UTF-8, which pyarrow cannot open, or has a NUL character.
    """
    _check_characters(path)
    if "://" not in path:
        return _local(), absolute(path)
    scheme, _, rest = path.partition("://")
    try:
        return _remote(scheme, rest.partition("/")[0]), _inside(path)
    except (pa.ArrowInvalid, ValueError, ImportError, OSError) as e:
        raise ConfigError(f"{path}: this storage cannot be opened: {e}") from None


def _inside(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    return rest if scheme != "file" else "/" + rest.lstrip("/")


@functools.cache
def _local() -> pafs.FileSystem:
    return pafs.LocalFileSystem()


@functools.cache
def _remote(scheme: str, bucket: str) -> pafs.FileSystem:
    """One connection per bucket: opening one asks the network for its region and credentials."""
    if scheme in (*OBJECT_STORES, "file", "hdfs"):
        return pafs.FileSystem.from_uri(f"{scheme}://{bucket}/")[0]
    import fsspec

    return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))


def info(path: str) -> pafs.FileInfo:
    fs, inside = filesystem(path)
    return fs.get_file_info(inside)


def exists(path: str) -> bool:
    return info(path).type != pafs.FileType.NotFound


def list_files(path: str, recursive: bool = True) -> list[pafs.FileInfo]:
    """The files and folders under a folder, sorted by path; empty if the folder does not exist."""
    fs, inside = filesystem(path)
    selector = pafs.FileSelector(inside, allow_not_found=True, recursive=recursive)
    return sorted(fs.get_file_info(selector), key=lambda item: item.path)


def is_empty(path: str) -> bool:
    """Whether nothing is at a path, or an empty folder."""
    return not exists(path) or (info(path).type == pafs.FileType.Directory and not list_files(path))


def read_bytes(path: str) -> bytes:
    """Returns a file's content. Raises DataError if the file is missing."""
    fs, inside = filesystem(path)
    try:
        with fs.open_input_stream(inside, compression=None) as f:
            return f.read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file atomically: a reader sees all of it or nothing."""
    fs, inside = filesystem(path)
    if is_local(path):
        Path(inside).parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(inside)
        Path(beside).write_bytes(data)
        _take_name(beside, inside)
    else:  # an object store shows an object only once it is complete
        _make_parent(path)
        with fs.open_output_stream(inside, compression=None) as f:
            f.write(data)


@contextlib.contextmanager
def writing(path: str, remedy: str) -> Iterator[None]:
    """A context in which what is to be at `path` is written. Raises DataError, one line with the
    system's reason and the `remedy`, if the disk is full or takes no files."""
    try:
        yield
    except OSError as e:
        why = line(e.strerror or str(e))
        raise DataError(f"{path}: cannot be written ({why}); {remedy}") from None


def _beside(inside: str) -> str:
    return f"{inside}.{uuid.uuid4().hex[:8]}{UNFINISHED}"


def _take_name(beside: str, inside: str) -> None:
    """Syncs a file to disk, then renames it: after a power cut, all of it is there or nothing."""
    sync(Path(beside))
    Path(beside).replace(inside)


def sync(file: Path) -> None:
    """Waits until a local file's content is on the disk."""
    with file.open("rb") as f:
        if hasattr(fcntl, "F_FULLFSYNC"):  # a Mac's fsync may leave it in the drive's own memory
            try:
                fcntl.fcntl(f.fileno(), fcntl.F_FULLFSYNC)
                return
            except OSError:
                pass  # not every volume can do that
        os.fsync(f.fileno())


def remove_unfinished(path: str) -> None:
    """Deletes the unfinished files that dead writers left under a folder."""
    if is_local(path):  # elsewhere, files are written under their final name
        for file in Path(filesystem(path)[1]).rglob(f"*{UNFINISHED}"):
            if re.search(f"{UNFINISHED_ENDING}$", file.name) and not file.is_symlink():
                file.unlink(missing_ok=True)


def read_json(path: str) -> Any:
    """Reads a JSON file. Raises DataError if the file is missing or is not JSON."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not valid JSON ({e}); restore or recreate the file") from None


def write_json(path: str, value: Any) -> None:
    write_bytes(path, encode_json(value))


def encode_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def make_folder(path: str) -> None:
    fs, inside = filesystem(path)
    fs.create_dir(inside, recursive=True)


def _make_parent(path: str) -> None:
    """Makes the folder of a file, except in object stores, which have no folders."""
    if path.partition("://")[0] not in OBJECT_STORES:
        make_folder(path.rpartition("/")[0])


def delete_file(path: str) -> None:
    fs, inside = filesystem(path)
    fs.delete_file(inside)


def delete_folder(path: str) -> None:
    fs, inside = filesystem(path)
    if exists(path):
        fs.delete_dir(inside)


def move_folder(path: str, to: str) -> None:
    """Renames a folder; an object store cannot do that, so there the files move one by one."""
    fs, inside = filesystem(path)
    _, there = filesystem(to)
    if is_local(path):
        Path(inside).rename(there)
        return
    for item in list_files(path):
        if item.type == pafs.FileType.File:
            target = there + item.path[len(inside) :]
            _make_parent(join(to, item.path[len(inside) + 1 :]))
            fs.copy_file(item.path, target)
    fs.delete_dir(inside)


def set_aside(path: str, why: str) -> str:
    """Renames a file, so that nothing reads it again: `why` and the time are added to its name.
    Returns its new path."""
    folder, _, name = path.rpartition("/")
    aside = join(folder, f"{why}{name}-{time.time_ns()}")
    fs, inside = filesystem(path)
    fs.move(inside, filesystem(aside)[1])
    return aside


def upload(local: str | Path, path: str) -> None:
    """Copies a local file to `path`, where it appears atomically."""
    fs, inside = filesystem(path)
    if is_local(path):
        Path(inside).parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(inside)
        shutil.copyfile(local, beside)
        _take_name(beside, inside)
        return
    _make_parent(path)
    waiting = 0
    with Path(local).open("rb") as source, fs.open_output_stream(inside, compression=None) as sink:
        while chunk := source.read(CHUNK_BYTES):
            sink.write(chunk)
            waiting += len(chunk)
            if waiting >= UPLOAD_BYTES:
                sink.flush()  # waits until everything is sent
                waiting = 0


def download(path: str, local: str | Path) -> None:
    fs, inside = filesystem(path)
    Path(local).parent.mkdir(parents=True, exist_ok=True)
    with fs.open_input_stream(inside, compression=None) as source, Path(local).open("wb") as sink:
        while chunk := source.read(CHUNK_BYTES):
            sink.write(chunk)


def sha256(path: str) -> str:
    fs, inside = filesystem(path)
    digest = hashlib.sha256()
    with fs.open_input_stream(inside, compression=None) as f:
        while chunk := f.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_file(path: str, size: int, digest: str | None, error: type[Exception]) -> None:
    """Raises `error`, naming the file, unless it has this size (and sha256, if one is given)."""
    found = info(path)
    if found.type != pafs.FileType.File:
        raise error(f"{path}: the file is missing")
    if found.size != size:
        raise error(f"{path}: {found.size} bytes, but its manifest says {size}: it is truncated")
    try:
        is_whole = digest is None or sha256(path) == digest
    except OSError as e:
        raise error(f"{path}: cannot be read ({e})") from None
    if not is_whole:
        raise error(f"{path}: its sha256 differs from its manifest's: the file is damaged")


class HashingWriter(io.RawIOBase):
    """A file being written, with its size and sha256; `commit` gives it its name, atomically.
    The part that is written after `start_part` has its own sha256, `part_digest`."""

    def __init__(self, path: str):
        super().__init__()
        _make_parent(path)
        self._fs, self._inside = filesystem(path)
        self._beside = _beside(self._inside) if is_local(path) else self._inside
        self._stream = self._fs.open_output_stream(self._beside, compression=None)
        self._digest = hashlib.sha256()
        self._part = hashlib.sha256()
        self._is_whole = False
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._digest.update(view)
        self._part.update(view)
        self._stream.write(view)
        self.size += view.nbytes
        return view.nbytes

    def start_part(self) -> None:
        self._part = hashlib.sha256()

    def part_digest(self) -> bytes:
        return self._part.digest()

    def close(self) -> None:  # Python also calls this, for a writer that an error left behind
        if not self.closed:
            self._stream.close()
            if not self._is_whole and self._beside == self._inside:
                self._fs.delete_file(self._inside)  # closing gave an object its name
        super().close()

    def commit(self) -> None:
        self._is_whole = True
        self.close()
        if self._beside != self._inside:
            _take_name(self._beside, self._inside)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
