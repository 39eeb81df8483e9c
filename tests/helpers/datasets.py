"""Datasets of some shards, written without preparing them, and the errors of reading one."""

import dataclasses
import io
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from manta import layout, storage
from manta.data.manifest import Manifest, Shard
from manta.data.shards import TAIL_BYTES, ShardReader, ShardWriter
from manta.errors import DataError
from manta.text import tokenizer

EOT = 0
VOCAB_SIZE = 60_000
GROUP = 32


def random_ids(seed: int, count: int) -> np.ndarray:
    """Ids that do not compress, so shards with equally many tokens often have the same size."""
    ids = np.random.default_rng(seed).integers(1, VOCAB_SIZE, count, dtype=np.uint16)
    ids[16::17] = EOT
    ids[-1] = EOT
    return ids


def write_shard(
    folder: Path, file: str, tokens: np.ndarray, row_group_tokens: int = GROUP, split: str = "train"
) -> Shard:
    writer = ShardWriter(str(folder / file), tokens.dtype, row_group_tokens)
    writer.write(tokens)
    documents, most = int((tokens == EOT).sum()), int(tokens.max())
    return Shard(file, split, documents, len(tokens), 2 * len(tokens), most, *writer.close())  # type: ignore[arg-type]


def write_dataset(
    folder: Path,
    train: Sequence[np.ndarray],
    val: Sequence[np.ndarray],
    row_group_tokens: int = GROUP,
) -> Manifest:
    """Writes a dataset of these shards, with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer.train(["some text"], 260)
    storage.write_bytes(str(folder / layout.ENCODING), made.serialized)
    found = [
        write_shard(folder, f"{split}-{i:05d}.parquet", tokens, row_group_tokens, split)
        for split, pieces in (("train", train), ("val", val))
        for i, tokens in enumerate(pieces)
    ]
    recipe = {"source": {"location": "/ü", "subset": None}, "val_fraction": 0.05}
    manifest = Manifest(
        str(folder), recipe, made.name, made.sha256, VOCAB_SIZE, EOT, str(train[0].dtype),  # type: ignore[arg-type]
        row_group_tokens, {"empty": 1}, {"documents": [1, 2], "tokens": [1, 5]}, tuple(found),
    )  # fmt: skip
    manifest.save()
    return manifest


@dataclasses.dataclass(frozen=True)
class Data:
    manifest: Manifest
    tokens: dict[str, np.ndarray]

    @property
    def folder(self) -> Path:
        return Path(self.manifest.path)

    def path(self, file: str) -> Path:
        return self.folder / file

    def shard(self, file: str) -> Shard:
        return next(shard for shard in self.manifest.shards if shard.file == file)

    def open(self, file: str) -> ShardReader:
        """A new reader of the shard, whatever is open already."""
        return ShardReader(self.manifest.path, self.shard(file), self.manifest.dtype, GROUP)

    def read(self, file: str) -> np.ndarray:
        return self.open(file).read(0, self.shard(file).tokens)

    def other_shard(self, file: str) -> bytes:
        """The bytes of a well-formed shard of other tokens, with the same size."""
        shard = self.shard(file)
        with tempfile.TemporaryDirectory() as folder:
            for seed in itertools.count(100):
                tokens = random_ids(seed, shard.tokens)
                if write_shard(Path(folder), "other.parquet", tokens).size == shard.size:
                    break
            return (Path(folder) / "other.parquet").read_bytes()


# The first two have the same number of bytes: what tells them apart is inside.
A, B, C, VAL = (
    f"{name}.parquet" for name in ("train-00000", "train-00001", "train-00002", "val-00000")
)
SIZES = {A: 3 * GROUP, B: 3 * GROUP, C: 4 * GROUP + 5, VAL: GROUP + 1}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def chunks(shard: Path | io.BytesIO) -> list[tuple[int, int]]:
    """The ranges [start, stop) of each row group's bytes."""
    metadata = pq.read_metadata(shard)
    columns = [metadata.row_group(i).column(0) for i in range(metadata.num_row_groups)]
    return [(c.data_page_offset, c.data_page_offset + c.total_compressed_size) for c in columns]


def footer_start(content: bytes) -> int:
    return len(content) - TAIL_BYTES - int.from_bytes(content[-TAIL_BYTES:-4], "little")


def refusal(call: Callable[[], Any]) -> str:
    """The one line of the DataError that the call raises."""
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
