"""Documents from files, the Hugging Face hub, or the source code of the running Python.

A corpus is cut into *parts*: small picklable instructions, each read from start to end by one task.
The list of parts is the same for any number of tasks. The documents do not depend on the parts: the
pieces of a file (`files.Piece`) depend on that file alone, and parts only group pieces. The unit of
the train/val split is the document.
"""

import dataclasses
import functools
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from manta import storage
from manta.errors import DataError
from manta.text import files, labels, listing, parquet, pieces, rows
from manta.text.files import PARQUET, Piece, kind
from manta.text.listing import Listing
from manta.text.rows import BadRow, BadRows, Reading

PYTHON = "python"
HUGGING_FACE = "hf:"
RANGE_BYTES = 4 << 20  # large files are read in pieces of this size
# Small pieces are read together until a part is about PART_BYTES large. A part is a task, and
# thousands of tasks cost more than they gain: a large corpus has about MANY_PARTS parts, each of at
# most MOST_PART_BYTES.
PART_BYTES = 2 << 20
MANY_PARTS = 512
MOST_PART_BYTES = 64 << 20
FOOTERS_AT_ONCE = 16  # reading one mostly waits for the storage
HUB_SECONDS = 10  # how long the hub may take to name a revision
# Preparation takes 6 to 13 times as much memory as its largest document has bytes (measured on
# JSONL of ASCII, without and with one emoji): this is up to 3.3 GiB for each task.
MOST_BYTES = 256 << 20
NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus: what to read, and how.

    location: "python" (the standard library of the running Python), a file, folder or glob
        (local or any URI), or "hf:OWNER/NAME" for a Hugging Face dataset.
    subset, split: the subset and the split of the Hugging Face dataset.
    text_key: the JSONL key or Parquet column that contains the text.
    errors: bytes that are not UTF-8 make a bad row ("strict"), or U+FFFD is put in their place
        ("replace").
    cut_bytes: plain-text files longer than this are cut at blank lines into documents of about
        this size; 0: a file is one document.
    most_bytes: the size of the largest document, and of the longest line of JSONL.
    on_bad_rows: what happens to rows without a usable text (`rows.BadRows`): "fail" or "skip".
    kind: "text", or what each row is: "chat" (`conversations`), "preference" (`preferences`),
        "classify" or "unlabelled" (`labels`).
    before_input: what is put between the instruction and the input of such a row.
    label_key: the key or column of a label.
    quotes: whether quotes hold a field together in a table (`tables`).
    """

    location: str
    subset: str | None = None
    split: str = "train"
    text_key: str = "text"
    errors: str = "strict"
    cut_bytes: int = 0
    most_bytes: int = MOST_BYTES
    on_bad_rows: str = "fail"
    kind: str = "text"
    before_input: str = ""
    label_key: str = "label"
    quotes: str = "auto"

    @property
    def reading(self) -> Reading:
        return Reading(
            self.text_key, self.errors, self.cut_bytes, self.most_bytes, self.kind,
            self.before_input, self.label_key, self.quotes,
        )  # fmt: skip

    @property
    def readable(self) -> tuple[str, ...]:
        """The endings of the names of the files that are read."""
        if self.kind in (labels.KIND, labels.TO_CLASSIFY):
            return files.LABELLED
        return files.ROWS if self.kind != "text" else files.READABLE


@dataclasses.dataclass(frozen=True)
class Part:
    """Some pieces of a source's files, or one shard of a Hugging Face dataset, read by one task."""

    source: Source
    pieces: tuple[Piece, ...] = ()
    shard: int = 0
    num_shards: int = 1

    def file(self, index: int) -> str:
        """The file of a piece, or the dataset on the hub: what rows are counted by."""
        return self.pieces[index].path if self.pieces else self.source.location


def list_files(source: Source) -> Listing | None:
    """The files of the source at this time; None if it is not made of files that a person gave.

    Raises:
        DataError: the location is empty or missing, or its file is of a kind that cannot be read.
    """
    if source.location == PYTHON or source.location.startswith(HUGGING_FACE):
        return None
    return listing.find(source.location, source.readable)


