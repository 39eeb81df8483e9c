"""Which tokens does step k read? Pure arithmetic: no Ray, no I/O.

The train split is one endless line of tokens: each epoch is every row group once, in a new order
drawn from (seed, epoch). Sequence s is the `seq_len + 1` tokens from s * seq_len on (inputs and
their targets; neighbours share one token). Sequences are shuffled within *windows*, each a whole
number of global batches, in an order drawn from (seed, window). So global batch k depends on the
row groups, the seed, `seq_len` and `tokens_per_batch`, and on nothing else: not on the number of
workers, nor on the micro batch. No token is skipped or repeated within an epoch.
"""

import dataclasses
import functools

import numpy as np

from manta.errors import DataError

WINDOW_TOKENS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of row group `row_group` (an index over the whole split)."""

    row_group: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a split with these row groups (tokens in each).

    Raises:
        DataError: the split holds less than one global batch.
    """

    row_groups: tuple[int, ...]
    seed: int
    seq_len: int
    sequences_per_batch: int

    def __post_init__(self) -> None:
        if self.total_tokens < self.batch_tokens + 1:
            raise DataError(
                f"the train split has {self.total_tokens:,} tokens, fewer than one batch of "
                f"{self.batch_tokens:,} (tokens_per_batch); give more text, or a smaller "
                "tokens_per_batch"
            )

    @property
    def total_tokens(self) -> int:
        return sum(self.row_groups)

    @property
    def batch_tokens(self) -> int:
        return self.seq_len * self.sequences_per_batch

    @property
    def window_batches(self) -> int:
        """Global batches in a window: about WINDOW_TOKENS, or an epoch where that is less."""
        return max(1, min(WINDOW_TOKENS, self.total_tokens) // self.batch_tokens)

    def window_of(self, batch: int) -> tuple[int, int]:
        """The window of global batch `batch`, and the batch's place in it."""
        return divmod(batch, self.window_batches)

    def segments(self, window: int) -> list[Segment]:
        """What to read, in order, for a window: its tokens, and one more for the last target."""
        size = self.window_batches * self.batch_tokens
        position, end = window * size, (window + 1) * size + 1
        found = []
        while position < end:
            epoch, offset = divmod(position, self.total_tokens)
            order, ends = self._epoch(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            row_group = int(order[place])
            start = offset - int(ends[place]) + self.row_groups[row_group]
            stop = min(self.row_groups[row_group], start + end - position)
            found.append(Segment(row_group, start, stop))
            position += stop - start
        return found

    def sequences(self, window: int, first_batch: int, rank: int, world_size: int) -> np.ndarray:
        """(N,) places, within the window, of the sequences that worker `rank` of `world_size`
        trains on, in order, from the window's batch `first_batch` to its last."""
        share, rest = divmod(self.sequences_per_batch, world_size)
        assert rest == 0, "checked with the config: sequences_per_batch divides over the workers"
        count = self.window_batches * self.sequences_per_batch
        shuffled = np.random.default_rng((self.seed, 1, window)).permutation(count)
        batches = shuffled.reshape(self.window_batches, world_size, share)
        return batches[first_batch:, rank].reshape(-1)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return _epoch_order(self.row_groups, self.seed, epoch)


@functools.lru_cache(maxsize=4)
def _epoch_order(
    row_groups: tuple[int, ...], seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The row groups in the epoch's order, and where each ends on the epoch's line of tokens."""
    order = np.random.default_rng((seed, 0, epoch)).permutation(len(row_groups))
    return order, np.cumsum(np.asarray(row_groups, dtype=np.int64)[order])
