"""The order of training: which tokens global batch k reads. Pure arithmetic: no Ray, no I/O.

Every dataset is one endless *line* of tokens. Each epoch of a line has every shard once, in an
order drawn from (seed, epoch), and within each shard every block of row groups once, in an order
drawn from (seed, epoch, shard). A *sequence* is the next `seq_len` tokens of a line, plus the token
after them as the last target.

Position s in the endless list of sequences is in batch k, at slot i. The *mix* decides which
dataset it belongs to: a pattern of a thousand positions, so that any thousand positions contain
exactly the share of each dataset. The n-th position of a dataset takes the n-th sequence of its
line, except for a shuffle within a *window* (one or more whole batches) and a *lane* (one or more
neighbouring slots). Workers get slots in order, so the lanes of a worker are neighbours on the
line, and the worker reads about its own share and no more.

So batch k depends on the shards, the seed, `seq_len`, the batch sizes and the mix, and on nothing
else: neither on the number of workers nor on the micro batch. The cost of planning a batch does not
depend on k.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

WINDOW_TOKENS = 1 << 24
# A window has this many batches even if they are large, as long as it has at most WIDEST times as
# many tokens: a worker's share of a batch may be less than the row group that it has to read.
WINDOW_BATCHES = 8
WIDEST = 4
BLOCK_ROW_GROUPS = 8  # neighbours in the file, so that a block is one read
LANES = 256
# A batch of more than LANES times this many tokens has more lanes. A worker reads whole lanes, so
# with a fixed number of them each of very many workers would read what others need.
LANE_TOKENS = 1 << 12
PERIOD = 1000


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of shard number `shard`, all in one block."""

    shard: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """One dataset's train split as an endless line of tokens.

    shards: (S,) int64, the tokens in each shard. Each row group of a shard has `row_group_tokens`
        tokens, and the last one has the rest.
    key: distinguishes datasets that are read with the same seed.
    """

    shards: np.ndarray
    row_group_tokens: int
    seed: int
    key: int = 0

    @functools.cached_property
    def total_tokens(self) -> int:
        return int(self.shards.sum())

    def segments(self, start: int, stop: int) -> list[Segment]:
        """The segments to read, in order, for the line's tokens [start, stop)."""
        found = []
        while start < stop:
            epoch, offset = divmod(start, self.total_tokens)
            shards, ends = _shards_of(self, epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            shard = int(shards[place])
            inside = offset - int(ends[place]) + int(self.shards[shard])
            blocks, block_ends, size = _blocks_of(self, epoch, shard)
            at = int(np.searchsorted(block_ends, inside, side="right"))
            first = int(blocks[at]) * size
            last = min(first + size, int(self.shards[shard]))
            first = last - (int(block_ends[at]) - inside)
            last = min(last, first + stop - start)
            found.append(Segment(shard, first, last))
            start += last - first
        return found


@functools.lru_cache(maxsize=8)
def _shards_of(line: Line, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The shards in the epoch's order, and the position in the epoch where each one ends."""
    order = permutation(len(line.shards), line.seed, 0, line.key, epoch)
    return order, np.cumsum(line.shards[order])


@functools.lru_cache(maxsize=64)
def _blocks_of(line: Line, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Orders the blocks of a shard for an epoch.

    Returns (blocks in the epoch's order, where each one ends in the shard in this order, tokens in
    a whole block).
    """
    tokens, size = int(line.shards[shard]), line.row_group_tokens * BLOCK_ROW_GROUPS
    count = -(-tokens // size)
    blocks = permutation(count, line.seed, 1, line.key, epoch, shard)
    sizes = np.full(count, size, dtype=np.int64)
    sizes[-1] = tokens - (count - 1) * size
    return blocks, np.cumsum(sizes[blocks]), size


@dataclasses.dataclass(frozen=True)
class Phase:
    """A mix: from position `start` on, dataset d gets `counts[d]` of each PERIOD positions."""

    start: int
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Batches of one size, from `first_batch` on; their first position is `first_sequence`."""

    first_batch: int
    first_sequence: int
    sequences_per_batch: int


@dataclasses.dataclass(frozen=True)
class Window:
    """Batches [first_batch, stop_batch), all of one size, that are planned and read together."""

    first_batch: int
    stop_batch: int
    first_sequence: int
    sequences_per_batch: int


@dataclasses.dataclass(frozen=True)
class Take:
    """The sequences of a lane, and where a worker puts them.

    Sequence number `first` + i of line `line` goes to row `rows[i]` of what the worker reads of the
    window. A row of -1 is for another worker, or for a batch that is not needed.
    """

    line: int
    first: int
    rows: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """The order in which a run trains on its datasets, one line for each of them."""

    lines: tuple[Line, ...]
    seed: int
    seq_len: int
    stages: tuple[Stage, ...]
    phases: tuple[Phase, ...]

    @property
    def total_tokens(self) -> int:
        """The number of tokens in all datasets together."""
        return sum(line.total_tokens for line in self.lines)

    def sequences_before(self, batch: int) -> int:
        return sequences_before(self.stages, batch)

    def sequences_planned(self, batch: int) -> int:
        """The number of sequences in all windows that have begun before this batch.

        Such a window counts in full, as its mix decides which of its sequences each of its batches
        takes.
        """
        window = self.window_at(batch)
        is_begun = batch > window.first_batch
        return self.sequences_before(window.stop_batch if is_begun else batch)

    def window_at(self, batch: int) -> Window:
        """The window that contains a batch: about WINDOW_TOKENS (more if batches are large), or an
        epoch if that is less.

        The epoch is that of the first mix, so that a later mix moves no window before it.
        """
        stage = stage_of(self.stages, batch)
        per_batch = stage.sequences_per_batch
        mixed = zip(self.lines, self.phases[0].counts, strict=True)
        epoch = sum(line.total_tokens for line, count in mixed if count)
        tokens = per_batch * self.seq_len
        wanted = max(WINDOW_TOKENS, min(WINDOW_BATCHES * tokens, WIDEST * WINDOW_TOKENS))
        size = max(1, min(wanted, epoch) // tokens)
        first = batch - (batch - stage.first_batch) % size
        later = [s.first_batch for s in self.stages if s.first_batch > batch]
        stop = min([first + size, *later])
        return Window(first, stop, self.sequences_before(first), per_batch)

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """Yields the windows of batches [start, stop); the first and the last one are whole."""
        while start < stop:
            window = self.window_at(start)
            yield window
            start = window.stop_batch

    def takes(
        self, window: Window, rank: int = 0, world_size: int = 1, first_batch: int = 0
    ) -> list[Take]:
        """What worker `rank` of `world_size` reads of a window, lane by lane, along each line.

        The worker's rows are its slots in the window's batches from `first_batch` on, batch by
        batch: row j * share + i is its i-th slot in the j-th of these batches.
        """
        per_batch = window.sequences_per_batch
        share, rest = divmod(per_batch, world_size)
        assert rest == 0, "checked with the config: a batch divides over the workers"
        width = lane_width(per_batch, self.seq_len)
        own = range(rank * share, (rank + 1) * share)
        lanes = range(own.start // width, -(-own.stop // width))
        skipped = max(0, first_batch - window.first_batch)
        # Only what this worker reads is laid out, so that planning costs it no more if the batch
        # grows with the number of workers.
        batches = np.arange(window.stop_batch - window.first_batch)
        starts = window.first_sequence + batches * per_batch
        columns = np.arange(lanes.start * width, lanes.stop * width)
        datasets = self.datasets(starts[:, None] + columns)
        in_earlier_lanes = self.taken(starts + lanes.start * width) - self.taken(starts)
        before = self.taken(starts[:1])[0] + in_earlier_lanes.sum(axis=0)
        found = []
        for index, line in enumerate(self.lines):
            is_ours = datasets == index
            first = int(before[index])
            for lane in lanes:
                # The places of the lane's sequences, ordered by batch and then by slot.
                inside = (lane - lanes.start) * width
                places_batch, places_slot = np.nonzero(is_ours[:, inside : inside + width])
                count = len(places_batch)
                if not count:
                    continue
                slots = places_slot + lane * width
                rows = (places_batch - skipped) * share + slots - own.start
                is_own = (slots >= own.start) & (slots < own.stop) & (places_batch >= skipped)
                order = permutation(count, self.seed, 2, line.key, window.first_sequence, lane)
                shuffled = np.empty(count, dtype=np.int64)
                shuffled[order] = np.where(is_own, rows, -1)
                found.append(Take(index, first, shuffled))
                first += count
        return found

    def datasets(self, positions: np.ndarray) -> np.ndarray:
        """The dataset (index into `lines`) at each of these positions, in their shape."""
        found = np.zeros(positions.shape, dtype=np.uint16)
        if len(self.lines) > 1:
            for phase in self.phases:
                later = positions >= phase.start
                found[later] = self._pattern(phase)[(positions[later] - phase.start) % PERIOD]
        return found

    def taken(self, positions: np.ndarray) -> np.ndarray:
        """The number of positions before each of these (N,) that belong to each dataset: (N,
        lines)."""
        totals = np.zeros((len(positions), len(self.lines)), dtype=np.int64)
        stops = [*(phase.start for phase in self.phases[1:]), None]
        for phase, stop in zip(self.phases, stops, strict=True):
            until = positions if stop is None else np.minimum(positions, stop)
            periods, rest = np.divmod(np.maximum(0, until - phase.start), PERIOD)
            begun = _counts_within(phase.counts, tuple(line.key for line in self.lines))
            totals += np.asarray(phase.counts) * periods[:, None] + begun[rest]
        return totals

    def _pattern(self, phase: Phase) -> np.ndarray:
        return mix_pattern(phase.counts, tuple(line.key for line in self.lines))


def lane_width(sequences_per_batch: int, seq_len: int) -> int:
    """The number of slots in a lane: a batch has about `_lanes` lanes, all of one width."""
    lanes = min(sequences_per_batch, _lanes(sequences_per_batch * seq_len))
    while sequences_per_batch % lanes:
        lanes += 1
    return sequences_per_batch // lanes


def _lanes(batch_tokens: int) -> int:
    return max(LANES, batch_tokens // LANE_TOKENS)


def version(stages: Sequence[Stage], seq_len: int) -> int:
    """The version of this arithmetic for these batches. It is recorded with each run, because
    another one would read other tokens. (Version 1 had the lanes and windows of small batches for
    large ones, too.)"""
    largest = max(stage.sequences_per_batch for stage in stages) * seq_len
    return 1 if _lanes(largest) == LANES else 2


def make_stages(ramp: Mapping[int, int], seq_len: int, tokens_per_batch: int) -> tuple[Stage, ...]:
    """The stages of a batch-size ramp.

    Args:
        ramp: {tokens per batch: trained tokens, in total, at which batches of this size end}.
        seq_len: divides all batch sizes.
        tokens_per_batch: the batch size after the last stage of the ramp.
    """
    stages: list[Stage] = []
    batch = sequence = 0
    for size, until in sorted(ramp.items(), key=lambda item: item[::-1]):
        count = -(-(until - sequence * seq_len) // size)
        if count > 0:
            stages.append(Stage(batch, sequence, size // seq_len))
            batch, sequence = batch + count, sequence + count * (size // seq_len)
    return (*stages, Stage(batch, sequence, tokens_per_batch // seq_len))


def stage_of(stages: Sequence[Stage], batch: int) -> Stage:
    return next(s for s in reversed(stages) if s.first_batch <= batch)


def sequences_before(stages: Sequence[Stage], batch: int) -> int:
    """The number of sequences in the batches before this one."""
    stage = stage_of(stages, batch)
    return stage.first_sequence + (batch - stage.first_batch) * stage.sequences_per_batch


def batches_for(stages: Sequence[Stage], tokens: int, seq_len: int) -> int:
    """The smallest number of batches that contain at least `tokens` tokens."""
    sequences = -(-tokens // seq_len)
    stage = next((s for s in reversed(stages) if s.first_sequence < sequences), stages[0])
    return stage.first_batch + -(-(sequences - stage.first_sequence) // stage.sequences_per_batch)


def thousandths(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole shares that add up to PERIOD.

    Each share is within one of the exact value; the largest remainders are rounded up.
    """
    parts = np.asarray(weights, dtype=np.float64) / max(weights)  # so that their sum is finite
    exact = parts / parts.sum() * PERIOD
    counts = np.floor(exact).astype(np.int64)
    last = np.argsort(counts - exact, kind="stable")[: PERIOD - int(counts.sum())]
    counts[last] += 1
    return tuple(counts.tolist())


@functools.lru_cache(maxsize=64)
def mix_pattern(counts: tuple[int, ...], keys: tuple[int, ...]) -> np.ndarray:
    """The dataset of each position, (PERIOD,): `counts[d]` positions for dataset d, spread evenly.

    The j-th position of a dataset with share w lies between floor((j - 1) / w) and ceil(j / w), so
    no beginning of the pattern is off by a whole position. The dataset with the earliest end goes
    first, which meets all these bounds (Baruah et al. 1996, "Proportionate progress", for one
    resource). Of two with the same end, the one with the smaller key goes first, because their
    order in `counts` is only the order in which the mix was written.
    """
    given = [0] * len(counts)
    pattern = np.empty(PERIOD, dtype=np.uint16)
    for position in range(PERIOD):
        released = [
            (-(-(given[d] + 1) * PERIOD // counts[d]), keys[d], d)
            for d in range(len(counts))
            if counts[d] and given[d] < counts[d] and given[d] * PERIOD // counts[d] <= position
        ]
        *_, chosen = min(released)
        given[chosen] += 1
        pattern[position] = chosen
    pattern.flags.writeable = False
    return pattern


@functools.lru_cache(maxsize=64)
def _counts_within(counts: tuple[int, ...], keys: tuple[int, ...]) -> np.ndarray:
    """How many of the first p positions of a pattern belong to each dataset: (PERIOD + 1, D)."""
    is_there = mix_pattern(counts, keys)[:, None] == np.arange(len(counts))
    return np.concatenate([np.zeros((1, len(counts)), np.int64), np.cumsum(is_there, axis=0)])


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation (count,) drawn from the key, the same with any version of any library."""
    state = fold(*key)
    return np.argsort(mix_bits(np.arange(count, dtype=np.uint64) + state), kind="stable")


def fold(*key: int) -> np.uint64:
    """Hashes several numbers into one."""
    state = np.zeros(1, dtype=np.uint64)
    for number in key:
        word = np.array([number % 2**64], dtype=np.uint64)
        state = mix_bits((state + np.uint64(0x9E3779B97F4A7C15)) ^ mix_bits(word))
    return state[0]


def mix_bits(x: np.ndarray) -> np.ndarray:
    """A permutation of the uint64 numbers that looks random.

    This is the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