def parts(source: Source, listed: Listing | None = None) -> list[Part]:
    """Cuts the source into parts, in an order that depends on the source alone. `listed` is what
    `list_files` found, if it has been called already.

    Raises:
        DataError: the location is empty or missing, or its file is of a kind that cannot be read.
    """
    if source.location.startswith(HUGGING_FACE):
        count = _hugging_face(source).num_shards
        return [Part(source, shard=i, num_shards=count) for i in range(count)]
    if source.location == PYTHON:
        found = [(str(path), path.stat().st_size) for path in _python_files()]
    else:
        listed = listed or listing.find(source.location, source.readable)
        found = [(file.path, file.size) for file in listed.files]
    cut = list(_pieces(found, source))
    total = sum(size for _, size in cut)
    most = max(PART_BYTES, min(total // MANY_PARTS, MOST_PART_BYTES))
    groups: list[list[Piece]] = []
    held = 0
    for piece, size in cut:
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(piece)
        held += size
    return [Part(source, pieces.join(group)) for group in groups]


def _pieces(found: list[tuple[str, int]], source: Source) -> Iterator[tuple[Piece, int]]:
    """Yields (piece, bytes) for the files, in the files' order."""
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        large = (file for file in found if file[1] > RANGE_BYTES)
        cut = pool.map(
            lambda file: pieces.cut(file[0], file[1], source.cut_bytes, RANGE_BYTES), large
        )
        for path, size in found:
            yield from next(cut) if size > RANGE_BYTES else [(Piece(path), size)]


def documents(part: Part, bad: BadRows | None = None) -> Iterator[str]:
    """The part's documents, in order, without those that are empty or only white space.

    Args:
        bad: counts the bad rows, if the source skips them.

    Raises:
        DataError: a file is missing or damaged, or a row is bad and not skipped (the message has
            the file's name and the place in it).
    """
    return (text for text in all_documents(part, bad) if text and not text.isspace())


def all_documents(part: Part, bad: BadRows | None = None) -> Iterator[str]:
    """The part's documents, in order, including empty rows and empty plain-text files; arguments
    and errors are those of `documents`."""
    return (text for _, _, text in located_documents(part, bad))


def located_documents(part: Part, bad: BadRows | None = None) -> Iterator[tuple[int, int, str]]:
    """The documents of `all_documents` as (index of the piece, number in the piece from 1, text);
    rows without a usable text have no number."""
    source = part.source
    bad = bad or BadRows(source.on_bad_rows)
    reading = source.reading
    if source.location.startswith(HUGGING_FACE):
        dataset = _hugging_face(source).shard(num_shards=part.num_shards, index=part.shard)
        shard = f" (shard {part.shard + 1} of {part.num_shards})" if part.num_shards > 1 else ""
        read = [_texts_of_rows(_rows(dataset, source), source.location, shard, reading, bad)]
    else:
        read = [pieces.read(piece, reading, bad) for piece in part.pieces]
    for index, texts in enumerate(read):
        for number, text in enumerate(texts, 1):
            yield index, number, text


def name_of_piece(part: Part, index: int) -> str:
    """The name of a piece for a person: its file, and where it starts if not at the beginning."""
    if not part.pieces:
        return f"{part.source.location}, shard {part.shard + 1} of {part.num_shards}"
    piece = part.pieces[index]
    unit = "row group" if kind(piece.path) in PARQUET else "byte"
    return piece.path + (f", from {unit} {piece.start} on" if piece.start else "")


def _texts_of_rows(
    tables: Iterator[Any], location: str, shard: str, reading: Reading, bad: BadRows
) -> Iterator[str]:
    for number, table in enumerate(tables, 1):
        try:
            if reading.kind != "text":
                yield parquet.record_of(table, reading)
                continue
            if reading.text_key not in table.schema.names:
                raise rows.missing(table.schema.names, reading)
            yield parquet.text_of_scalar(table[reading.text_key][0], reading)
        except BadRow as e:
            where = functools.partial("{}, row {}{}".format, location, number, shard)
            bad.add(e, location, where)


def _rows(dataset: Any, source: Source) -> Iterator[Any]:
    """Yields each row as a table of pyarrow, in which nothing is decoded yet."""
    try:
        yield from dataset.with_format("arrow")
    except Exception as e:  # as in _hugging_face
        reason = " ".join(str(e).split())[:200]
        raise DataError(
            f"data.source={source.location}: cannot be read ({reason}); fix the dataset, or check "
            "the network"
        ) from None


def identity(source: Source) -> dict[str, object]:
    """The values that tell corpora apart; a dataset's manifest records them for comparison. If no
    row is skipped, it does not matter which ones would be."""
    recorded: dict[str, object] = dataclasses.asdict(source)
    if source.on_bad_rows == "fail":
        del recorded["on_bad_rows"], recorded["most_bytes"]
    del recorded["before_input"]  # the template decides, and is recorded by itself
    if source.kind == "text":  # a key that datasets of earlier versions do not have
        del recorded["kind"]
    if source.kind != labels.KIND:
        del recorded["label_key"], recorded["quotes"]
    if source.location == PYTHON:
        recorded["python"] = ".".join(map(str, sys.version_info[:3]))
    return recorded


def _python_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = [p for p in root.rglob("*.py") if not NOT_CORPUS & set(p.relative_to(root).parts)]
    return sorted(found)


def local_folder(source: Source) -> str | None:
    """The folder of a Hugging Face dataset that is on this machine; None if it is on the hub."""
    name = source.location.removeprefix(HUGGING_FACE)
    return storage.absolute(name) if Path(name).expanduser().is_dir() else None


def revision(source: Source) -> str | None:
    """The revision that a dataset on the Hugging Face hub has now; None if the hub does not say."""
    import huggingface_hub

    name = source.location.removeprefix(HUGGING_FACE)
    try:
        return huggingface_hub.HfApi().dataset_info(name, timeout=HUB_SECONDS).sha
    except Exception:  # as in _hugging_face; without a network, data that is prepared can be used
        return None


def _hugging_face(source: Source):  # type: ignore[no-untyped-def]
    """Opens the dataset as a stream: only what is read is downloaded."""
    import datasets

    name = source.location.removeprefix(HUGGING_FACE)
    try:
        return datasets.load_dataset(name, name=source.subset, split=source.split, streaming=True)
    except Exception as e:  # the hub's client raises many kinds of errors, none documented
        reason = " ".join(str(e).split())[:200]
        raise DataError(
            f"data.source={source.location}: the dataset cannot be opened ({reason}); check the "
            "name, data.subset, data.split and the network, or download it and give its folder"
        ) from None
