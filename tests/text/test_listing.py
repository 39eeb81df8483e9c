"""The files of a folder that are read, those passed over, and the line that says so."""

import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.documents import TEXTS, WRITERS, read, refusal
from manta.text import listing, sources
from manta.text.sources import Source


def line(location: Path | str) -> str:
    found = sources.list_files(Source(str(location)))
    assert found is not None
    return found.line()


@pytest.mark.parametrize("ending", WRITERS)
def test_kinds_are_known_whatever_their_case(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"ROWS{ending.upper()}"
    WRITERS[ending](file)
    assert read(file) == read(tmp_path) == TEXTS
    assert line(tmp_path) == f"reading 1 file of {tmp_path} (1 {ending})"


def test_what_is_read_and_what_is_passed_over_is_counted_by_kind(tmp_path: Path) -> None:
    for name in ("a.txt", "B.TXT", "c.md", "d.png", "e.PNG", "f", ".g.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "h.txt").write_text("h")
    (tmp_path / "i.txt").symlink_to("nothing")
    assert sorted(read(tmp_path)) == ["B.TXT", "a.txt", "c.md"]
    assert line(tmp_path) == (
        f"reading 3 files of {tmp_path} (2 .txt, 1 .md); passing over 6 (2 .png, 2 hidden, "
        "1 broken link, 1 without an ending)"
    )
    assert line(f"{tmp_path}/*.md") == f"reading 1 file of {tmp_path}/*.md (1 .md)"


def test_hidden_files_are_read_where_a_person_names_them(tmp_path: Path) -> None:
    hidden = tmp_path / ".hidden"
    hidden.mkdir()
    (hidden / "a.txt").write_text("a")
    (hidden / ".b.txt").write_text("b")
    assert read(hidden) == ["a"]
    assert read(hidden / ".b.txt") == ["b"]
    assert read(f"{tmp_path}/.hid*/a.txt") == ["a"]
    assert read(f"{hidden}/.*.txt") == ["b"]
    assert "(there are: 1 hidden)" in refusal(tmp_path)


def test_each_folder_is_visited_once(tmp_path: Path) -> None:
    below = tmp_path / "corpus" / "below"
    below.mkdir(parents=True)
    (below / "a.txt").write_text("a")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.txt").write_text("b")
    for name, target in {"0": ".", "1": "..", "2": "below", "3": "../../elsewhere"}.items():
        (below / name).symlink_to(target)
    (elsewhere / "back").symlink_to(below)
    found = listing.find(str(tmp_path / "corpus"))
    assert [file.path for file in found.files] == [f"{below}/3/b.txt", f"{below}/a.txt"]
    (below / "2").unlink()
    (below / "2").symlink_to("nothing")
    assert read(tmp_path / "corpus") == ["b", "a"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with socket.socket(socket.AF_UNIX) as opened:
        os.mkfifo(tmp_path / "pipe")
        opened.bind(str(tmp_path / "s"))
        assert read(tmp_path) == ["a"]
        assert "passing over 2 (1 pipe, 1 socket)" in line(tmp_path)
        assert refusal(tmp_path / "pipe").endswith("pipe: a pipe; give a file or a folder")
        assert refusal(tmp_path / "s").endswith("s: a socket; give a file or a folder")
    assert refusal("/dev/null") == "data.source=/dev/null: a device; give a file or a folder"
    os.mkfifo(tmp_path / "b.txt")
    assert refusal(tmp_path) == f"{tmp_path}/b.txt: a pipe; give a file, or leave it out"


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("a")
    assert refusal(tmp_path).endswith(
        r"/\xff.txt: its name is not UTF-8; rename it, or leave it out"
    )


def test_two_texts_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.table(columns, names=["text", "text"]), tmp_path / "a.parquet")
    message = refusal(tmp_path)
    assert message == f"{tmp_path}/a.parquet: 2 columns are named 'text'; rename all but one"
    pq.write_table(pa.table([*columns, *columns[:1]], ["n", "n", "text"]), tmp_path / "a.parquet")
    assert read(tmp_path) == ["a"]
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.jsonl").write_text('{"text": "a", "in": {"text": "b"}}\n{"text":1,"text":"b"}')
    assert refusal(tmp_path).startswith(f"{tmp_path}/a.jsonl, line 2: 'text' is there twice")
