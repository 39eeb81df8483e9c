"""Which tokens does global batch k read? Pure arithmetic: no Ray, no I/O.

Every dataset is one endless *line* of tokens: each epoch is every shard once, in an order drawn
from (seed, epoch), and in each shard every block of row groups once, in an order drawn from (seed,
epoch, shard). A *sequence* is a line's next `seq_len` tokens, and the one after them as target.

Position s of the endless list of sequences is in batch k, at slot i, and belongs to one dataset by
the *mix*: a pattern of a thousand positions, so that any thousand hold exactly each one's share.
The n-th position of a dataset takes the n-th sequence of its line, but for a shuffle within a
*window* (some whole batches) and a *lane* (some neighbouring slots). Slots are dealt to workers in
order, so that a worker's lanes are neighbours on the line: it reads about its own share, no more.

So batch k depends on the shards, the seed, `seq_len`, the batch sizes and the mix, and on nothing
else: not on the number of workers, nor on the micro batch. The cost of planning it does not depend
on k.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

# Recorded with each run: another version of this arithmetic would read other tokens.
VERSION = 1
WINDOW_TOKENS = 1 << 24
BLOCK_ROW_GROUPS = 8  # neighbours in the file, so that a block is one read
LANES = 256
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

    shards: (S,) int64, the tokens in each shard. A shard's row groups have `row_group_tokens` each,
        and the last one what is left.
    key: tells datasets apart that are read with the same seed.
    """

    shards: np.ndarray
    row_group_tokens: int
    seed: int
    key: int = 0

    @functools.cached_property
    def total_tokens(self) -> int:
        return int(self.shards.sum())

    def segments(self, start: int, stop: int) -> list[Segment]:
        """What to read, in order, for the line's tokens [start, stop)."""
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
    """The shards in the epoch's order, and where each ends in the epoch."""
    order = permutation(len(line.shards), line.seed, 0, line.key, epoch)
    return order, np.cumsum(line.shards[order])


