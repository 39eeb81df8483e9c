"""Documents, from wherever they are.

A corpus is cut into *parts*: small picklable instructions, each read from start to end by one task,
the same list whatever the number of tasks. The document is the unit of the train/val split.
"""

import dataclasses
import fnmatch
import io
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from manta import storage
from manta.errors import DataError

PYTHON = "python"
HUGGING_FACE = "hf:"
PART_BYTES = 2 << 20  # small files are read together until a part is about this large

TEXT = (".txt", ".text", ".md", ".rst", ".py")
JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".json.gz")
PARQUET = (".parquet",)
READABLE = TEXT + JSONL + PARQUET
NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Source:
    """What to read, and how.

    location: "python" (the standard library of the running Python), a file, folder or glob
        (local or any URI), or "hf:OWNER/NAME" for a Hugging Face dataset.
    subset, split: of the Hugging Face dataset.
    text_key: the JSONL key or Parquet column that holds the text.
    errors: "strict" stops at bytes that are not UTF-8; "replace" puts U+FFFD in their place.
    cut_bytes: a longer plain-text file is cut at blank lines into documents of about this size;
        0: a file is one document.
    """

    location: str
    subset: str | None = None
    split: str = "train"
    text_key: str = "text"
    errors: str = "strict"
    cut_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """Some files of a source, or one shard of a Hugging Face dataset, read by one task."""

    source: Source
    files: tuple[str, ...] = ()
    shard: int = 0
    num_shards: int = 1


def parts(source: Source) -> list[Part]:
    """The source as parts, in an order that depends on the source alone.

    Raises:
        DataError: nothing is there, or a file is of a kind that cannot be read.
    """
    if source.location.startswith(HUGGING_FACE):
        count = _hugging_face(source).num_shards
        return [Part(source, shard=i, num_shards=count) for i in range(count)]
    if source.location == PYTHON:
        files = [(str(path), path.stat().st_size) for path in _python_files()]
    else:
        files = _find(source.location)
    groups: list[list[str]] = []
    size = 0
    for name, file_size in files:
        if not groups or size + file_size > PART_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += file_size
    return [Part(source, files=tuple(group)) for group in groups]


def documents(part: Part) -> Iterator[str]:
    """The part's documents, in order, none of them empty.

    Raises:
        DataError: a file is missing, damaged, or not UTF-8 (its name and the offset are given).
    """
    if part.source.location.startswith(HUGGING_FACE):
        dataset = _hugging_face(part.source).shard(num_shards=part.num_shards, index=part.shard)
        found = _texts_of_rows(_rows(dataset, part.source), part.source, part.source.location)
    else:
        found = (text for name in part.files for text in _read(name, part.source))
    return (text for text in found if text.strip())


def _rows(dataset: Any, source: Source) -> Iterator[dict[str, object]]:
    try:
        yield from dataset
    except Exception as e:  # as in _hugging_face
        reason = " ".join(str(e).split())[:200]
        raise DataError(
            f"data.source={source.location}: cannot be read ({reason}); mend the dataset, or check "
            "the network"
        ) from None


def identity(source: Source) -> dict[str, object]:
    """What makes two corpora different: recorded in a dataset's manifest and compared."""
    recorded: dict[str, object] = dataclasses.asdict(source)
    if source.location == PYTHON:
        recorded["python"] = ".".join(map(str, sys.version_info[:3]))
    return recorded


def _python_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = [p for p in root.rglob("*.py") if not NOT_CORPUS & set(p.relative_to(root).parts)]
    return sorted(found)


def _find(location: str) -> list[tuple[str, int]]:
    """(path, bytes) of the readable files at a file, folder or glob, sorted by path."""
    is_glob = any(c in location for c in "*?[") and not storage.exists(storage.absolute(location))
    where = location
    while is_glob and any(c in where for c in "*?["):
        where = where.rpartition("/")[0]
    if is_glob and not where:
        where = "/" if location.startswith("/") else "."
    base = storage.absolute(where)
    top = storage.info(base)
    if top.type == pafs.FileType.NotFound:
        raise DataError(f"data.source={location}: no such file or folder")
    if top.type == pafs.FileType.File:
        if not base.endswith(READABLE):
            raise DataError(
                f"data.source={location}: unknown kind of file; readable are {', '.join(READABLE)}"
            )
        return [(base, top.size)]
    scheme, separator, _ = base.partition("://")
    prefix = scheme + separator if separator and not storage.is_local(base) else ""
    pattern = prefix + storage.filesystem(storage.absolute(location))[1] if is_glob else "*"
    found = [
        (prefix + item.path, item.size)
        for item in storage.list_files(base)
        if item.type == pafs.FileType.File
        and item.path.endswith(READABLE)
        and fnmatch.fnmatch(prefix + item.path, pattern)
    ]
    if not found:
        raise DataError(
            f"data.source={location}: no readable file is there; kinds: {', '.join(READABLE)}"
        )
    return found


