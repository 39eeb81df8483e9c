"""Rows without a usable text: each is named with its place and value, or skipped and counted."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.documents import jsonl, parts_of, read, refusal
from manta.text import rows
from manta.text.rows import BadRows
from manta.text.sources import Part, Source, all_documents, parts

few = settings(deadline=None, max_examples=50)
MOST = 60
BAD = {
    b'{"text": null}': "null",
    b'{"body": "a"}': "missing",
    b"{}": "missing",
    b'{"text": 3}': "not text",
    b'{"text": NaN}': "not text",
    b'{"text": {"a": []}}': "not text",
    b'{"text": "cut off': "not JSON",
    b'{"text": "a\tb"}': "not JSON",
    b'{"text": "b\xffd"}': "not UTF-8",
    b'{"text": "\\ud800"}': "not Unicode",
    b'{"text": "a", "text": "b"}': "two texts",
    b'{"text": "a", "te\\u0078t": "b"}': "two texts",
    b'["text"]': "not an object",
    b'{"text": "' + b"a" * MOST + b'"}': "too large",
}
GOOD = {
    b'{"text": "fine"}': "fine",
    b'{"text": ""}': "",
    b'{"n": -Infinity, "text": "\\u0000"}': "\0",
    b'{"in": {"text": 1, "text": 2}, "text": "b"}': "b",
    '{"text": "é\u2028"}'.encode(): "é\u2028",
}


def skipping(found: list[Part]) -> tuple[list[str], dict[str, dict[str, int]]]:
    """The texts of a source that skips bad rows, and the numbers of these by file and kind."""
    bad = BadRows("skip")
    texts = [text for part in found for text in all_documents(part, bad)]
    return texts, rows.total([bad.counts])


@few
@given(
    st.lists(st.sampled_from([*BAD, *GOOD, b"", b" \t"]), max_size=12),
    st.booleans(),
    st.integers(1, 300),
)
def test_bad_lines_are_named_or_counted_and_the_others_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ends: bool, range_bytes: int
) -> None:
    file = tmp_path_factory.mktemp("bad") / "a.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n" * ends)
    found = parts_of(file, range_bytes, 1, most_bytes=MOST, on_bad_rows="skip")
    texts, counts = skipping(found)
    assert texts == [GOOD[line] for line in lines if line in GOOD]
    kinds = [BAD[line] for line in lines if line in BAD]
    expected = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    assert counts == ({str(file): expected} if kinds else {})
    if kinds:
        first = next(number for number, line in enumerate(lines, 1) if line in BAD)
        message = refusal(file, most_bytes=MOST)
        assert message.startswith(f"{file}, line {first}: ")
        assert message.endswith("or leave such rows out with data.on_bad_rows=skip")
        assert "\n" not in message


def test_a_line_that_is_too_deep_is_a_bad_row_and_a_long_number_is_none(tmp_path: Path) -> None:
    deep = '{"text": "a", "in": ' + "[" * 100_000 + "]" * 100_000 + "}"
    number = f'{{"text": "b", "n": -{"9" * 5000}}}'
    (tmp_path / "a.jsonl").write_text(f"{number}\n{deep}\n{number}")
    assert "a.jsonl, line 2: lists and objects in each other, deeper than" in refusal(tmp_path)
    assert read(tmp_path, on_bad_rows="skip") == ["b", "b"]
    (tmp_path / "a.jsonl").write_text(f'{{"text": {"9" * 5000}}}')
    assert "'text' is the number inf, not a text" in refusal(tmp_path)


def test_what_a_value_is_is_shown_in_one_short_visible_line(tmp_path: Path) -> None:
    value = ["\x1b[2J\n" * 1000] * 1000
    keys = {f"\x1b{i}\n": 1 for i in range(10_000)}
    for row, words in (
        ({"text": value}, r"is a list ['\x1b[2J"),
        (keys, r"it has: \x1b0\n, \x1b1"),
    ):
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        message = refusal(tmp_path)
        assert words in message
        assert message.removeprefix(str(tmp_path)).isprintable()
        assert len(message) < 800


def test_a_document_of_plain_text_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\n\nb\xff\nb\n\nc\n")
    options = {"cut_bytes": 1, "on_bad_rows": "skip"}
    assert refusal(tmp_path, cut_bytes=1).startswith(
        f"{tmp_path}/a.txt, from line 3: not UTF-8 at byte 7 (0xff)"
    )
    texts, counts = skipping(parts(Source(str(tmp_path), **options)))  # type: ignore[arg-type]
    assert texts == ["a\n\n", "c\n"]
    assert counts == {f"{tmp_path}/a.txt": {"not UTF-8": 1}}
    assert read(tmp_path, cut_bytes=1, errors="replace") == ["a\n\n", "b\ufffd\nb\n\n", "c\n"]


# --- Parquet, and datasets of Hugging Face --------------------------------------------------------

BYTES = pa.array([b"ok", b"b\xffd", None, "é".encode()], pa.binary())
INVALID = pa.Array.from_buffers(pa.string(), len(BYTES), BYTES.buffers())
COLUMNS = {
    "string": INVALID,
    "large_string": BYTES.cast(pa.large_binary()).view(pa.large_string()),
    "binary": BYTES,
    "large_binary": BYTES.cast(pa.large_binary()),
    "binary_view": BYTES.cast(pa.binary_view()),
}


@pytest.mark.parametrize("where", ["", "hf:"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_texts_are_read_from_columns_of_any_type_of_text(
    kind: str, where: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "text": COLUMNS[kind]}), tmp_path / "train.parquet")
    location = f"{where}{tmp_path}"
    place = location if where else f"{tmp_path}/train.parquet"
    assert refusal(location).startswith(f"{place}, row 2: not UTF-8 at byte 1 (0xff); convert")
    assert refusal(location, errors="replace").startswith(f"{place}, row 3: 'text' is null")
    found = parts(Source(location, on_bad_rows="skip"))
    assert skipping(found) == (["ok", "é"], {place: {"not UTF-8": 1, "null": 1}})
    found = parts(Source(location, errors="replace", on_bad_rows="skip"))
    assert skipping(found) == (["ok", "b\ufffdd", "é"], {place: {"null": 1}})


@pytest.mark.parametrize(
    "kind", [pa.string_view(), pa.json_(), pa.dictionary(pa.int8(), pa.utf8())]
)
def test_texts_are_read_from_views_extensions_and_dictionaries(
    kind: pa.DataType, tmp_path: Path
) -> None:
    table = pa.table({"text": pa.array(['"a"', None, '"é"'], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet, row 2: 'text' is null" in refusal(tmp_path)
    assert read(tmp_path, on_bad_rows="skip") == ['"a"', '"é"']


def test_a_dictionary_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """The library refuses it as a whole, so no row of it can be replaced or skipped."""
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1]), INVALID.take(pa.array([0, 1])))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    for options in ({}, {"errors": "replace", "on_bad_rows": "skip"}):
        message = refusal(tmp_path, **options)
        assert message.startswith(f"{tmp_path}/a.parquet: cannot be read (Invalid UTF8 payload);")


@pytest.mark.parametrize("column", [[1, 2], [["a"], ["b"]], [{"a": "b"}, {"a": "c"}], [None, None]])
def test_a_column_of_another_type_is_named_with_it(column: list, tmp_path: Path) -> None:
    array = pa.array(column)
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    message, kind = refusal(tmp_path), str(array.type).partition("<")[0]
    assert message.startswith(f"{tmp_path}/a.parquet: 'text' is a column of {kind}")
    reason = "null" if column[0] is None else "not text"
    found = parts(Source(str(tmp_path), on_bad_rows="skip"))
    assert skipping(found) == ([], {f"{tmp_path}/a.parquet": {reason: 2}})
    found = parts(Source(str(tmp_path), text_key="body", on_bad_rows="skip"))
    assert skipping(found) == ([], {f"{tmp_path}/a.parquet": {"missing": 2}})


def test_a_column_may_have_a_dot_in_its_name(tmp_path: Path) -> None:
    columns = [pa.array([{"b": "wrong"}]), pa.array(["right"]), pa.array(["wrong"])]
    pq.write_table(pa.table(columns, ["a", "a.b", "a.b.c"]), tmp_path / "a.parquet")
    assert read(tmp_path, text_key="a.b") == ["right"]


def test_rows_of_a_hugging_face_dataset_are_named_or_counted(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(["a", "b"]) + b'\n{"text": null}\n{"n": 1}\n')
    location = f"hf:{tmp_path}"
    assert refusal(location).startswith(f"{location}, row 3: 'text' is null, not a text; fix the")
    found = parts(Source(location, on_bad_rows="skip"))
    assert skipping(found) == (["a", "b"], {location: {"null": 2}})
    found = parts(Source(location, text_key="n", on_bad_rows="skip"))
    assert skipping(found)[1] == {location: {"not text": 3, "null": 1}}


# --- counts ---------------------------------------------------------------------------------------

COUNTS = st.dictionaries(
    st.sampled_from([f"{i}.jsonl" for i in range(300)]),
    st.dictionaries(st.sampled_from(["null", "missing"]), st.integers(1, 9), min_size=1),
    max_size=200,
)


@few
@given(st.lists(COUNTS, max_size=4))
def test_no_skipped_row_is_lost_from_the_sum(counts: list[dict[str, dict[str, int]]]) -> None:
    total = rows.total(counts)
    for kind in ("null", "missing"):
        expected = sum(kinds.get(kind, 0) for found in counts for kinds in found.values())
        assert sum(kinds.get(kind, 0) for kinds in total.values()) == expected
    assert len(total) <= rows.LISTED + 1
    line = rows.line(total)
    assert line.startswith(f"{sum(sum(k.values()) for k in total.values()):,} rows without a")
    assert len(line) < 300


def test_the_line_about_skipped_rows() -> None:
    counts = {
        "a": {"null": 1200, "missing": 1},
        "b": {"null": 3},
        "c": {"null": 1},
        "d": {"null": 1},
    }
    assert rows.line(rows.total([counts])) == (
        "1,206 rows without a usable text (1,205 null, 1 missing): a (1,200 null, 1 missing), "
        "b (3 null), c (1 null), and 1 more"
    )
