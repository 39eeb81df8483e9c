"""Large files in pieces, and texts cut into documents: nothing is lost, at any sizes."""

import io
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.documents import WRITERS, parts_of, read, texts, write_parquet
from manta import storage
from manta.errors import DataError
from manta.text import files, sources
from manta.text.sources import Source, parts

few = settings(deadline=None, max_examples=25)

# --- pieces of large files -----------------------------------------------------------------------

BLANK = ["\n", "\r\n", " \t\n", "\u3000\n", " " * 300 + "\n", "\u3000" * 120 + "\n", "\x85"]
LINE = ["a\n", "é😀\r\n", "x\ufeff\n", "a line\n", "é" * 50 + "\n", "x" + " " * 300 + "\n", "end"]
PARAGRAPHS = st.lists(st.sampled_from([*BLANK, *LINE]), max_size=30).map("".join)


def plain_pieces(data: bytes, range_bytes: int) -> list[bytes]:
    """The content of a plain text's pieces, found in the simplest way."""
    starts, offset, after_blank = [0], 0, False
    for line in io.BytesIO(data):
        blank = not line.decode().strip()
        if after_blank and not blank:
            starts.append(offset)
        after_blank = blank
        offset += len(line)
    firsts = sorted({start // range_bytes: start for start in reversed(starts)}.values())
    return [data[i:j] for i, j in itertools.pairwise([*firsts, len(data)])]


@settings(few, max_examples=150)
@given(PARAGRAPHS | st.text(st.sampled_from("a \n\u3000é")), st.integers(1, 64), st.integers(1, 40))
@example("a\n\n" + "b\n" * 200 + "\nc", 16, 1)
@example("\n" * 100 + "a\n\nb", 16, 1)
@example("\u3000\u3000\u3000\n\u3000\u3000x\n", 5, 1)
@example("x\u3000\u3000\u3000\ny\n\nz", 5, 1)
@example("x" + " " * 300 + "\ny\n\nz", 302, 1)
def test_each_byte_of_a_text_is_in_the_piece_in_which_its_paragraph_begins(
    tmp_path_factory: pytest.TempPathFactory, text: str, range_bytes: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    file = folder / "a.txt"
    file.write_bytes(text.encode())
    found = parts_of(file, range_bytes, 1, cut_bytes=cut)
    assert len(found) == max(1, -(-len(text.encode()) // range_bytes))
    joined = "".join(texts(found))
    assert text.endswith(joined)
    assert not text[: len(text) - len(joined)].strip()

    by_piece = [documents for part in found if (documents := texts([part]))]
    expected = plain_pieces(text.encode(), range_bytes)
    if len(expected) > 1 and not expected[0].decode().strip():
        expected = expected[1:]
    assert len(by_piece) == len(expected)
    for number, (documents_found, data) in enumerate(zip(by_piece, expected, strict=True)):
        alone = folder / f"{number}.txt"
        alone.write_bytes(data)
        assert documents_found == texts(parts(Source(str(alone), cut_bytes=cut)))


@few
@given(st.lists(st.text(max_size=30), max_size=20), st.sampled_from(["\n", "\r\n", "\n \n\n"]))
@example(["long" * 100, "a", "é" * 100], "\n")
def test_each_line_is_in_one_piece(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], end: str
) -> None:
    file = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) + end for text in rows]
    file.write_bytes("".join(lines).encode())
    for data in (file.read_bytes(), file.read_bytes().rstrip()):
        file.write_bytes(data)
        for range_bytes, part_bytes in itertools.product((1, 16, 33), (1, 50, 10**6)):
            found = parts_of(file, range_bytes, part_bytes)
            assert texts(found) == rows
            assert part_bytes > 1 or len(found) == max(1, -(-len(data) // range_bytes))


@few
@given(st.lists(st.text(max_size=30), max_size=20), st.integers(1, 7), st.integers(1, 500))
def test_each_row_group_is_in_one_piece(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], group: int, range_bytes: int
) -> None:
    file = tmp_path_factory.mktemp("pieces") / "a.parquet"
    table = pa.table({"n": list(range(len(rows))), "text": pa.array(rows, pa.string())})
    pq.write_table(table, file, row_group_size=group)
    for part_bytes in (1, 300, 10**6):
        assert texts(parts_of(file, range_bytes, part_bytes)) == rows
    pieces = [piece for part in parts_of(file, range_bytes, 1) for piece in part.pieces]
    assert (pieces[0].start, pieces[-1].stop) == (0, files.END)
    assert all(one.stop == other.start for one, other in itertools.pairwise(pieces))
    if range_bytes == 1:
        assert len(pieces) == max(1, -(-len(rows) // group))


def test_documents_are_the_same_however_pieces_are_grouped(folder: Path) -> None:
    (folder / "long.txt").write_text("a line\n\n" * 100)
    whole = parts_of(folder, 64, 10**6, cut_bytes=20)
    assert len(whole) == 1
    for part_bytes in (1, 64, 100, 1000):
        found = parts_of(folder, 64, part_bytes, cut_bytes=20)
        assert len(found) > 1
        assert texts(found) == texts(whole)
        assert parts_of(folder, 64, part_bytes, cut_bytes=20) == found


def test_neighbouring_rows_are_read_in_one_go(folder: Path) -> None:
    (part,) = parts_of(folder / "below", 16, 10**6)
    assert len(part.pieces) == len(WRITERS)
    (folder / "a.txt").write_text("a line\n\n" * 4)
    (part,) = parts_of(folder / "a.txt", 16, 10**6, cut_bytes=1)
    assert [piece[1:] for piece in part.pieces] == [(0, 16), (16, files.END)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_is_one_piece(name: str, tmp_path: Path) -> None:
    WRITERS[name[1:]](tmp_path / name)
    (part,) = parts_of(tmp_path, 1, 1)
    assert part.pieces == (files.Piece(str(tmp_path / name)),)


def test_a_text_that_is_not_cut_is_one_piece(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n\n" * 100)
    assert len(parts_of(tmp_path, 16, 1)) == 1


def test_pieces_are_read_from_any_storage() -> None:
    lines = [{"text": f"line {i}"} for i in range(20)]
    base = "memory://pieces"
    storage.write_bytes(f"{base}/a.jsonl", b"\n".join(json.dumps(x).encode() for x in lines))
    storage.write_bytes(f"{base}/a.txt", b"a line\n\n" * 20)
    storage.write_bytes(f"{base}/b.parquet", b"")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(lines), sink, row_group_size=3)
    storage.write_bytes(f"{base}/b.parquet", sink.getvalue().to_pybytes())
    rows = [row["text"] for row in lines]
    assert texts(parts_of(base, 64, 1, cut_bytes=1)) == [*rows, *["a line\n\n"] * 20, *rows]


def test_parts_of_a_large_corpus_are_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MOST_PART_BYTES", 256)
    line = json.dumps({"text": "x" * 4}) + "\n"  # 17 bytes
    for count, most in [(5, 32), (15, 48), (60, 240), (200, 256)]:
        (tmp_path / "a.jsonl").write_text(line * count)
        found = parts_of(tmp_path, 16, 32, many=4)
        sizes = {piece.stop - piece.start for part in found[:-1] for piece in part.pieces}
        assert sizes == {most}
        assert texts(found) == ["xxxx"] * count


def test_damage_in_a_large_parquet_file_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-12])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        parts_of(tmp_path, 16, 1)


@few
@given(st.integers(0, 300), st.integers(1, 64), st.sampled_from(["a.txt", "a.jsonl"]))
def test_what_is_wrong_in_a_piece_is_named_with_its_place_in_the_file(
    tmp_path_factory: pytest.TempPathFactory, at: int, range_bytes: int, name: str
) -> None:
    line = json.dumps({"text": "some text"}).encode() + b"\n\n"
    data = bytearray(line * 15)  # 24 bytes each
    file = tmp_path_factory.mktemp("wrong") / name
    data[at] = 255
    file.write_bytes(data)
    found = parts_of(file, range_bytes, 1, cut_bytes=1)
    with pytest.raises(DataError, match=rf"not UTF-8 at byte {at} \(0xff\)"):
        texts(found)
    if name == "a.txt":
        replaced = parts_of(file, range_bytes, 1, cut_bytes=1, errors="replace")
        assert "".join(texts(replaced)) == data.decode(errors="replace")
    if name == "a.jsonl":
        number = at // len(line)
        data[number * len(line) : (number + 1) * len(line)] = b"{".ljust(len(line) - 1) + b"\n"
        file.write_bytes(data)
        with pytest.raises(DataError, match=rf"a\.jsonl, line {2 * number + 1}: not valid JSON"):
            texts(parts_of(file, range_bytes, 1))


@few
@given(st.integers(0, 19), st.integers(1, 7))
def test_a_row_without_text_in_a_later_row_group_is_named(
    tmp_path_factory: pytest.TempPathFactory, at: int, group: int
) -> None:
    file = tmp_path_factory.mktemp("wrong") / "a.parquet"
    rows = [None if i == at else "fine" for i in range(20)]
    pq.write_table(pa.table({"text": rows}), file, row_group_size=group)
    with pytest.raises(DataError, match=rf"a\.parquet, row {at + 1}: 'text' is null"):
        texts(parts_of(file, 1, 1))


# --- cutting -------------------------------------------------------------------------------------

LINES = st.lists(
    st.sampled_from(["\n", " \t\n", "\r\n", "a\n", "é😀\n", "a longer line of text\n", "no end"]),
    max_size=30,
).map("".join)
# Many control characters are taken for UTF-16 without its mark.
NO_CONTROLS = st.characters(codec="utf-8", exclude_categories=["Cc"]) | st.sampled_from("\n\r\t")


@few
@given(LINES | st.text(NO_CONTROLS), st.integers(0, 40))
@example("a\n\n\n\nb\n\n\n", 1)
def test_cutting_loses_no_character(
    tmp_path_factory: pytest.TempPathFactory, text: str, cut: int
) -> None:
    file = tmp_path_factory.mktemp("cut") / "a.txt"
    file.write_bytes(text.encode())
    found = read(file, cut_bytes=cut)
    assert "".join(found) == (text if text.strip() else "")


@few
@given(LINES, st.integers(1, 40))
def test_documents_are_cut_at_blank_lines_and_not_too_short(
    tmp_path_factory: pytest.TempPathFactory, text: str, cut: int
) -> None:
    file = tmp_path_factory.mktemp("cut") / "a.txt"
    file.write_bytes(f"start\n{text}".encode())
    found = read(file, cut_bytes=cut)
    for document in found[:-1]:
        assert len(document.encode()) >= cut
        assert not document.splitlines()[-1].strip()


def test_without_cutting_a_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n\n" * 1000)
    assert read(tmp_path) == ["a\n\n" * 1000]
    assert len(read(tmp_path, cut_bytes=100)) > 20
