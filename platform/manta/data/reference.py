"""The log-probabilities of a dataset's answers by the model that a preference tuning starts from.

They are in the dataset's folder, so that no run needs a second model in memory:

    reference-1a2b3c4d5e6f7081-fp32/   by the start of the sha256 of the weights, and the precision
        train-00000.parquet            for each shard: a digest of each conversation (`preferences`)
        val-00000.parquet              and the log-probability of its last answer, in nats
"""

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manta import layout, storage
from manta.data.manifest import Manifest, Shard
from manta.data.preferences import KEY
from manta.errors import DataError

FORMAT = "manta-reference-1"
ABOUT = b"manta.reference"
COLUMNS = ("key", "log_probability")


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """The log-probability of the last answer of each conversation."""

    keys: np.ndarray
    """(N,) uint64, ascending: digests of the conversations."""
    log_probabilities: np.ndarray
    """(N,) float64, in nats."""
    where: str = "the reference"

    def of(self, keys: np.ndarray) -> np.ndarray:
        """(M,) float64: the log-probabilities for these keys (M,). Raises DataError if one is
        missing."""
        at = np.searchsorted(self.keys, keys).clip(max=max(len(self.keys) - 1, 0))
        if not len(self.keys) or (self.keys[at] != keys).any():
            raise DataError(
                f"{self.where}: it lacks an answer of the dataset; delete this folder, and run the "
                "same jobs/finetune.py again: it computes it again"
            )
        return self.log_probabilities[at]


def name_of(weights_sha256: str, dtype: str) -> str:
    """The name of the folder with the log-probabilities by these weights, in this precision."""
    return f"{layout.REFERENCE}{weights_sha256[:16]}-{dtype}"


def file_of(manifest: Manifest, name: str, shard: Shard) -> str:
    return storage.join(manifest.path, name, shard.file)


def write(
    manifest: Manifest, name: str, shard: Shard, keys: np.ndarray, log_probabilities: np.ndarray
) -> None:
    """Writes the log-probabilities (N,) of a shard's answers, by their keys (N,).

    Raises:
        DataError: the file cannot be written.
    """
    keys, first = np.unique(keys.astype(KEY), return_index=True)
    values = log_probabilities[first].astype("<f8")
    about = json.dumps(_about(name, shard, keys, values)).encode()
    table = pa.table(dict(zip(COLUMNS, (keys, values), strict=True)))
    data = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({ABOUT: about}), data, compression="zstd")
    file = file_of(manifest, name, shard)
    with storage.writing(file, "the reference is computed from there on when it can be"):
        storage.write_bytes(file, data.getvalue())


def read(manifest: Manifest, name: str) -> Reference:
    """The log-probabilities of all of a dataset's answers.

    Raises:
        DataError: a file is missing or damaged, or is of another shard.
    """
    parts = [_read(manifest, name, shard) for shard in manifest.shards]
    keys, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    keys, first = np.unique(keys, return_index=True)
    return Reference(keys, values[first], storage.join(manifest.path, name))


def missing(manifest: Manifest, name: str) -> list[Shard]:
    """The shards whose log-probabilities have not been written yet."""
    return [s for s in manifest.shards if not storage.exists(file_of(manifest, name, s))]


def _read(manifest: Manifest, name: str, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    file = file_of(manifest, name, shard)
    remedy = "delete it, and run the same jobs/finetune.py again: it computes it again"
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(file)))
        keys, values = (table[column].to_numpy() for column in COLUMNS)
        about = json.loads((table.schema.metadata or {})[ABOUT])
    except (OSError, ValueError, KeyError, pa.ArrowException) as e:
        raise DataError(f"{file}: damaged ({type(e).__name__}); {remedy}") from None
    if about != _about(name, shard, keys, values):
        raise DataError(f"{file}: damaged, or made from another shard; {remedy}")
    return keys, values


def _about(name: str, shard: Shard, keys: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    digest = storage.sha256_of(keys.tobytes() + values.tobytes())
    return {"format": FORMAT, "name": name, "shard": shard.sha256, "sha256": digest}