@functools.lru_cache(maxsize=64)
def _blocks_of(line: Line, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The shard's blocks in the epoch's order, where each ends in the shard so ordered, and the
    tokens in a whole block."""
    tokens, size = int(line.shards[shard]), line.row_group_tokens * BLOCK_ROW_GROUPS
    count = -(-tokens // size)
    blocks = permutation(count, line.seed, 1, line.key, epoch, shard)
    sizes = np.full(count, size, dtype=np.int64)
    sizes[-1] = tokens - (count - 1) * size
    return blocks, np.cumsum(sizes[blocks]), size


@dataclasses.dataclass(frozen=True)
class Phase:
    """From position `start` on, `counts[d]` of each PERIOD positions are dataset d's."""

    start: int
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Batches of one size, from `first_batch` on, whose first position is `first_sequence`."""

    first_batch: int
    first_sequence: int
    sequences_per_batch: int


@dataclasses.dataclass(frozen=True)
class Window:
    """Batches [first_batch, stop_batch), of one size, that are planned and read together."""

    first_batch: int
    stop_batch: int
    first_sequence: int
    sequences_per_batch: int


@dataclasses.dataclass(frozen=True)
class Take:
    """Sequences of a lane: number `first` + i of line `line` goes to row `rows[i]` of what the
    worker reads of the window; -1: to another worker, or to a batch that is not wanted."""

    line: int
    first: int
    rows: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    lines: tuple[Line, ...]
    seed: int
    seq_len: int
    stages: tuple[Stage, ...]
    phases: tuple[Phase, ...]

    @property
    def total_tokens(self) -> int:
        """Tokens in all datasets together."""
        return sum(line.total_tokens for line in self.lines)

    def sequences_before(self, batch: int) -> int:
        return sequences_before(self.stages, batch)

    def sequences_planned(self, batch: int) -> int:
        """The sequences of the windows that are begun before this batch: a window's mix decides
        which of its sequences each of its batches takes."""
        window = self.window_at(batch)
        is_begun = batch > window.first_batch
        return self.sequences_before(window.stop_batch if is_begun else batch)

    def window_at(self, batch: int) -> Window:
        """The window that holds a batch: about WINDOW_TOKENS, or an epoch where that is less. An
        epoch of the first mix: one that comes later moves no window before it."""
        stage = stage_of(self.stages, batch)
        per_batch = stage.sequences_per_batch
        mixed = zip(self.lines, self.phases[0].counts, strict=True)
        epoch = sum(line.total_tokens for line, count in mixed if count)
        size = max(1, min(WINDOW_TOKENS, epoch) // (per_batch * self.seq_len))
        first = batch - (batch - stage.first_batch) % size
        later = [s.first_batch for s in self.stages if s.first_batch > batch]
        stop = min([first + size, *later])
        return Window(first, stop, self.sequences_before(first), per_batch)

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """The windows of batches [start, stop), the first and the last one whole."""
        while start < stop:
            window = self.window_at(start)
            yield window
            start = window.stop_batch

    def takes(
        self, window: Window, rank: int = 0, world_size: int = 1, first_batch: int = 0
    ) -> list[Take]:
        """What worker `rank` of `world_size` reads of a window, lane by lane, along each line.

        Its rows are those of its slots in the window's batches from `first_batch` on, batch by
        batch: row j * share + i is its i-th slot in the j-th of them.
        """
        share, rest = divmod(window.sequences_per_batch, world_size)
        assert rest == 0, "checked with the config: a batch divides over the workers"
        width = lane_width(window.sequences_per_batch)
        own = range(rank * share, (rank + 1) * share)
        lanes = range(own.start // width, -(-own.stop // width))
        batches = window.stop_batch - window.first_batch
        skipped = max(0, first_batch - window.first_batch)
        datasets = self.datasets(window.first_sequence, batches * window.sequences_per_batch)
        datasets = datasets.reshape(batches, window.sequences_per_batch)
        before = self.taken(window.first_sequence)
        found = []
        for index, line in enumerate(self.lines):
            is_ours = datasets == index
            first = before[index] + int(is_ours[:, : lanes.start * width].sum())
            for lane in lanes:
                # In order of batches, then slots: the places of the lane's sequences.
                columns = slice(lane * width, (lane + 1) * width)
                places_batch, places_slot = np.nonzero(is_ours[:, columns])
                count = len(places_batch)
                if not count:
                    continue
                slots = places_slot + columns.start
                rows = (places_batch - skipped) * share + slots - own.start
                is_own = (slots >= own.start) & (slots < own.stop) & (places_batch >= skipped)
                order = permutation(count, self.seed, 2, line.key, window.first_sequence, lane)
                shuffled = np.empty(count, dtype=np.int64)
                shuffled[order] = np.where(is_own, rows, -1)
                found.append(Take(index, first, shuffled))
                first += count
        return found

    def datasets(self, first: int, count: int) -> np.ndarray:
        """(count,) the dataset (an index over the lines) of each position from `first` on."""
        if len(self.lines) == 1:
            return np.zeros(count, dtype=np.uint16)
        positions = np.arange(first, first + count)
        found = np.empty(count, dtype=np.uint16)
        for phase in self.phases:
            later = positions >= phase.start
            pattern = self._pattern(phase)
            found[later] = pattern[(positions[later] - phase.start) % PERIOD]
        return found

    def taken(self, position: int) -> list[int]:
        """How many of the positions before this one are each dataset's."""
        totals = np.zeros(len(self.lines), dtype=np.int64)
        stops = [*(phase.start for phase in self.phases[1:]), None]
        for phase, stop in zip(self.phases, stops, strict=True):
            count = max(0, (position if stop is None else min(position, stop)) - phase.start)
            periods, rest = divmod(count, PERIOD)
            part = np.bincount(self._pattern(phase)[:rest], minlength=len(self.lines))
            totals += np.asarray(phase.counts) * periods + part
        return totals.tolist()

    def _pattern(self, phase: Phase) -> np.ndarray:
        return mix_pattern(phase.counts, tuple(line.key for line in self.lines))


def lane_width(sequences_per_batch: int) -> int:
    """Slots in a lane: so many that there are about LANES lanes, all of one width."""
    lanes = min(sequences_per_batch, LANES)
    while sequences_per_batch % lanes:
        lanes += 1
    return sequences_per_batch // lanes


def make_stages(ramp: Mapping[int, int], seq_len: int, tokens_per_batch: int) -> tuple[Stage, ...]:
    """The stages of a batch-size ramp: {tokens_per_batch: trained on until so many tokens}, and
    `tokens_per_batch` after the last one. All sizes divide by `seq_len`."""
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
    """The sequences in the batches before this one."""
    stage = stage_of(stages, batch)
    return stage.first_sequence + (batch - stage.first_batch) * stage.sequences_per_batch


def batches_for(stages: Sequence[Stage], tokens: int, seq_len: int) -> int:
    """The least number of batches that hold `tokens` tokens."""
    sequences = -(-tokens // seq_len)
    stage = next((s for s in reversed(stages) if s.first_sequence < sequences), stages[0])
    return stage.first_batch + -(-(sequences - stage.first_sequence) // stage.sequences_per_batch)


def thousandths(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as shares of PERIOD that add up to it, each within one of exact (the largest
    remainders are rounded up)."""
    parts = np.asarray(weights, dtype=np.float64) / max(weights)  # a sum of them is finite
    exact = parts / parts.sum() * PERIOD
    counts = np.floor(exact).astype(np.int64)
    last = np.argsort(counts - exact, kind="stable")[: PERIOD - int(counts.sum())]
    counts[last] += 1
    return tuple(counts.tolist())


@functools.lru_cache(maxsize=64)
def mix_pattern(counts: tuple[int, ...], keys: tuple[int, ...]) -> np.ndarray:
    """(PERIOD,) which dataset each position is, `counts[d]` of them d's, spread evenly.

    The j-th position of a dataset with share w lies between floor((j - 1) / w) and ceil(j / w), so
    that no start of the pattern is a whole position off; the one with the earliest end goes first,
    which keeps all of them (Baruah et al. 1996, "Proportionate progress", for one resource). Of
    two with the same end it is the one with the smaller key: their order in `counts` is only how
    the mix was written.
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


def permutation(count: int, *key: int) -> np.ndarray:
    """(count,) a permutation drawn from the key, the same with any version of any library."""
    state = fold(*key)
    return np.argsort(mix_bits(np.arange(count, dtype=np.uint64) + state), kind="stable")


def fold(*key: int) -> np.uint64:
    """One number from several."""
    state = np.zeros(1, dtype=np.uint64)
    for number in key:
        word = np.array([number % 2**64], dtype=np.uint64)
        state = mix_bits((state + np.uint64(0x9E3779B97F4A7C15)) ^ mix_bits(word))
    return state[0]


def mix_bits(x: np.ndarray) -> np.ndarray:
    """A permutation of the uint64s that looks random: the finalizer of SplitMix64 (Steele, Lea and
    Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
