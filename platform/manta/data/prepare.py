"""Documents become tokenized Parquet shards, through Ray Data.

Each part of the corpus is one task: it reads, splits by hash, tokenizes and writes its own shards,
one row group at a time, so that memory does not grow with the corpus and the result does not depend
on how many tasks ran at once. The driver gathers what they wrote and commits the manifest.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from manta import storage
from manta.config import Natural, OpenFraction, VocabSize, config
from manta.data import manifest as manifests
from manta.data.manifest import Manifest, Shard
from manta.errors import ConfigError, DataError, MantaError
from manta.progress import Progress
from manta.text import sources, tokenizer
from manta.text.tokenizer import Tokenizer

ROW_GROUP_TOKENS = 1 << 18
TOKENIZER_SAMPLE_BYTES = 64 << 20
BPE_VOCAB_SIZE = 4096
ERROR = "error"


@config
class DataConfig:
    source: str = sources.PYTHON
    """Where the documents are: `python` (the source code and documentation of the running Python),
    a file, folder or glob of .txt, .md, .py, .jsonl (.gz, .zst) or .parquet files (local or s3://,
    gs://, ...), or `hf:OWNER/NAME`, a Hugging Face dataset, streamed."""
    name: str | None = None
    """Name of the prepared dataset, a folder under HOME/data; null: from source and tokenizer."""
    subset: str | None = None
    """Subset (configuration) of a Hugging Face dataset, such as sample-10BT."""
    split: str = "train"
    """Split of a Hugging Face dataset to read."""
    text_key: str = "text"
    """JSONL key or Parquet column that holds a document's text."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: stop and name them, or put U+FFFD in their place."""
    document_bytes: Natural | None = None
    """A longer plain-text file is cut at blank lines into documents of about so many bytes; 0: a
    file is one document; null: 16384, but 0 for source=python."""
    tokenizer: str = "bpe"
    """`bpe`: trained on the corpus; `r50k_base`: GPT-2's; or the encoding.json of a dataset."""
    vocab_size: VocabSize | None = None
    """Tokens in a trained bpe, end-of-text included; null: 4096. Other tokenizers bring theirs."""
    tokenizer_file: str | None = None
    """The file r50k_base.tiktoken, where it cannot be downloaded."""
    val_fraction: OpenFraction = 0.05
    """Share of documents that go to the val split, decided by a hash of each document's text."""
    verify: Literal["full", "size"] = "full"
    """Before training, check every shard's sha256, or only its size."""

    def problems(self) -> list[str]:
        found = []
        if self.tokenizer not in ("bpe", tokenizer.R50K) and not self.tokenizer.endswith(".json"):
            found.append(
                f"tokenizer={self.tokenizer}: valid are bpe, {tokenizer.R50K}, or the path of a "
                f"dataset's {tokenizer.FILE_NAME}"
            )
        if self.vocab_size is not None and self.tokenizer != "bpe":
            found.append(
                f"vocab_size is for tokenizer=bpe; {self.tokenizer} brings its own: omit it"
            )
        if self.tokenizer_file is not None and self.tokenizer != tokenizer.R50K:
            found.append(f"tokenizer_file is for tokenizer={tokenizer.R50K}: omit it")
        if self.subset is not None and not self.source.startswith(sources.HUGGING_FACE):
            found.append("subset is for a Hugging Face source (hf:OWNER/NAME): omit it")
        if self.name is not None and not re.fullmatch(r"[\w-][\w.-]*", self.name):
            found.append(f"name={self.name}: letters, digits, '.', '_' and '-' are valid")
        return found

    @property
    def corpus(self) -> sources.Source:
        cut = self.document_bytes
        if cut is None:
            cut = 0 if self.source == sources.PYTHON else 16384
        location = self.source
        if location != sources.PYTHON and not location.startswith(sources.HUGGING_FACE):
            location = storage.absolute(location)
        return sources.Source(location, self.subset, self.split, self.text_key, self.errors, cut)

    @property
    def dataset_name(self) -> str:
        if self.name is not None:
            return self.name
        last = self.source.removeprefix(sources.HUGGING_FACE).rstrip("/").rpartition("/")[2]
        words = [last.partition(".")[0] or "data", *([self.subset] if self.subset else [])]
        if self.tokenizer == "bpe":
            words.append(f"bpe{self.vocab_size or BPE_VOCAB_SIZE}")
        else:
            words.append(self.tokenizer.rpartition("/")[2].removesuffix(".json"))
        return re.sub(r"[^\w.-]+", "-", "-".join(words)).strip("-")

    def folder(self, home: str) -> str:
        return storage.join(home, "data", self.dataset_name)

    def recipe(self) -> dict[str, Any]:
        """What decides the tokens: a dataset made by another recipe is another dataset."""
        return {
            "source": sources.identity(self.corpus),
            "tokenizer": self.tokenizer,
            "vocab_size": (self.vocab_size or BPE_VOCAB_SIZE) if self.tokenizer == "bpe" else None,
            "val_fraction": self.val_fraction,
        }


def find(data: DataConfig, home: str) -> Manifest | None:
    """The dataset that `data` describes, if it has been prepared.

    Raises:
        DataError: a dataset of that name was made from something else.
    """
    path = data.folder(home)
    if not manifests.exists(path):
        return None
    manifest = manifests.load(path)
    wanted = data.recipe()
    if manifest.recipe != wanted:
        was, now = _first_difference(manifest.recipe, wanted)
        raise DataError(
            f"{path} was prepared with {was}, but the config says {now}; give another data.name, "
            "or delete the folder to prepare it anew"
        )
    return manifest


def prepare(data: DataConfig, home: str) -> Manifest:
    """Prepares the dataset, from the start, and commits it.

    Raises:
        DataError: the corpus is missing, empty, unreadable, or too small to have a val split.
    """
    path = data.folder(home)
    corpus = data.corpus
    parts = sources.parts(corpus)
    storage.delete_folder(path)  # what an interrupted run left: it has no manifest
    storage.make_folder(path)
    made = make_tokenizer(data, parts)
    storage.write_bytes(storage.join(path, tokenizer.FILE_NAME), made.serialized)
    job = _PartJob(path, parts, made.serialized, data.val_fraction)
    shards: list[Shard] = []
    with Progress("preparing", len(parts), "parts") as progress:
        for row in _run(job):
            if row[ERROR]:
                raise DataError(row[ERROR])
            shards += [Shard(**shard) for shard in row["shards"]]
            progress.advance(1, f"{sum(s.tokens for s in shards):,} tokens")
    shards.sort(key=lambda shard: shard.file)
    manifest = Manifest(
        path, data.recipe(), made.name, made.sha256, made.vocab_size, made.eot, tuple(shards)
    )
    _refuse_empty(manifest, data)
    manifest.save()
    return manifest


def make_tokenizer(data: DataConfig, parts: list[sources.Part]) -> Tokenizer:
    """The tokenizer that the config names, trained on (the start of) the corpus if it says so."""
    if data.tokenizer == tokenizer.R50K:
        return tokenizer.named(tokenizer.R50K, data.tokenizer_file)
    if data.tokenizer != "bpe":
        return tokenizer.load(storage.absolute(data.tokenizer))
    return tokenizer.train(_sample(parts), data.vocab_size or BPE_VOCAB_SIZE)


def _sample(parts: list[sources.Part]) -> Iterator[str]:
    size = 0
    for part in parts:
        for text in sources.documents(part):
            yield text
            size += len(text)
            if size >= TOKENIZER_SAMPLE_BYTES:
                return
    if not size:
        raise DataError(f"data.source={parts[0].source.location}: the corpus holds no text")


def is_val(text: str, fraction: float) -> bool:
    """Whether a document belongs to the val split: by its text alone, so that it stays there
    whatever is added to the corpus, and copies of one document never land on both sides."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@dataclasses.dataclass(frozen=True)
class _PartJob:
    """The task of one part; runs on the workers."""

    path: str
    parts: list[sources.Part]
    tokenizer: bytes
    val_fraction: float

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (index,) = batch["index"]
        try:
            shards, error = self._write(int(index), self.parts[int(index)]), ""
        except MantaError as e:  # as a value: a task that raises is retried, and prints its stack
            shards, error = [], str(e)
        return {"shards": [[dataclasses.asdict(s) for s in shards]], ERROR: [error]}

    def _write(self, index: int, part: sources.Part) -> list[Shard]:
        made = tokenizer.from_bytes(self.tokenizer)
        writers = {s: _ShardWriter(self.path, s, index, made) for s in ("train", "val")}
        for text in sources.documents(part):
            writers["val" if is_val(text, self.val_fraction) else "train"].add(text)
        return [shard for writer in writers.values() if (shard := writer.close()) is not None]


class _ShardWriter:
    """Writes one shard, a row group at a time; the file appears with its first row group."""

    def __init__(self, path: str, split: str, index: int, made: Tokenizer):
        self._split = split
        self._file = f"{split}-{index:05d}.parquet"
        self._path = storage.join(path, self._file)
        self._tokenizer = made
        dtype = pa.uint16() if made.vocab_size <= 1 << 16 else pa.uint32()
        self._dtype = dtype.to_pandas_dtype()
        self._schema = pa.schema([("tokens", pa.list_(dtype)), ("text_bytes", pa.int32())])
        self._sink: storage.HashingWriter | None = None
        self._parquet: pq.ParquetWriter | None = None
        self._held: list[np.ndarray] = []
        self._held_bytes: list[int] = []
        self._row_groups: list[int] = []
        self._rows = self._text_bytes = self._held_tokens = 0

    def add(self, text: str) -> None:
        ids = [*self._tokenizer.encode(text), self._tokenizer.eot]
        self._held.append(np.asarray(ids, dtype=self._dtype))
        self._held_bytes.append(len(text.encode()))
        self._held_tokens += len(ids)
        if self._held_tokens >= ROW_GROUP_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._parquet is None:
            self._sink = storage.HashingWriter(self._path)
            # Tokens are near random: dictionaries cost time and save nothing, zstd does.
            self._parquet = pq.ParquetWriter(
                self._sink, self._schema, compression="zstd", use_dictionary=False
            )
        offsets = np.cumsum([0, *map(len, self._held)]).astype(np.int32)
        tokens = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(self._held)))
        table = pa.table([tokens, pa.array(self._held_bytes, pa.int32())], schema=self._schema)
        self._parquet.write_table(table, row_group_size=table.num_rows)
        self._row_groups.append(self._held_tokens)
        self._rows += table.num_rows
        self._text_bytes += sum(self._held_bytes)
        self._held, self._held_bytes, self._held_tokens = [], [], 0

    def close(self) -> Shard | None:
        if self._held:
            self._flush()
        if self._parquet is None or self._sink is None:
            return None
        self._parquet.close()
        self._sink.close()
        return Shard(
            self._file,
            self._split,  # type: ignore[arg-type]
            self._rows,
            sum(self._row_groups),
            self._text_bytes,
            self._row_groups,
            self._sink.size,
            self._sink.sha256,
        )


def _run(job: _PartJob) -> Iterable[dict[str, Any]]:
    """What each part's task returned, as they end."""
    items = [{"index": index} for index in range(len(job.parts))]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    return dataset.map_batches(job, batch_size=1, num_cpus=1).iter_rows()


def _refuse_empty(manifest: Manifest, data: DataConfig) -> None:
    for split in ("train", "val"):
        if not manifest.split(split):
            count = sum(shard.rows for shard in manifest.shards)
            what = (
                "the corpus holds no text"
                if not count
                else f"none of its {count} documents fell into the {split} split"
            )
            raise DataError(
                f"data.source={data.source}: {what}; give more text, another "
                f"data.val_fraction (now {data.val_fraction}) or, for plain text, a smaller "
                "data.document_bytes"
            )


def _first_difference(was: dict[str, Any], now: dict[str, Any]) -> tuple[str, str]:
    flat_was, flat_now = _flat(was), _flat(now)
    for key in sorted(flat_was.keys() | flat_now.keys()):
        if flat_was.get(key) != flat_now.get(key):
            return f"{key}={flat_was.get(key)}", f"{flat_now.get(key)}"
    raise ConfigError("the recipes are equal")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
