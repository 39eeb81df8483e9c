"""What a dataset was made from, kept next to its shards, and whether that has changed since.

The record is a file of its own, not a part of the manifest: a corpus can have a million files, and
every worker reads the manifest.
"""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from pyarrow import fs as pafs

from manta import foreign, layout, storage
from manta.data.manifest import Manifest
from manta.errors import DataError, MantaError
from manta.foreign import Whole
from manta.terminal import named
from manta.text import sources
from manta.text.sources import Source

# The state of a file ({size, mtime_ns, sha256}) by its path, or of a dataset on the Hugging Face
# hub ({revision}) by its name; and such states by the config key that names them.
State = dict[str, dict[str, Any]]
States = dict[str, State]
AT_ONCE = 16
SHOWN = 3


@dataclasses.dataclass
class _File:
    size: Whole
    mtime_ns: Whole | None = None
    sha256: str | None = None

    def given(self) -> dict[str, Any]:
        digest = {} if self.sha256 is None else {"sha256": self.sha256}
        return {"size": self.size, "mtime_ns": self.mtime_ns, **digest}


@dataclasses.dataclass
class _Dataset:
    revision: str | None

    def given(self) -> dict[str, Any]:
        return {"revision": self.revision}


def states(recipe: dict[str, Any]) -> States:
    """What a recipe names, as it is now, without digests.

    Raises:
        DataError: something is missing or cannot be read.
    """
    return {key: look() for key, look in _looks(recipe)}


def _looks(recipe: dict[str, Any]) -> Iterator[tuple[str, Callable[[], State]]]:
    for key in ("source", "val_source"):
        if key in recipe:
            names = [field.name for field in dataclasses.fields(Source)]
            source = Source(**{n: recipe[key][n] for n in names if n in recipe[key]})
            yield f"data.{key}", lambda source=source: _state_of_source(source)  # type: ignore[misc]
    if recipe["decontaminate"]:
        yield "data.decontaminate", lambda: _state_of_files(recipe["decontaminate"])
    if recipe["tokenizer"].endswith(".json"):
        yield "data.tokenizer", lambda: _state_of_files([recipe["tokenizer"]])


def _state_of_source(source: Source) -> State:
    """Nothing for Python's own source code: the recipe has Python's version."""
    listed = sources.list_files(source)
    if listed is not None:
        return {file.path: _state(file.size, file.mtime_ns) for file in listed.files}
    if source.location == sources.PYTHON:
        return {}
    folder = sources.local_folder(source)
    if folder is None:
        return {source.location: {"revision": sources.revision(source)}}
    found = (item for item in storage.list_files(folder) if item.type == pafs.FileType.File)
    return {item.path: _state(item.size, item.mtime_ns) for item in found}


def _state_of_files(paths: list[str]) -> State:
    found = {path: storage.info(path) for path in paths}
    for path, item in found.items():
        if item.type == pafs.FileType.NotFound:
            raise DataError(f"{path}: no such file")
    return {path: _state(item.size, item.mtime_ns) for path, item in found.items()}


def _state(size: int, mtime_ns: int | None) -> dict[str, Any]:
    return {"size": size, "mtime_ns": mtime_ns}


# --- at preparation ------------------------------------------------------------------------------


def save(path: str, recipe: dict[str, Any], before: States) -> None:
    """Writes the record of the dataset in folder `path`, whose preparation began with `before`.

    Local files are recorded with a digest, so that a file that is only touched has not changed.

    Raises:
        DataError: something has changed since.
    """
    file = storage.join(path, layout.SOURCES)
    is_new = not storage.exists(file)  # else this preparation was stopped just before its commit
    for found in before.values() if is_new else ():
        local = [name for name in found if "size" in found[name] and storage.is_local(name)]
        for name, digest in zip(local, _digests(local), strict=True):
            found[name] = {**found[name], "sha256": digest}
    for key, now in states(recipe).items():
        if differing := list(_differences(before[key], now)):
            raise DataError(
                f"{key} changed while it was being prepared: {named(differing, SHOWN)}; run the "
                "same command again, which starts over"
            )
    if is_new:
        storage.write_json(file, before)


def _digests(files: list[str]) -> list[str]:
    def digest(file: str) -> str:
        try:
            return storage.sha256(file)
        except OSError as e:
            raise DataError(f"{file}: cannot be read ({e.strerror or e})") from None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(digest, files))


# --- afterwards ----------------------------------------------------------------------------------


def _silent(line: str) -> None:
    pass


def changes(manifest: Manifest, say: Callable[[str], None] = _silent) -> str:
    """What has changed since the dataset was prepared, for a message; empty if nothing has.

    A dataset of an earlier version has no record, and has not changed. What is gone, or cannot be
    read here, cannot be compared: a line says so.
    """
    file = storage.join(manifest.path, layout.SOURCES)
    if not storage.exists(file):
        return ""
    try:
        kind = dict[str, dict[str, _File | _Dataset]]
        read = foreign.read_json(file, kind, DataError, "delete it to have no record")
    except DataError as e:
        say(f"{manifest.path} is used without a look at what it was prepared from: {e}")
        return ""
    recorded: States = {
        key: {name: state.given() for name, state in states.items()} for key, states in read.items()
    }
    found = []
    for key, look in _looks(manifest.recipe):
        try:
            was, now = recorded.get(key, {}), look()
            differing = list(_differences(was, now))
            if any(None in state.values() for s in (was, now) for state in s.values()):
                say(f"{manifest.path}: it is not fully known whether {key} has changed")
        except (MantaError, OSError) as e:
            say(f"{manifest.path} is used without a look at what it was prepared from: {e}")
            continue
        if differing:
            found.append(f"{key}: {named(differing, SHOWN)}")
    return "; ".join(found)


def _differences(was: State, now: State) -> Iterator[str]:
    """A phrase for each file whose content has changed, or that is new or gone."""
    touched = []
    for path in sorted(was.keys() | now.keys()):
        if path not in was:
            yield f"{path} is new"
        elif path not in now:
            yield f"{path} is gone"
        elif ("revision" in was[path]) != ("revision" in now[path]):
            yield f"{path} is of another kind"
        elif "revision" in was[path]:
            old, new = was[path]["revision"], now[path]["revision"]
            if old and new and old != new:
                yield f"{path} was revision {old}, is {new}"
        elif was[path]["size"] != now[path]["size"]:
            yield f"{path} was {was[path]['size']:,} bytes, is {now[path]['size']:,}"
        elif was[path]["mtime_ns"] != now[path]["mtime_ns"]:
            touched.append(path)
    local = [path for path in touched if was[path].get("sha256")]
    same = {
        path
        for path, digest in zip(local, _digests(local), strict=True)
        if digest == was[path]["sha256"]
    }
    for path in touched:
        if path not in same:
            times = [_time(state[path]["mtime_ns"]) for state in (was, now)]
            yield f"{path} was written {times[0]}, is written {times[1]}"


def _time(mtime_ns: int | None) -> str:
    if mtime_ns is None:
        return "at an unknown time"
    return datetime.fromtimestamp(mtime_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