def _read(name: str, source: Source) -> Iterator[str]:
    try:
        if name.endswith(PARQUET):
            yield from _parquet(name, source)
        elif name.endswith(JSONL):
            yield from _jsonl(name, source)
        else:
            yield from _plain_text(name, source)
    except FileNotFoundError:
        raise DataError(
            f"{name}: no such file on this node; every node must see the corpus at the same path"
        ) from None
    except (pa.ArrowInvalid, OSError, EOFError) as e:
        raise DataError(f"{name}: cannot be read ({e}); restore the file or leave it out") from None


def _plain_text(name: str, source: Source) -> Iterator[str]:
    """The file as one document, or cut at blank lines; read as a stream, whatever its size."""
    held: list[str] = []
    size = 0
    for line in _lines(name, source.errors):
        if source.cut_bytes and size >= source.cut_bytes and line.strip() and not held[-1].strip():
            yield "".join(held)
            held, size = [], 0
        held.append(line)
        if size or line.strip():  # blank lines alone are no document
            size += len(line.encode())
    yield "".join(held)


def _jsonl(name: str, source: Source) -> Iterator[str]:
    for number, line in enumerate(_lines(name, source.errors), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise DataError(f"{name}, line {number}: not valid JSON ({e})") from None
        if not isinstance(row, dict):
            raise DataError(f"{name}, line {number}: a JSON object is needed on each line")
        yield _text_of(row, source, f"{name}, line {number}")


def _parquet(name: str, source: Source) -> Iterator[str]:
    fs, inside = storage.filesystem(name)
    with pq.ParquetFile(fs.open_input_file(inside)) as file:
        columns = file.schema_arrow.names
        if source.text_key not in columns:
            raise DataError(
                f"{name}: no column '{source.text_key}'; it has {', '.join(columns)}: "
                "set data.text_key"
            )
        batches = file.iter_batches(columns=[source.text_key], batch_size=256)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from _texts_of_rows(rows, source, name)


def _texts_of_rows(rows: object, source: Source, where: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):  # type: ignore[arg-type,var-annotated]
        yield _text_of(row, source, f"{where}, row {number}")


def _text_of(row: dict[str, object], source: Source, where: str) -> str:
    text = row.get(source.text_key)
    if not isinstance(text, str):
        keys = ", ".join(map(str, row))
        raise DataError(
            f"{where}: no text under '{source.text_key}' (it has: {keys}); set data.text_key"
        )
    try:
        text.encode()
    except UnicodeEncodeError as e:  # JSON can spell half of a surrogate pair
        if source.errors == "strict":
            raise DataError(
                f"{where}: not valid Unicode at character {e.start}; mend it or set "
                "data.errors=replace"
            ) from None
        text = text.encode(errors="surrogatepass").decode(errors="replace")
    return text


def _lines(name: str, errors: str) -> Iterator[str]:
    """The file's lines as text, line ends kept as they are, decompressed by the name's ending."""
    fs, inside = storage.filesystem(name)
    offset = 0
    with fs.open_input_stream(inside, compression="detect") as stream:
        for raw in io.BufferedReader(stream, 1 << 20):
            try:
                yield raw.decode(errors=errors)
            except UnicodeDecodeError as e:
                raise DataError(
                    f"{name}: not UTF-8 at byte {offset + e.start} (0x{raw[e.start]:02x}); "
                    "convert the file or set data.errors=replace"
                ) from None
            offset += len(raw)


def _hugging_face(source: Source):  # type: ignore[no-untyped-def]
    """The dataset as a stream; nothing is downloaded but what is read."""
    import datasets

    name = source.location.removeprefix(HUGGING_FACE)
    try:
        return datasets.load_dataset(name, name=source.subset, split=source.split, streaming=True)
    except Exception as e:  # the hub's client raises many kinds, none of them documented
        reason = " ".join(str(e).split())[:200]
        raise DataError(
            f"data.source={source.location}: the dataset cannot be opened ({reason}); check the "
            "name, data.subset, data.split and the network, or download it and give its folder"
        ) from None
