"""Preparing on a full disk, or with a limit on file size: one line, and the next run continues."""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.preparing import config_of, content, silent
from manta import layout
from manta.data import passes, prepare
from manta.data.manifest import Manifest
from manta.errors import DataError


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limits the size to which the kernel lets a file of this process grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_be_written_is_one_line_and_the_next_run_goes_on(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    expected, c = content(dataset.path), config_of(source)
    folder = Path(c.folder(str(tmp_path)))
    largest = max(map(len, expected.values()))
    refused = 0
    # Limits from one that stops the very first file to one that stops only the last.
    for size in [10, 500, *range(1000, largest, 1500)]:
        with largest_file(size):
            try:
                prepare.prepare(c, str(tmp_path), silent)
                break
            except DataError as e:
                refused += 1
                check_cannot_be_written(e, str(folder), "File too large")
        assert not (folder / layout.MANIFEST).exists()
    assert refused > 5
    prepare.prepare(c, str(tmp_path), silent)
    assert content(folder) == expected


def check_cannot_be_written(error: DataError, folder: str, reason: str) -> None:
    """Checks for one line with the folder, the kernel's reason, and what to do."""
    assert str(error).startswith(f"{folder}: cannot be written (")
    assert reason in str(error)
    assert str(error).endswith(f"; {passes.RESUME}") and "\n" not in str(error)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A filesystem in memory; calling the fixture sets its size in bytes."""
    where = tmp_path / "disk"
    where.mkdir()

    def resize(size: int, first: bool = False) -> Path:
        options = f"size={size}" if first else f"remount,size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if first and done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return where

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    resize(4096, first=True)
    yield resize
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    dataset: Manifest,
    source: Path,
    small_disk: Callable[[int], Path],
    here: pytest.MonkeyPatch,
) -> None:
    """The disk grows a little at a time, so it is full at every kind of file in turn."""
    c, page = config_of(source), resource.getpagesize()
    home = small_disk(page)
    (home / "filler").write_bytes(bytes(page))
    refused = 0
    for pages in range(1, 400, 5):
        small_disk(pages * page)
        try:
            prepare.prepare(c, str(home), silent)
            break
        except DataError as e:
            refused += 1
            check_cannot_be_written(e, c.folder(str(home)), "No space left on device")
        assert not (Path(c.folder(str(home))) / layout.MANIFEST).exists()
    assert refused > 10
    assert content(c.folder(str(home))) == content(dataset.path)
