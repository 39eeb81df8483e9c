"""The batch: which requests are in it, what the model reads of each in a step, and whose caches
have to make room."""

import collections
import dataclasses

import torch
from torch import Tensor

from manta.model.activations import Dtype
from manta.model.cache import Cache, KVCache, StateCache
from manta.model.gpt import LanguageModel
from manta.model.memory import cache_bytes
from manta.model.reader import common
from manta.model.together import read
from manta.serve.engine.choice import choose
from manta.serve.engine.prefixes import Ids, Prefixes
from manta.serve.engine.row import Row

# Tokens that a text may grow by before its cache has to be moved into a larger one.
GROWTH = 64
# A request waits for a step for another one that reads the same beginning, if it spares so many
# tokens.
SHARED = 16


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the engine does now, and what it has done since it was made."""

    running: int = 0
    """Requests whose prompts are being read or whose answers are being written."""
    waiting: int = 0
    """Requests that have come, for which there is no place yet."""
    requests: int = 0
    """Requests whose prompts were read."""
    hits: int = 0
    """The number of them of which at least one token was in the cache."""
    generated: int = 0
    """Tokens of answers."""
    prefilled: int = 0
    """Tokens of prompts that were computed."""
    cached: int = 0
    """Tokens of prompts that were in the cache, and were not computed."""
    cache_bytes: int = 0
    """Bytes of caches in use, those of running requests and those that are kept for later."""
    cache_limit: int = 0
    """The most bytes of caches."""
    evicted: int = 0
    """Beginnings of texts that were forgotten to make room."""
    put_back: int = 0
    """Running requests that had to wait again, because others needed their room."""


class Batch:
    """Requests that wait, and those whose next tokens the model computes together.

    Prompts are read in the order in which they came, in chunks that end at multiples of `chunk`
    tokens: where they end depends on nothing else, and so neither do the last bits of a result.
    """

    def __init__(
        self,
        model: LanguageModel,
        dtype: Dtype,
        vocab_size: int,
        *,
        limit: int,
        most_running: int,
        chunk: int,
    ):
        self._model, self._dtype, self._vocab_size = model, dtype, vocab_size
        self._limit, self._most, self._chunk = limit, most_running, chunk
        self.waiting: collections.deque[Row] = collections.deque()
        self.running: list[Row] = []
        self.prefixes = Prefixes()
        self._counted = Counts(cache_limit=limit)

    @property
    def context_length(self) -> int:
        return self._model.config.context_length

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def used(self) -> int:
        """Bytes of all caches."""
        return self.prefixes.nbytes + sum(self._held(row) for row in self.running)

    def counts(self) -> Counts:
        return dataclasses.replace(
            self._counted,
            running=sum(not row.is_told for row in self.running),
            waiting=len(self.waiting),
            cache_bytes=self.used,
        )

    def add(self, row: Row) -> None:
        """Lets a request wait for its turn, or fails it if it can never have one."""
        if (problem := self._problem(row)) is None:
            self.waiting.append(row)
        else:
            row.fail(problem)

    def _problem(self, row: Row) -> str | None:
        """Why a request cannot be answered; None if it can. An id that the model does not have
        would end a GPU's work for all requests."""
        asked, c = row.request, self._model.config
        if not 0 < len(asked.prompt) <= c.context_length:
            return (
                f"the prompt has {len(asked.prompt):,} tokens: it should have 1 to "
                f"{c.context_length:,}, the model's context"
            )
        for id in (*asked.prompt, *asked.logit_bias):
            if not 0 <= id < self._vocab_size:
                return f"{id} is not the id of a token: they are 0 to {self._vocab_size - 1:,}"
        need = self._bytes(row, row.longest)
        if need > self._limit:
            return (
                f"the prompt of {len(asked.prompt):,} tokens and {asked.max_tokens:,} new ones "
                f"need {need / 1e6:,.1f} MB of cache, and all of it is {self._limit / 1e6:,.1f} "
                "MB: ask for fewer tokens, or give the server more memory"
            )
        return None

    def step(self) -> None:
        """Reads some tokens of each running request, and so gives a token to each whose prompt is
        read."""
        for row in [row for row in self.running if row.handle.is_cancelled]:
            self._retire(row)
        for row in [row for row in self.waiting if row.handle.is_cancelled]:
            self.waiting.remove(row)
            row.cancelled()
        if parts := self._parts():
            wanted = [self._wanted(row, count) for row, count in parts]
            self._use(self._read(parts, wanted))
        for row in [row for row in self.running if row.is_told and row.pending <= 0]:
            self._retire(row)

    def _parts(self) -> list[tuple[Row, int]]:
        """The rows of the next step, and how many tokens of each are read."""
        parts: list[tuple[Row, int]] = []
        room = self._chunk
        for row in list(self.running):
            if row.cache is None:  # put back by one before it
                continue
            count = self._next(row)
            if row.pending > 1 and parts and count > room:
                continue
            if self._grow(row, row.length + count):
                parts.append((row, count))
                room -= count if row.pending > 1 else 0
        parts = [(row, count) for row, count in parts if row.cache is not None]
        while self.waiting and len(self.running) < self._most and room > 0:
            row = self.waiting[0]
            if any(self._shares(row, other, count) for other, count in parts):
                break
            try:
                is_admitted = self._admit(row)
            except Exception as e:
                self.waiting.popleft().fail(why(e))
                continue
            if not is_admitted:
                break
            self.running.append(self.waiting.popleft())
            count = self._next(row)
            if parts and count > room:
                break
            parts.append((row, count))
            room -= count
        return parts

    def _next(self, row: Row) -> int:
        """How many tokens of a row are read in a step."""
        return min(row.pending, self._chunk - row.length % self._chunk)

    def _wanted(self, row: Row, count: int) -> int:
        """How many of the last of these tokens' logits are needed."""
        if row.scores:
            return count
        return int(count == row.pending and not row.is_told)

    def _read(
        self, parts: list[tuple[Row, int]], wanted: list[int]
    ) -> list[tuple[tuple[Row, int], Tensor]]:
        """Reads all parts at once, or, if that fails, one by one, so that one fails alone."""
        caches, new = [], []
        for row, count in parts:
            assert row.cache is not None
            row.remember()
            caches.append(row.cache)
            new.append(row.ids[row.length : row.length + count])
        try:
            logits = read(self._model, caches, new, wanted)
        except Exception as e:
            if len(parts) == 1:
                self._fail(parts[0][0], e)
                return []
            alone = [self._read([p], [n]) for p, n in zip(parts, wanted, strict=True)]
            return [found for some in alone for found in some]
        return list(zip(parts, logits.split(wanted), strict=True))

    def _use(self, parts: list[tuple[tuple[Row, int], Tensor]]) -> None:
        """Gives each row what follows from the (n, V) logits after its tokens."""
        ready: list[tuple[Row, Tensor]] = []
        for (row, count), logits in parts:
            prompt = len(row.request.prompt)
            before = min(prompt, row.length - count)
            self._count(prefilled=min(prompt, row.length) - before)
            try:
                if row.scores:
                    row.score(before, logits)
            except Exception as e:
                self._fail(row, e)
                continue
            if row.pending or row.is_told:
                continue
            if row.started():
                self._count(requests=1, hits=int(row.cached > 0), cached=row.cached)
            if len(row.ids) == row.longest:  # no token is wanted
                row.finish("length")
            else:
                ready.append((row, logits[-1:]))
        if ready:
            self._choose(ready)

    def _choose(self, ready: list[tuple[Row, Tensor]]) -> None:
        """Gives each row its next token; or, if that fails, one by one, so that one fails alone."""
        rows = [row for row, _ in ready]
        try:
            tokens = choose(rows, torch.cat([logits for _, logits in ready]), self._vocab_size)
        except Exception as e:
            if len(ready) == 1:
                self._fail(rows[0], e)
                return
            for one in ready:
                self._choose([one])
            return
        self._count(generated=len(tokens))
        for row, token in zip(rows, tokens, strict=True):
            try:
                row.take(token)
            except Exception as e:
                self._fail(row, e)

    def _shares(self, row: Row, other: Row, count: int) -> bool:
        """Whether a row that waits begins as another one, and finds more of it in the cache once
        `count` more tokens of that one are read, in this step."""
        if row.scores or (count == 1 and not other.is_told):
            return False
        soon = common(row.ids, other.ids[: other.length + count])
        if isinstance(other.cache, StateCache) and soon < other.length + count:
            return False
        # The next turn may come before the last token of the answer was read.
        return soon >= self._source(row)[0] + (1 if other.is_told else SHARED)

    def _source(self, row: Row) -> tuple[int, Ids | None, Cache | None]:
        """The cache that spares most of reading a row: how many tokens, the idle text that it is
        of, if it is idle, and itself."""
        if row.scores:  # all logits are wanted, and caches have none
            return 0, None, None
        found = self.prefixes.find(row.ids)
        best: tuple[int, Ids | None, Cache | None] = (0, None, None)
        if found is not None:
            best = (found[1], found[0], self.prefixes.look(found[0]))
        for other in self.running:
            if isinstance(other.cache, KVCache):
                length = common(other.ids[: other.length], row.ids)
                if min(length, len(row.ids) - 1) > best[0]:
                    best = (min(length, len(row.ids) - 1), None, other.cache)
        return best

    def _admit(self, row: Row) -> bool:
        """Gives a row a cache with what others have of its beginning; returns whether there is room
        for it."""
        length, text, source = self._source(row)
        least = row.longest if row.must_fit else min(row.longest, len(row.ids) + GROWTH)
        goes_on = None  # the text of which the row has all, and that is not needed besides it
        if text is not None and length == len(text) and isinstance(source, KVCache):
            goes_on = text
            if source.capacity >= least:
                row.admit(self.prefixes.take(text), length)
                return True
        # Half of all room is given out freely, as a cache that need not grow is never copied.
        roomy = (self.context_length, min(self.context_length, len(row.ids) * 3 // 2))
        free = self._limit // 2 - self.used
        fitting = [n for n in roomy if n >= least and self._bytes(row, n) <= free]
        capacity = fitting[0] if fitting else least
        need = self._bytes(row, capacity)
        if not self._make_room(need, text):
            if text is None or not self._make_room(need):
                return False
            source = goes_on = None
        if source is None:
            row.admit(self._model.new_cache(1, capacity), 0)
        else:
            row.admit(source.copied(length, capacity), length)
        if goes_on is not None:
            self.prefixes.take(goes_on)
        return True

    def _grow(self, row: Row, length: int) -> bool:
        """Sees to it that a row's cache has room for `length` tokens; returns whether it has. The
        requests that came last are put back for it."""
        cache = row.cache
        if not isinstance(cache, KVCache) or cache.capacity >= length:
            return True
        capacity = min(row.longest, max(length, cache.capacity * 3 // 2))
        while not self._make_room(self._bytes(row, capacity)):
            last = self.running[-1]
            self._put_back(last)
            if last is row:
                return False
        row.cache = cache.copied(row.length, capacity)
        return True

    def _make_room(self, need: int, but: Ids | None = None) -> bool:
        """Forgets idle texts other than `but`, those that were used longest ago first, until there
        are `need` free bytes. Returns whether there are; if not, nothing is forgotten."""
        kept = self.used - self.prefixes.nbytes
        kept += self.prefixes.look(but).nbytes if but is not None else 0
        if kept + need > self._limit:
            return False
        while self.used + need > self._limit:
            oldest = self.prefixes.oldest(but)
            assert oldest is not None
            self.prefixes.take(oldest)
            self._count(evicted=1)
        return True

    def _put_back(self, row: Row) -> None:
        """Lets a running row wait again; what was computed of it stays as long as there is room."""
        self._retire(row)
        if not row.is_told:
            row.must_fit = True
            self.waiting.appendleft(row)
            self._count(put_back=1)

    def _retire(self, row: Row) -> None:
        """Takes a row out of the batch, and keeps its cache for texts that go on from it."""
        self.running.remove(row)
        if row.cache is not None:
            self.prefixes.put(row.ids[: row.length], row.cache)
            row.cache = None
        if row.handle.is_cancelled:
            row.cancelled()

    def _fail(self, row: Row, error: Exception) -> None:
        """Takes a row out of the batch that cannot go on."""
        self.running.remove(row)
        row.cache = None
        row.fail(why(error))

    def _held(self, row: Row) -> int:
        """The bytes of a running row's cache and of the states kept besides it."""
        return 0 if row.cache is None else row.cache.nbytes * self._copies(row)

    def _bytes(self, row: Row, capacity: int) -> int:
        """The bytes of a cache for so many tokens of a row, and of the states kept besides it."""
        return cache_bytes(self._model.config, capacity, self._dtype) * self._copies(row)

    def _copies(self, row: Row) -> int:
        return 1 + row.states_kept if self._model.window is None else 1

    def _count(self, **more: int) -> None:
        now = {name: getattr(self._counted, name) + number for name, number in more.items()}
        self._counted = dataclasses.replace(self._counted, **now)


def why(error: BaseException) -> str:
    """An error in one line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
