"""The data that a rank reads: its micro batches, and its share of the val tokens."""

import dataclasses
from collections.abc import Callable, Iterator

from manta.data import stream
from manta.data.manifest import Manifest
from manta.train.objectives.next_token import Batch, NextToken
from manta.train.plan import order_of
from manta.train.ranks import Rank
from manta.train.settings import PretrainConfig


@dataclasses.dataclass(frozen=True)
class Data:
    """The data that a rank reads."""

    reader: stream.Reader
    batches: Iterator[Batch]
    val: dict[str, list[Batch]]


def open_data(
    c: PretrainConfig,
    datasets: tuple[Manifest, ...],
    objective: NextToken,
    steps: range,
    rank: Rank,
    say: Callable[[str], None],
) -> Data:
    """Opens this rank's micro batches of these steps, and its share of the val tokens. Reading the
    micro batches starts at once."""
    reader = stream.Reader(
        datasets,
        order_of(c, datasets),
        rank.rank,
        rank.world_size,
        best_fit=c.data.packing == "best_fit",
        skip_corrupt=c.data.on_corrupt == "skip",
    )
    ids = stream.train_batches(
        reader, start=steps.start, stop=steps.stop, micro_batch_size=c.micro_batch, say=say
    )
    batches = objective.batches(ids, at_once=c.grad_accum_steps(c.total_steps))
    val: dict[str, list[Batch]] = {}
    for manifest in datasets:
        rows = stream.val_batches(
            manifest,
            tokens=c.val_tokens(len(datasets)),
            seq_len=c.sequence_length,
            micro_batch_size=c.micro_batch,
            rank=rank.rank,
            world_size=rank.world_size,
        )
        val[manifest.name] = [objective.batch(ids) for ids in rows]
    return Data(reader, batches, val)
