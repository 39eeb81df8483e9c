"""The files of a folder that are read, and those that are passed over."""

import fnmatch
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs as pafs

from manta import foreign, storage
from manta.errors import DataError
from manta.text.files import LABELLED, READABLE, SPECIAL, kind, what_is

LINK = "link to a folder that is read already"
BROKEN = "broken link"
ANY = (*READABLE, *LABELLED)
BAD_NAME = "its name is not UTF-8"
# What keeps a file with the name of a readable one from being read, and the remedy.
REFUSED = {BAD_NAME: "rename it", **dict.fromkeys(SPECIAL.values(), "give a file")}


class File(NamedTuple):
    """A file of a corpus; `mtime_ns` is when it was last written to, as its storage says."""

    path: str
    size: int
    mtime_ns: int | None


class Listing(NamedTuple):
    """The readable files at a location, sorted by path, and the numbers of others by kind."""

    location: str
    files: tuple[File, ...]
    passed_over: Counter[str]

    def line(self) -> str:
        kinds = Counter(kind(file.path, ANY) or "other" for file in self.files)
        read = f"reading {_files(len(self.files))} of {self.location} ({_counts(kinds)})"
        passed = self.passed_over.total()
        return read + (f"; passing over {passed} ({_counts(self.passed_over)})" if passed else "")


def _files(count: int) -> str:
    return f"{count:,} file{'' if count == 1 else 's'}"


def _counts(kinds: Counter[str]) -> str:
    shown = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    more = [f"{sum(n for _, n in shown[8:]):,} of other kinds"] if shown[8:] else []
    return ", ".join([f"{count:,} {name}" for name, count in shown[:8]] + more)


def find(location: str, readable: tuple[str, ...] = READABLE) -> Listing:
    """The files at a file, folder or glob whose names have one of these endings.

    Files are hidden if their name, or that of a folder between them and the location, begins with a
    dot; a glob that spells out such a dot reads them. Each folder is visited once, however many
    links lead to it.

    Raises:
        DataError: nothing readable is there, or what is there is no file.
    """
    is_glob = any(c in location for c in "*?[")
    if is_glob:
        is_glob = _info(storage.absolute(location), location).type == pafs.FileType.NotFound
    where = location
    while is_glob and any(c in where for c in "*?["):
        where = where.rpartition("/")[0]
    if is_glob and not where:
        where = "/" if location.startswith("/") else "."
    base = storage.absolute(where)
    top = _info(base, location)
    if top.type == pafs.FileType.NotFound:
        raise DataError(f"data.source={location}: no such file or folder")
    if top.type == pafs.FileType.File:
        if kind(base, readable) is None:
            raise DataError(
                f"data.source={location}: unknown kind of file; readable are {', '.join(readable)}"
            )
        return Listing(location, (File(base, top.size, top.mtime_ns),), Counter())
    if top.type == pafs.FileType.Unknown:
        raise DataError(f"data.source={location}: {what_is(base)}; give a file or a folder")
    scheme, separator, _ = base.partition("://")
    prefix = scheme + separator if separator and not storage.is_local(base) else ""
    pattern = prefix + storage.filesystem(storage.absolute(location))[1] if is_glob else "*"
    inside = prefix + storage.filesystem(base)[1].rstrip("/")
    shows_hidden = is_glob and "/." in pattern[len(inside) :]
    found = _local(inside or "/", shows_hidden) if storage.is_local(base) else _remote(base, prefix)
    files: list[File] = []
    passed: Counter[str] = Counter()
    for file, problem in found:
        if not fnmatch.fnmatch(file.path, pattern):
            continue
        if not shows_hidden and "/." in file.path[len(inside) :]:
            passed["hidden"] += 1
        elif kind(file.path, readable) and problem in REFUSED:
            raise DataError(
                f"{visible_name(file.path)}: {problem}; {REFUSED[problem]}, or leave it out"
            )
        elif problem or kind(file.path, readable) is None:
            ending = foreign.line(visible_name(Path(file.path).suffix.lower()))
            name = ending if problem == BAD_NAME else problem or ending
            passed[(name or "without an ending").removeprefix("a ")] += 1
        else:
            files.append(file)
    if not files:
        there = f" (there are: {_counts(passed)})" if passed else ""
        raise DataError(
            f"data.source={location}: no readable file there{there}; readable are "
            f"{', '.join(readable)}"
        )
    return Listing(location, tuple(sorted(files)), passed)


def _info(path: str, location: str) -> pafs.FileInfo:
    try:
        return storage.info(path)
    except OSError as e:  # such as a name of more than 255 bytes, or a folder that is closed to us
        reason = os.strerror(e.errno) if e.errno else foreign.line(str(e))
        raise DataError(f"data.source={location}: cannot be opened ({reason})") from None


def _remote(base: str, prefix: str) -> Iterator[tuple[File, None]]:
    for item in storage.list_files(base):
        if item.type == pafs.FileType.File:
            yield File(prefix + item.path, item.size, item.mtime_ns), None


def _local(base: str, shows_hidden: bool) -> Iterator[tuple[File, str | None]]:
    """The files under a folder, each with what keeps it from being read, if anything does. A hidden
    folder that is not shown counts as one file."""
    visited: set[tuple[int, int]] = set()
    # Folders come before links to folders, so that no file is read by the name of a link to it if
    # it has another.
    folders, links = [base], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            state = Path(folder).stat()
            if (state.st_dev, state.st_ino) in visited:
                yield File(folder, 0, None), LINK
                continue
            visited.add((state.st_dev, state.st_ino))
            with os.scandir(folder) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as e:
            raise DataError(
                f"{visible_name(folder)}: cannot be listed ({e.strerror}); allow it, or leave the "
                "folder out"
            ) from None
        for entry in entries:
            path = storage.join(folder, entry.name)
            try:
                found = entry.stat()
            except OSError:
                yield File(path, 0, None), BROKEN
                continue
            if not stat.S_ISDIR(found.st_mode):
                yield File(path, found.st_size, found.st_mtime_ns), _problem(path, found.st_mode)
            elif entry.name.startswith(".") and not shows_hidden:
                yield File(path, 0, None), None
            else:
                (links if entry.is_symlink() else folders).append(path)


def visible_name(path: str) -> str:
    r"""A path in which each byte that is not UTF-8 is written as \xff."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _problem(path: str, mode: int) -> str | None:
    try:
        path.encode()
    except UnicodeEncodeError:
        return BAD_NAME
    return SPECIAL.get(stat.S_IFMT(mode))
