"""The log-probabilities of answers before a preference tuning, computed by Ray workers."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from manta import layout, storage
from manta.cluster import capacity, nodes
from manta.data import conversations, reference, shards
from manta.data.manifest import Manifest, Shard
from manta.errors import DataError
from manta.evaluate import farm
from manta.progress import Progress
from manta.train.checkpoints.contents import files_of
from manta.train.resume import check_tokenizer
from manta.train.settings import PretrainConfig

Dtype = Literal["bf16", "fp32"]
ROWS = 8  # of a batch, where micro_batch_size=auto is not decided yet


def refer(c: PretrainConfig, data: Manifest, say: Callable[[str], None]) -> PretrainConfig:
    """The config of a preference tuning with its reference, which is computed if it is not in the
    dataset yet: with the weights of `init.checkpoint`, in the precision of the training. What is
    written already is not computed again.

    Raises:
        MantaError: the checkpoint is damaged or has another tokenizer, a reference that was there
            is gone and cannot be computed again, or there is no room for a worker.
    """
    path = str(c.init.checkpoint)
    dtype: Dtype = c.dtype if c.dtype != "auto" else _chosen(c)
    name = c.dpo.reference
    if name is None:
        name = _name(path, dtype)
    made = dataclasses.replace(c, dtype=dtype, dpo=dataclasses.replace(c.dpo, reference=name))
    lacking = reference.missing(data, name)
    if lacking:
        if not storage.exists(storage.join(path, layout.MANIFEST)) or _name(path, dtype) != name:
            raise DataError(
                f"{storage.join(data.path, name)}: {lacking[0].file} is missing, and {path}, which "
                "it is computed from, is gone or has other weights: restore one of them"
            )
        check_tokenizer(path, data.load_tokenizer())
        _compute(made, path, data, lacking, say)
    return made


def _name(path: str, dtype: str) -> str:
    return reference.name_of(files_of(path)[layout.WEIGHTS].sha256, dtype)


def _chosen(c: PretrainConfig) -> Dtype:
    """The precision that a worker of this run chooses."""
    capacity.require(1, c.cpus_per_worker, c.gpus_per_worker, c.wait_seconds)
    found: Any = farm.chosen_dtype(c.cpus_per_worker, c.gpus_per_worker)
    return found


def _compute(
    c: PretrainConfig, path: str, data: Manifest, wanted: list[Shard], say: Callable[[str], None]
) -> None:
    size, rows = data.recipe["row_tokens"], c.micro_batch_size
    rows = c.micro_batch if rows != "auto" else ROWS
    cpus, gpus = c.cpus_per_worker, c.gpus_per_worker
    capacity.require(c.fewest_workers, cpus, gpus, c.wait_seconds, say)
    nodes.require(None, [storage.join(path, layout.MANIFEST)], bool(gpus), say)
    count = min(c.most_workers, capacity.workers_that_fit(cpus, gpus))
    say(f"computing the reference log-probabilities of {data.name} with {path}")
    total = sum(shard.tokens for shard in wanted) // size
    with (
        farm.workers(count, cpus, gpus, c.threads_per_worker or 0, c.dtype) as running,
        Progress("reference", total, "rows") as progress,
    ):
        pool = running.load(path)
        for shard in wanted:
            found = []
            for keys, values, done in pool("answers", _batches(data, shard, rows)):
                found.append((keys, values))
                progress.advance(done)
            keys, values = map(np.concatenate, zip(*found, strict=True))
            reference.write(data, str(c.dpo.reference), shard, keys, values)


def _batches(data: Manifest, shard: Shard, rows: int) -> Iterator[np.ndarray]:
    """Yields the rows of a shard, (B, T + 1) ids each: as in training, the start token of the next
    row ends a row."""
    start = conversations.rule_of(data).start
    ids = shards.tokens_of(data, shard).reshape(-1, data.recipe["row_tokens"])
    ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=start)
    for first in range(0, len(ids), rows):
        yield ids[first : first + rows]
