"""Sources of documents: what they yield, that parts stay the same, and what is refused."""

import gzip
import json
import pickle
import random
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.documents import TEXTS, WRITERS, jsonl, parts_of, read, refusal, texts, write_parquet
from manta.errors import ConfigError, DataError
from manta.text import files, sources
from manta.text.sources import Source, documents, parts

# --- where documents come from -------------------------------------------------------------------


@pytest.mark.parametrize("ending", WRITERS)
def test_each_row_of_a_file_is_a_document(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    WRITERS[ending](file)
    assert read(file) == TEXTS


@pytest.mark.parametrize("ending", files.TEXT)
def test_a_plain_text_file_is_a_document_to_the_byte(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"plain{ending}"
    file.write_bytes(" \r\n\n\r\ufeffx\u2028é\n\n".encode())
    assert read(file) == [" \r\n\n\r\ufeffx\u2028é\n\n"]


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


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_bytes_that_are_not_utf8_are_named_with_file_and_offset(name: str, tmp_path: Path) -> None:
    data = '{"text": "good é"}\n'.encode() + b'{"text": "b\xffd"}\n'
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    message = refusal(tmp_path)
    place = f"{file}" if name.endswith("txt") else f"{file}, line 2"
    assert f"{place}: not UTF-8 at byte {data.index(255)} (0xff)" in message
    assert "data.errors=replace" in message
    assert "b\ufffdd" in "".join(read(tmp_path, errors="replace"))


def test_a_character_cut_off_by_the_end_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("line\n\naé".encode()[:-1])
    assert "a.txt, from line 3: not UTF-8 at byte 7 (0xc3)" in refusal(tmp_path, cut_bytes=2)
    assert read(tmp_path, errors="replace") == ["line\n\na\ufffd"]


def test_half_of_a_surrogate_pair_is_refused_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "ab\\ud83d"}\n')
    message = refusal(tmp_path)
    assert "a.jsonl, line 2: 'text' is not valid Unicode at character 2" in message
    assert "data.errors=replace" in message
    fine, mended = read(tmp_path, errors="replace")
    assert fine == "fine"
    assert mended.rstrip("\ufffd") == "ab" != mended


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"body": 1, "n": 2}', "no 'text' (it has: body, n); set data.text_key, or"),
        ('{"text": 3}', "'text' is the number 3, not a text; fix the row or set data.text_key, or"),
        ('{"text": null}', "'text' is null, not a text; fix the row"),
        ('{"text": true}', "'text' is true, not a text"),
        ('{"text": NaN}', "'text' is the number nan, not a text"),
        ('{"text": ["a\\u001b"]}', r"'text' is a list ['a\x1b'], not a text"),
        ('{"text": {"a": "b"}}', "'text' is an object {'a': 'b'}, not a text"),
        ('{"text": "a', "not valid JSON"),
        ("[1]", "a list [1], but a line of JSONL is a JSON object; fix it"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    message = refusal(tmp_path)
    assert message.startswith(f"{file}, line 3: ")
    assert words in message
    assert message.endswith("or leave such rows out with data.on_bad_rows=skip")


def test_a_parquet_row_without_text_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["fine"] * 299 + [None]}), tmp_path / "a.parquet")
    assert "a.parquet, row 300: 'text' is null" in refusal(tmp_path)


def test_a_parquet_file_without_the_column_is_named_with_those_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    message = refusal(tmp_path, text_key="body")
    assert "a.parquet: no 'body' (it has: n, text); set data.text_key" in message
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
        assert "no readable file there" in refusal(location)


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
