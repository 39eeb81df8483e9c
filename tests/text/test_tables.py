"""Labelled texts in tables: CSV and TSV, quoted and not, with and without a header."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.errors import DataError
from manta.text import labels, sources, tables
from manta.text.rows import BadRows
from manta.text.sources import Source

few = settings(deadline=None, max_examples=40)
WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), min_size=1
)
NAMES = st.text("abc ,\"'\té", min_size=1).filter(lambda name: not name.isspace())


def read(file: Path, bad: BadRows | None = None, **keys: Any) -> list[tuple[str | None, str]]:
    source = Source(str(file), kind=keys.pop("kind", labels.KIND), **keys)
    bad = bad or BadRows(source.on_bad_rows)
    found = [text for part in sources.parts(source) for text in sources.all_documents(part, bad)]
    return [tuple(labels.labelled(text)) for text in found]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    data = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return file


@few
@given(rows=st.lists(st.tuples(NAMES, WORDS), min_size=1, max_size=8), with_header=st.booleans())
def test_what_python_writes_as_csv_is_read_back(
    rows: list[tuple[str, str]], with_header: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = io.StringIO()
    csv.writer(made).writerows([("label", "text")] * with_header + rows)
    file = write(tmp_path_factory.mktemp("csv"), "a.csv", made.getvalue())
    assert read(file) == rows


def test_a_tsv_has_no_quotes(tmp_path: Path) -> None:
    rows = [("ham", 'she said "hi'), ("spam", '"5 pounds" off"'), ("ham", "a, b; c")]
    text = "".join(f"{label}\t{words}\r\n" for label, words in rows)
    assert read(write(tmp_path, "sms.tsv", text)) == rows
    assert read(write(tmp_path, "sms.tsv.gz", text)) == rows
    assert "columns are label and text, from its first line on" in str(
        tables.note(str(tmp_path / "sms.tsv"), Source("", kind=labels.KIND).reading)
    )


def test_a_tsv_with_quotes_and_tabs_is_refused_with_the_key_that_reads_it(tmp_path: Path) -> None:
    file = write(tmp_path, "a.tsv", 'text\tlabel\n"one\ttwo ""2"""\tham\nthree\tspam\n')
    with pytest.raises(DataError, match=r"line 2: 3 columns, .* 2; .* data.quotes=double"):
        read(file)
    assert read(file, quotes="double") == [("ham", 'one\ttwo "2"'), ("spam", "three")]
    bad = BadRows("skip")
    assert read(file, bad, on_bad_rows="skip") == [("spam", "three")]
    assert bad.counts == {str(file): {"other columns": 1}}


def test_columns_are_found_by_name_wherever_they_are(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", "\ufeffv2,id,v1\nhello,1,ham\n\nwin,2,spam\n")
    assert read(file, text_key="v2", label_key="v1") == [("ham", "hello"), ("spam", "win")]
    with pytest.raises(DataError, match=r"does not name the columns 'label' and 'text' .*'v2'"):
        read(file)
    twice = write(tmp_path, "b.csv", "text,text,label\na,b,c\n")
    with pytest.raises(DataError, match="2 columns are named 'text'"):
        read(twice)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a,"never closed\nb,c\nd,e\n', "line 1: a quote that opens there is not closed"),
        ('a,b\nc,"x"y\n', "line 2: not CSV"),
        (b"a,b\nc,\xff\n", "line 2: 'text' is not valid Unicode"),
        ("a,b\n,c\n", "line 2: 'label' is the text '', not a label"),
        ("a,b\nc,d,e\n", "line 2: 3 columns, where there are 2"),
    ],
)
def test_a_bad_row_is_named(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, "a.csv", content))


def test_a_long_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: more than 20 bytes; raise data.max_document"):
        read(write(tmp_path, "a.csv", "a," + "x" * 30 + "\n"), most_bytes=20)


def test_rows_of_json_and_parquet_have_labels_too(tmp_path: Path) -> None:
    rows = [{"text": "hi", "label": "ham"}, {"text": "win", "label": 1}]
    expected = [("ham", "hi"), ("1", "win")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    assert read(write(tmp_path, "a.jsonl", lines)) == expected
    assert read(write(tmp_path, "a.json", json.dumps(rows))) == expected
    pq.write_table(pa.table({"text": ["hi", "win"], "label": [3, 4]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("3", "hi"), ("4", "win")]
    for value in (None, 1.5, True, [], " "):
        line = json.dumps({"text": "hi", "label": value})
        with pytest.raises(DataError, match=r"line 1: 'label' is .*, not a label"):
            read(write(tmp_path, "b.jsonl", line))
    with pytest.raises(DataError, match=r"line 1: no 'label' .it has: text.; set data.label_key"):
        read(write(tmp_path, "b.jsonl", '{"text": "hi"}'))


def test_to_classify_needs_no_label(tmp_path: Path) -> None:
    unlabelled = [(None, "hi"), (None, "win")]
    kind = labels.TO_CLASSIFY
    assert read(write(tmp_path, "a.csv", "text\nhi\nwin\n"), kind=kind) == unlabelled
    assert read(write(tmp_path, "b.tsv", "hi\nwin\n"), kind=kind) == unlabelled
    lines = '{"text": "hi"}\n{"text": "win", "label": null}\n'
    assert read(write(tmp_path, "a.jsonl", lines), kind=kind) == unlabelled
    assert read(write(tmp_path, "c.csv", "spam,hi\n"), kind=kind) == [("spam", "hi")]
