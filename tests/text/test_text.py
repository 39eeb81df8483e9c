"""Sources and tokenizers, on files made here; r50k_base itself where a person has its file."""

import base64
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
import string
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from manta import layout, storage
from manta.errors import ConfigError, DataError
from manta.text import files, sources, tokenizer
from manta.text.sources import Part, Source, all_documents, documents, parts
from manta.text.tokenizer import Tokenizer

few = settings(deadline=None, max_examples=25)

TEXTS = ["first text", "second\n\né 😀\u2028\0 text\n", " third "]
HOSTILE = (
    "<|endoftext|> ﷺ 👩‍👩‍👧 e\u0301 \0\x7f\t\r\n \u00a0\u2003\u3000 \ufffd\U0010ffff it's 1234"
)


def read(location: Path | str, **options: object) -> list[str]:
    """A source's documents, in order."""
    source = Source(str(location), **options)  # type: ignore[arg-type]
    return [text for part in parts(source) for text in documents(part)]


def refusal(location: Path | str, **options: object) -> str:
    """What reading a source is refused with."""
    with pytest.raises(DataError) as caught:
        read(location, **options)
    return str(caught.value)


def jsonl(texts: Iterable[str], key: str = "text") -> bytes:
    """Spelt both ways: with \\u escapes, and as it is; an empty line between."""
    lines = [json.dumps({"n": i, key: t}, ensure_ascii=bool(i % 2)) for i, t in enumerate(texts)]
    return "\n\n".join(lines).encode()


def write_plain(file: Path) -> None:
    file.write_bytes(jsonl(TEXTS))


def write_gzip(file: Path) -> None:
    file.write_bytes(gzip.compress(jsonl(TEXTS)))


def write_zstd(file: Path) -> None:
    file.write_bytes(pa.Codec("zstd").compress(jsonl(TEXTS), asbytes=True))


def write_parquet(file: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), file, row_group_size=2)


