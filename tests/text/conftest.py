"""The folder of documents that tests of sources read."""

from pathlib import Path

import pytest

from helpers.documents import WRITERS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of each kind, in two folders, and a file that is not text."""
    below = tmp_path / "corpus" / "below"
    below.mkdir(parents=True)
    for number, (ending, writer) in enumerate(WRITERS.items()):
        writer(below / f"{number}{ending}")
    (tmp_path / "corpus" / "a.txt").write_text("a text")
    (tmp_path / "corpus" / "b.md").write_text("# b\n")
    (tmp_path / "corpus" / "c.jpg").write_bytes(b"\xff\xd8")
    return tmp_path / "corpus"
