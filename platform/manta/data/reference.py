"""The log-probabilities of a dataset's answers by the model that a preference tuning starts from.

They are in the dataset's folder, so that no run needs a second model in memory:

    reference-1a2b3c4d5e6f7081-fp32/   by the start of the sha256 of the weights, and the precision
        train-00000.bin, ...               for each shard: what it is, as a line of JSON; digests of
                                           its conversations (`preferences`), uint64; and the log-
                                           probabilities of their last answers in nats, float64
"""

import dataclasses
import json
from typing import Any

import numpy as np

from manta import foreign, layout, storage
from manta.data.manifest import Manifest, Shard
from manta.data.preferences import KEY
from manta.errors import DataError

FORMAT = "manta-reference-1"
ENDING = ".bin"
VALUE = np.dtype("<f8")
MOST_BYTES = 1 << 30  # of a shard's file: 60 million answers


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
    return storage.join(manifest.path, name, shard.file.rpartition(".")[0] + ENDING)


def write(
    manifest: Manifest, name: str, shard: Shard, keys: np.ndarray, log_probabilities: np.ndarray
) -> None:
    """Writes the log-probabilities (N,) of a shard's answers, by their keys (N,).

    Raises:
        DataError: the file cannot be written.
    """
    keys, first = np.unique(keys.astype(KEY), return_index=True)
    body = keys.tobytes() + log_probabilities[first].astype(VALUE).tobytes()
    head = json.dumps(_about(name, shard, body)).encode()
    file = file_of(manifest, name, shard)
    with storage.writing(file, "then run the same command again: it goes on from there"):
        storage.write_bytes(file, head + b"\n" + body)


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
    again = "run the same jobs/finetune.py again: it computes it again"
    if not storage.exists(file):
        raise DataError(f"{file}: missing; {again}")
    head, _, body = foreign.read_bytes(file, DataError, MOST_BYTES).partition(b"\n")
    try:
        about = json.loads(head)
    except (ValueError, RecursionError):
        about = None
    if about != _about(name, shard, body):
        raise DataError(f"{file}: damaged, or made for another shard; delete it, and {again}")
    half = len(body) // 2
    return np.frombuffer(body[:half], dtype=KEY), np.frombuffer(body[half:], dtype=VALUE)


def _about(name: str, shard: Shard, body: bytes) -> dict[str, Any]:
    digest = storage.sha256_of(body)
    return {"format": FORMAT, "name": name, "shard": shard.sha256, "sha256": digest}
