"""Documents in files of every kind, and how a source reads or refuses them."""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manta.errors import DataError
from manta.text import sources
from manta.text.sources import Part, Source, all_documents, documents, parts

TEXTS = ["first text", "second\n\né 😀\u2028\0 text\n", " third "]


def read(location: Path | str, **options: object) -> list[str]:
    """A source's documents, in order."""
    source = Source(str(location), **options)  # type: ignore[arg-type]
    return [text for part in parts(source) for text in documents(part)]


def refusal(location: Path | str, **options: object) -> str:
    """The message with which reading a source is refused."""
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
