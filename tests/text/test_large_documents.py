"""Documents and lines that are too large: refused before they are in memory, wherever they are."""

import gzip
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.documents import read, refusal
from manta.text.sources import Source, documents, parts

MIB = 1 << 20


def zeros(count: int) -> bytes:
    """A gzip of `count` MiB of one letter, made from a few bytes."""
    return gzip.compress(b"a" * MIB, 1) * count  # a gzip may have several members


def zstd(count: int) -> bytes:
    return pa.Codec("zstd").compress(b"a" * MIB, asbytes=True) * count


LARGE: dict[str, Callable[[int], bytes]] = {
    "a.jsonl.gz": zeros,
    "a.json.gz": zeros,
    "a.jsonl.zst": zstd,
    "a.jsonl": lambda count: b"a" * MIB * count,
    "a.txt": lambda count: b"a" * MIB * count,
    "a.md": lambda count: b"\n" * MIB * count,
    "a.text": lambda count: (b" " * 99 + b"\n") * (count * MIB // 100),
}


@pytest.mark.parametrize("cut", [0, 1000])
@pytest.mark.parametrize("name", LARGE)
def test_a_document_that_is_too_large_is_not_read_whole(
    name: str, cut: int, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(LARGE[name](16))
    tracemalloc.start()
    try:
        message = refusal(tmp_path, most_bytes=10_000, cut_bytes=cut)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
    assert message.startswith(f"{tmp_path}/{name}")
    assert "of more than 10,000 bytes, but data.max_document_bytes is 10,000; raise it" in message


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from(["\n", " \n", "a\n", "é😀\r\n", "a longer line\n", "end"])).map(
        "".join
    ),
    st.integers(1, 30),
    st.integers(20, 40),
)
def test_the_documents_that_are_not_too_large_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, text: str, cut: int, most: int
) -> None:
    file = tmp_path_factory.mktemp("large") / "a.txt"
    file.write_bytes(text.encode())
    found = read(file, cut_bytes=cut)
    expected = [document for document in found if len(document.encode()) <= most]
    assert read(file, cut_bytes=cut, most_bytes=most, on_bad_rows="skip") == expected
    if expected == found:
        assert read(file, cut_bytes=cut, most_bytes=max(most, len(text.encode()))) == found
    else:
        assert "data.max_document_bytes" in refusal(file, cut_bytes=cut, most_bytes=most)


def test_a_line_may_be_as_long_as_the_limit(tmp_path: Path) -> None:
    line = b'{"text": "' + b"a" * 88 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 2)
    assert read(tmp_path, most_bytes=len(line)) == ["a" * 88] * 2
    assert "a.jsonl, line 1: a line of more than 100 bytes" in refusal(
        tmp_path, most_bytes=len(line) - 1
    )


def repeated(file: Path, size: int, count: int) -> None:
    """Writes a Parquet file in which `count` rows share one text of `size` bytes."""
    indices = pa.array([0] * count, pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["a" * size]))
    table = pa.table({"text": column})
    pq.write_table(
        table, file, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False
    )


def test_a_text_that_is_stored_once_and_repeated_is_in_memory_once(tmp_path: Path) -> None:
    repeated(tmp_path / "a.parquet", MIB, 500)
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    (part,) = parts(Source(str(tmp_path)))
    before, size = pa.total_allocated_bytes(), 0
    for text in documents(part):
        size += len(text)
        assert pa.total_allocated_bytes() - before < 16 * MIB
    assert size == 500 * MIB


def test_a_row_whose_text_is_too_large_is_refused(tmp_path: Path) -> None:
    texts = ["a" * 10, "b" * 200_000, *["c" * 10] * 5]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    message = refusal(tmp_path, most_bytes=100_000)
    assert message.startswith(f"{tmp_path}/a.parquet, row 2: a text of 200,000 bytes, but data.max")
    assert read(tmp_path, most_bytes=100_000, on_bad_rows="skip") == [texts[0], *texts[2:]]
    assert f"hf:{tmp_path}, row 2: a text of 200,000 bytes" in refusal(
        f"hf:{tmp_path}", most_bytes=100_000
    )


READ = """
import sys
from manta.errors import DataError
from manta.text.sources import Source, documents, parts

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10

before, size, said = peak(), 0, ""
try:
    for part in parts(Source(sys.argv[1])):
        for text in documents(part):
            size += len(text)
except DataError as e:
    said = str(e)
print(size, peak() - before, said)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux's peak of memory")
@pytest.mark.parametrize("name", ["line.jsonl.gz", "repeated.parquet"])
def test_a_few_kilobytes_that_become_gigabytes_take_little_memory(
    name: str, tmp_path: Path
) -> None:
    """A line of 4 GiB is refused; 6.7 GB of rows that share a text of 16 MiB are read one by one.
    (The line's peak has the 256 MiB of data.max_document_bytes.)"""
    file = tmp_path / name
    if name.endswith("gz"):
        file.write_bytes(zeros(4096))
    else:
        repeated(file, 16 * MIB, 400)
    out = subprocess.run(
        [sys.executable, "-c", READ, str(file)], check=True, capture_output=True, text=True
    )
    size, peak_mib, said = out.stdout.split(" ", 2)
    if name.endswith("gz"):
        assert said.startswith(f"{file}, line 1: a line of more than 268,435,456 bytes")
        assert int(size) == 0 and int(peak_mib) < 700
    else:
        assert int(size) == 400 * 16 * MIB and int(peak_mib) < 300