WRITERS: dict[str, Callable[[Path], None]] = {
    ".jsonl": write_plain,
    ".ndjson": write_plain,
    ".jsonl.gz": write_gzip,
    ".json.gz": write_gzip,
    ".jsonl.zst": write_zstd,
    ".parquet": write_parquet,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of each kind, in two folders, and a file that is no text."""
    below = tmp_path / "corpus" / "below"
    below.mkdir(parents=True)
    for number, (ending, writer) in enumerate(WRITERS.items()):
        writer(below / f"{number}{ending}")
    (tmp_path / "corpus" / "a.txt").write_text("a text")
    (tmp_path / "corpus" / "b.md").write_text("# b\n")
    (tmp_path / "corpus" / "c.jpg").write_bytes(b"\xff\xd8")
    return tmp_path / "corpus"


# --- where documents come from -------------------------------------------------------------------


@pytest.mark.parametrize("ending", WRITERS)
def test_each_row_of_a_file_is_a_document(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    WRITERS[ending](file)
    assert read(file) == TEXTS


@pytest.mark.parametrize("ending", files.TEXT)
def test_a_plain_text_file_is_a_document_to_the_byte(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"plain{ending}"
    file.write_bytes("\ufeff \r\n\n\rx\u2028é\n\n".encode())
    assert read(file) == ["\ufeff \r\n\n\rx\u2028é\n\n"]


def test_a_folder_is_read_whole_in_order_of_path(folder: Path) -> None:
    everything = ["a text", "# b\n", *TEXTS * len(WRITERS)]
    assert read(folder) == everything
    assert read(f"{folder}/") == everything


def test_a_glob_is_the_files_that_match(folder: Path) -> None:
    assert read(f"{folder}/*.txt") == ["a text"]
    assert read(f"{folder}/below/[01].*") == TEXTS * 2
    assert read(f"{folder}/be*/*.parquet") == TEXTS


def test_a_file_uri_is_the_path_in_it(folder: Path) -> None:
    assert read(f"file://{folder}") == read(folder)
    assert read(f"file://{folder}/a.txt") == ["a text"]


def test_a_file_uri_can_be_a_glob(folder: Path) -> None:
    assert read(f"file://{folder}/*.txt") == ["a text"]


@pytest.mark.parametrize("name", ["with space.txt", "a#b.txt", "100%25.txt", "é.txt", "a[1].txt"])
def test_a_file_may_have_an_odd_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("odd")
    assert read(tmp_path / name) == ["odd"]


def test_the_standard_library_of_this_python_is_a_corpus() -> None:
    found = parts(Source(sources.PYTHON))
    names = [Path(piece.path) for part in found for piece in part.pieces]
    assert Path(json.__file__) in names
    assert not [name for name in names if sources.NOT_CORPUS & set(name.parts)]
    assert all(isinstance(text, str) and text.strip() for text in documents(found[0]))
    assert sources.identity(Source(sources.PYTHON))["python"] == sys.version.split()[0]


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_a_local_folder_can_be_a_hugging_face_dataset(ending: str, tmp_path: Path) -> None:
    for i in range(3):
        WRITERS[ending](tmp_path / f"train-{i}{ending}")
    assert read(f"hf:{tmp_path}") == TEXTS * 3
    assert len(parts(Source(f"hf:{tmp_path}"))) == 3
    message = refusal(f"hf:{tmp_path}", text_key="body")
    assert f"hf:{tmp_path}" in message
    assert "data.text_key" in message
    assert "data.split" in refusal(f"hf:{tmp_path}", split="nope")


def test_damage_in_a_hugging_face_dataset_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"te')
    assert f"hf:{tmp_path}" in refusal(f"hf:{tmp_path}")


# --- parts ---------------------------------------------------------------------------------------


def test_parts_depend_on_the_source_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i:02}.txt" for i in range(12)]
    for name in random.Random(0).sample(names, len(names)):  # not in order of name
        (tmp_path / name).write_text(name * (sources.PART_BYTES // 25))
    found = parts(Source(str(tmp_path)))
    assert [Path(piece.path).name for part in found for piece in part.pieces] == names
    sizes = [sum(Path(piece.path).stat().st_size for piece in part.pieces) for part in found]
    assert len(sizes) > 1
    assert max(sizes) <= sources.PART_BYTES

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_NUM_CPUS", "7")
    assert parts(Source(str(tmp_path))) == found
    assert pickle.loads(pickle.dumps(found)) == found
    copy = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy")
    copied = parts(Source(str(copy)))
    assert [len(part.pieces) for part in copied] == [len(part.pieces) for part in found]


def test_a_part_reads_the_same_twice(folder: Path) -> None:
    (part,) = parts(Source(str(folder)))
    assert list(documents(part)) == list(documents(part))


# --- pieces of large files -----------------------------------------------------------------------

BLANK = ["\n", "\r\n", " \t\n", "\u3000\n", " " * 300 + "\n", "\u3000" * 120 + "\n", "\x85"]
LINE = ["a\n", "é😀\r\n", "\ufeff\n", "a line\n", "é" * 50 + "\n", "x" + " " * 300 + "\n", "end"]
PARAGRAPHS = st.lists(st.sampled_from([*BLANK, *LINE]), max_size=30).map("".join)


def parts_of(
    location: Path | str, range_bytes: int, part_bytes: int, many: int = 10**9, **options: object
) -> list[Part]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "RANGE_BYTES", range_bytes)
        patch.setattr(sources, "PART_BYTES", part_bytes)
        patch.setattr(sources, "MANY_PARTS", many)
        return parts(Source(str(location), **options))  # type: ignore[arg-type]


def texts(found: Iterable[Part]) -> list[str]:
    return [text for part in found for text in all_documents(part)]


def plain_pieces(data: bytes, range_bytes: int) -> list[bytes]:
    """What the pieces of a plain text hold, found the simple way."""
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
    with pytest.raises(DataError, match=rf"a\.parquet, row {at + 1}: no text"):
        texts(parts_of(file, 1, 1))


# --- cutting -------------------------------------------------------------------------------------

LINES = st.lists(
    st.sampled_from(["\n", " \t\n", "\r\n", "a\n", "é😀\n", "a longer line of text\n", "no end"]),
    max_size=30,
).map("".join)


@few
@given(LINES | st.text(), st.integers(0, 40))
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


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_bytes_that_are_not_utf8_are_named_with_file_and_offset(name: str, tmp_path: Path) -> None:
    data = '{"text": "good é"}\n'.encode() + b'{"text": "b\xffd"}\n'
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    message = refusal(tmp_path)
    assert f"{file}: not UTF-8 at byte {data.index(255)} (0xff)" in message
    assert "data.errors=replace" in message
    assert "b\ufffdd" in "".join(read(tmp_path, errors="replace"))


def test_a_character_cut_off_by_the_end_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("line\n\naé".encode()[:-1])
    assert "a.txt: not UTF-8 at byte 7 (0xc3)" in refusal(tmp_path, cut_bytes=2)
    assert read(tmp_path, errors="replace") == ["line\n\na\ufffd"]


def test_half_of_a_surrogate_pair_is_refused_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "ab\\ud83d"}\n')
    message = refusal(tmp_path)
    assert "a.jsonl, line 2: not valid Unicode at character 2" in message
    assert "data.errors=replace" in message
    fine, mended = read(tmp_path, errors="replace")
    assert fine == "fine"
    assert mended.rstrip("\ufffd") == "ab" != mended


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"body": 1, "n": 2}', "no text under 'text' (it has: body, n); set data.text_key"),
        ('{"text": 3}', "no text under 'text'"),
        ('{"text": null}', "no text under 'text'"),
        ('{"text": "a', "not valid JSON"),
        ("[1]", "a JSON object is needed"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    message = refusal(tmp_path)
    assert message.startswith(f"{file}, line 3: ")
    assert words in message


def test_a_parquet_row_without_text_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["fine"] * 299 + [None]}), tmp_path / "a.parquet")
    assert "a.parquet, row 300: no text under 'text'" in refusal(tmp_path)


def test_a_parquet_file_without_the_column_is_named_with_those_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    message = refusal(tmp_path, text_key="body")
    assert "a.parquet: no column 'body'; it has n, text" in message
    assert read(tmp_path, text_key="text") == TEXTS


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_truncated_file_is_named(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{ending}"
    WRITERS[ending](file)
    file.write_bytes(file.read_bytes()[:-12])
    assert refusal(tmp_path).startswith(f"{file}: cannot be read")


def test_a_file_that_has_gone_since_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    (part,) = parts(Source(str(tmp_path)))
    file.unlink()
    with pytest.raises(DataError, match=r"a\.txt: no such file on this node"):
        list(documents(part))


def test_a_missing_place_is_named(tmp_path: Path) -> None:
    for location in (f"{tmp_path}/no.txt", f"{tmp_path}/no/*.txt", f"file://{tmp_path}/no"):
        assert refusal(location) == f"data.source={location}: no such file or folder"
    with pytest.raises(ConfigError, match="nope://a/b: this storage cannot be opened"):
        read("nope://a/b")


def test_an_unknown_kind_is_refused_with_the_kinds_there_are(folder: Path) -> None:
    message = refusal(folder / "c.jpg")
    assert message.startswith(f"data.source={folder}/c.jpg: unknown kind of file")
    assert all(kind in message for kind in files.READABLE)


def test_a_folder_or_glob_with_nothing_readable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("x")
    for location in (tmp_path, f"{tmp_path}/*.txt"):
        assert "no readable file is there" in refusal(location)


def test_documents_without_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["", "a", " \n\t", "b", "\u3000"]))
    (tmp_path / "b.txt").write_text(" \n\n")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "d.txt").write_text("\n" * 99 + "d")
    assert read(tmp_path, cut_bytes=1) == ["a", "b", "\n" * 99 + "d"]
    empty = ["", " \n\t", "\u3000", " \n\n", ""]
    for range_bytes in (16, 1000):  # in small pieces, the first of d.txt is blank: no document
        found = texts(parts_of(tmp_path, range_bytes, 1, cut_bytes=1))
        assert [text for text in found if not text.strip()] == empty


def test_an_empty_file_has_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    assert read(tmp_path) == []
    (tmp_path / "b.txt").write_text("b")
    assert read(tmp_path) == ["b"]


# --- tokenizers ----------------------------------------------------------------------------------

CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 20,
    "def read(path):\n    return open(path).read()\n\n" * 20,
    "Größe, naïve café, 東京 and 🦊🦊🦊; it's 1234 and 12.5\n" * 20,
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tokenizer.train(CORPUS, 340)


@few
@given(st.text())
@example("")
@example(HOSTILE)
@example("<|endoftext|>")
@example("<|endoftext|>" * 3)
@example(" " * 100_000 + "x")
@example("\n" * 100_000)
@example("\0" * 1000)
@example("a" * 100_000)
@example("🦊" * 1000)
def test_any_text_comes_back_from_its_tokens(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.eot not in ids
    assert int(trained.token_bytes()[ids].sum()) == len(text.encode())
    assert "".join(trained.stream(ids)) == text


WORD = [
    "a",
    "ab",
    "é",
    "東",
    "🦊",
    " ",
    "\n",
    " \t",
    "1",
    "-",
    "'",
    "'s",
    "'ll",
    "--'",
    " the",
    "\u3000",
]
WORDS = st.lists(
    st.builds(lambda word, count: word * count, st.sampled_from(WORD), st.integers(1, 60)),
    max_size=12,
).map("".join)


@settings(few, max_examples=200)
@given(WORDS | st.text(), st.sampled_from([1, 16, 40]))
@example("<|endoftext|>" * 20, 16)
@example("-" * 32 + "'s-'s" * 20, 40)
@example("x" + " " * 37 + "word", 40)
def test_windows_change_no_id(trained: Tokenizer, text: str, window: int) -> None:
    whole = trained.encode_array(text)
    assert whole.dtype == trained.dtype == np.uint16
    assert whole.tolist() == trained.encode(text) == trained._encoding.encode_ordinary(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "WINDOW", window)
        assert trained.encode(text) == whole.tolist()


@pytest.mark.parametrize("window", range(20, 125, 3))
def test_windows_change_no_id_where_an_end_decides_all_before_it(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = string.ascii_letters  # from the right, two by two: an odd window shifts all pairs
    pairs = ["".join(pair) for pair in itertools.pairwise(letters)][::-1]
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {pair.encode(): 256 + i for i, pair in enumerate(pairs)}
    made = Tokenizer("pairs", r50k_pat_str, ranks, eot=len(ranks))
    text = letters * 9
    whole = made.encode(text)
    monkeypatch.setattr(tokenizer, "WINDOW", window)
    assert made.encode(text) == whole


@pytest.mark.parametrize("word", ["a", "\0", "\n", "-", "1", "ab ", "東"])
def test_a_long_word_has_the_ids_it_has_in_one_piece(trained: Tokenizer, word: str) -> None:
    text = "the " + word * 300_000
    assert trained.encode(text) == trained._encoding.encode_ordinary(text)


def test_half_of_a_surrogate_pair_is_encoded_as_replaced(trained: Tokenizer) -> None:
    assert trained.encode("a\ud83db") == trained.encode("a\ufffdb")


def test_the_largest_uint16_is_never_an_id() -> None:
    tokens = [bytes([i]) for i in range(256)] + [bytes(pair) for pair in np.ndindex(255, 256)]
    ranks = {token: rank for rank, token in enumerate(tokens[:65535])}
    large = Tokenizer("large", "a", ranks, eot=65535)
    assert (large.vocab_size, large.dtype) == (65536, np.uint32)
    del ranks[tokens[65534]]
    small = Tokenizer("small", "a", ranks, eot=65534)
    assert (small.vocab_size, small.dtype) == (65535, np.uint16)


def test_a_million_spaces_before_a_word_come_back(trained: Tokenizer) -> None:
    text = " " * 1_000_001 + "word"
    assert trained.decode(trained.encode(text)) == text


@few
@given(st.lists(st.integers(0, 339)))
def test_streamed_text_joins_to_the_decoded_whatever_the_ids(
    trained: Tokenizer, ids: list[int]
) -> None:
    pieces = list(trained.stream(ids))
    assert "".join(pieces) == trained.decode(ids)
    assert len(pieces) == len(ids) + 1


def test_streamed_text_has_whole_characters_only(trained: Tokenizer) -> None:
    ids = trained.encode("x🐟")  # the corpus has no fish: it is in pieces
    assert len(ids) > 3
    assert [piece for piece in trained.stream(ids) if piece] == ["x", "🐟"]


def test_end_of_text_is_the_last_id_and_stands_for_no_bytes(trained: Tokenizer) -> None:
    assert trained.eot == trained.vocab_size - 1 == 339
    assert trained.token_bytes()[trained.eot] == 0
    assert trained.token_bytes()[: trained.eot].min() == 1
    assert trained.decode([trained.eot]) == tokenizer.END_OF_TEXT


def test_training_twice_gives_the_same_tokenizer(trained: Tokenizer) -> None:
    assert tokenizer.train((text for text in CORPUS), 340).sha256 == trained.sha256
    assert tokenizer.train(CORPUS, 339).sha256 != trained.sha256
    # in another process, with one thread and another order of sets
    code = (
        "import json, sys; from manta.text import tokenizer; "
        "print(tokenizer.train(json.load(sys.stdin), 340).sha256)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
        | {"PYTHONPATH": str(Path(tokenizer.__file__).parents[2])},
        input=json.dumps(CORPUS),
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert done.stdout.strip() == trained.sha256


@few
@given(st.sampled_from(["ab", "ab ", "a \n", "aé😀", "a1'"]), st.integers(0, 2**32), st.data())
def test_tokens_are_those_of_the_trainers_own_encoding(
    alphabet: str, seed: int, data: st.DataObject
) -> None:
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Peer
    from tokenizers.decoders import ByteLevel

    text = "".join(random.Random(seed).choices(alphabet, k=data.draw(st.integers(1, 400))))
    vocab_size = data.draw(st.integers(257, 420))
    peer = Peer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r50k_pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    peer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    peer.train_from_iterator([text], trainer)

    made = tokenizer.train([text], vocab_size)
    assert made.vocab_size == peer.get_vocab_size() + 1 <= vocab_size
    assert made.encode(text) == peer.encode(text).ids
    for token in range(peer.get_vocab_size()):
        assert made.decode([token]) == peer.decode([token])


@few
@given(WORDS, st.integers(1, 30))
def test_the_trainer_gets_the_words_of_a_long_text(text: str, size: int) -> None:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r50k_pat_str), "isolated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "TRAINED_TEXT", size)
        pieces = list(tokenizer._pieces([text]))
    words = [word for piece in pieces for word, _ in split.pre_tokenize_str(piece)]
    assert words == [word for word, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize("word", ["a", "\n", "-", "ab"])
def test_a_trainer_is_given_long_words_in_pieces(word: str) -> None:
    text = "the quick " + word * 500_000 + " fox "
    pieces = list(tokenizer._pieces([text, "x"]))
    assert "".join(pieces) == text + "x"
    assert max(map(len, pieces)) < 1100
    assert tokenizer.train([text], 300).vocab_size > 257


def test_a_vocabulary_is_no_larger_than_the_text_allows() -> None:
    assert tokenizer.train(["ab"], 4096).vocab_size == 258
    assert tokenizer.train([], 4096).vocab_size == 257


def test_a_tokenizer_comes_back_from_its_file(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / layout.ENCODING
    file.write_bytes(trained.serialized)
    for back in (tokenizer.from_bytes(trained.serialized), tokenizer.load(str(file))):
        assert back.serialized == trained.serialized
        assert back.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert (back.name, back.eot, back.vocab_size) == ("bpe-340", 339, 340)
        assert back.encode(HOSTILE) == trained.encode(HOSTILE)
        assert (back.token_bytes() == trained.token_bytes()).all()


def test_a_tokenizer_is_made_once(trained: Tokenizer) -> None:
    data = trained.serialized
    assert tokenizer.from_bytes(bytes(bytearray(data))) is tokenizer.from_bytes(data)


def test_a_missing_or_damaged_tokenizer_is_named(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "encoding.json"
    with pytest.raises(DataError, match=r"encoding\.json: no such file"):
        tokenizer.load(str(file))
    for content in (b"", b"{}", b"[]", b"3", b"\xff", trained.serialized[:-5]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"encoding\.json: not a tokenizer of Manta's"):
            tokenizer.load(str(file))


def test_a_tokenizer_of_another_format_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "encoding.json"
    file.write_bytes(trained.serialized.replace(b"manta-bpe-1", b"manta-bpe-2"))
    with pytest.raises(DataError, match=r"encoding\.json: not a tokenizer of Manta's"):
        tokenizer.load(str(file))


# --- r50k_base -----------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiktoken's cache, empty, and a proxy at which nothing answers."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def test_without_network_or_file_r50k_base_says_how_to_provide_it(offline: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer_file=PATH/r50k_base\.tiktoken"):
        tokenizer.named(tokenizer.R50K)


def test_a_wrong_or_missing_file_is_not_r50k_base(offline: Path, tmp_path: Path) -> None:
    file = tmp_path / "r50k_base.tiktoken"
    with pytest.raises(DataError, match="no such file"):
        tokenizer.named(tokenizer.R50K, str(file))
    file.write_bytes(base64.b64encode(b"a") + b" 0\n")
    with pytest.raises(DataError, match=r"not r50k_base\.tiktoken"):
        tokenizer.named(tokenizer.R50K, str(file))


def test_the_file_that_is_asked_for_is_the_one_that_tiktoken_checks() -> None:
    from tiktoken_ext.openai_public import r50k_base

    assert tokenizer.R50K_SHA256 in r50k_base.__code__.co_consts
    assert tokenizer._r50k_address().startswith("https://")


@few
@given(st.text())
@example(HOSTILE)
@example(" " * 1000 + "x\n\n\n  y")
@example("\n".join(CORPUS))
def test_r50k_base_is_tiktokens_own(r50k: tuple[Tokenizer, tiktoken.Encoding], text: str) -> None:
    ours, theirs = r50k
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


def test_r50k_base_has_gpt2s_ids(r50k: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, theirs = r50k
    assert (ours.vocab_size, ours.eot) == (theirs.n_vocab, theirs.eot_token) == (50257, 50256)
    assert ours.encode("Hello world") == [15496, 995]
    assert tokenizer.from_bytes(ours.serialized).encode(HOSTILE) == theirs.encode_ordinary(HOSTILE)


@pytest.fixture(scope="module")
def r50k(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tiktoken.Encoding]:
    """Ours from the file, and tiktoken's, which finds the file in its cache."""
    file = os.environ.get("MANTA_TEST_R50K")
    if not file:
        pytest.skip("MANTA_TEST_R50K does not name the file r50k_base.tiktoken")
    cache = tmp_path_factory.mktemp("cache")
    shutil.copy(file, cache / hashlib.sha1(tokenizer._r50k_address().encode()).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        theirs = tiktoken.get_encoding("r50k_base")
        assert (
            tokenizer.named(tokenizer.R50K).sha256 == tokenizer.named(tokenizer.R50K, file).sha256
        )
    return tokenizer.named(tokenizer.R50K, file), theirs
