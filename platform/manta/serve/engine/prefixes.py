"""What the model remembers of texts that nobody is writing now, for texts that begin as they do."""

import bisect
from collections.abc import Sequence

from manta.model.cache import Cache, StateCache
from manta.model.reader import common

Ids = tuple[int, ...]


class Prefixes:
    """Caches of idle texts, by the texts' ids, the one that was used last at the end.

    A text's longest common beginning with any other is that with a neighbour in alphabetical order,
    so that is how they are kept.
    """

    def __init__(self) -> None:
        self._ordered: list[Ids] = []
        self._caches: dict[Ids, Cache] = {}  # in the order of their last use
        self.nbytes = 0
        """Bytes of all of them."""

    @property
    def texts(self) -> list[Ids]:
        """All texts, the one that was used last at the end."""
        return list(self._caches)

    def find(self, ids: Sequence[int]) -> tuple[Ids, int] | None:
        """The text whose cache spares most of reading `ids`, and how many tokens it spares: fewer
        than `ids` has, as the last one is always read. It counts as used. None: there is none."""
        wanted = tuple(ids)
        found = self._longest(wanted, len(wanted) - 1)
        if found is not None:
            self._caches[found[0]] = self._caches.pop(found[0])
        return found

    def _longest(self, ids: Ids, most: int) -> tuple[Ids, int] | None:
        at = bisect.bisect_right(self._ordered, ids)
        near = [(common(text, ids), text) for text in self._ordered[max(0, at - 1) : at + 1]]
        length, text = max(near, default=(0, ()))
        length = min(length, most)
        if not length:
            return None
        if not isinstance(self._caches[text], StateCache):
            return text, length
        # A state cannot go back, so a text must be a beginning of `ids` as a whole. It is before
        # all longer ones, and not longer than what is common with any of them.
        while length and ids[:length] not in self._caches:
            at = bisect.bisect_left(self._ordered, ids[:length])
            length = min(length - 1, common(self._ordered[at - 1], ids)) if at else 0
        return (ids[:length], length) if length else None

    def look(self, text: Ids) -> Cache:
        """The cache of a text, which stays here."""
        return self._caches[text]

    def take(self, text: Ids) -> Cache:
        """The cache of a text, which is no longer here."""
        cache = self._caches.pop(text)
        del self._ordered[bisect.bisect_left(self._ordered, text)]
        self.nbytes -= cache.nbytes
        return cache

    def put(self, ids: Sequence[int], cache: Cache) -> None:
        """Keeps the cache of a text. A cache that another one holds too, at the beginning of a
        longer text, is not kept."""
        text = tuple(ids)
        if not text:
            return
        if text in self._caches:
            self.take(text)
        if not isinstance(cache, StateCache):
            at = bisect.bisect_left(self._ordered, text)
            if at < len(self._ordered) and self._ordered[at][: len(text)] == text:
                return
            while at and text[: len(self._ordered[at - 1])] == self._ordered[at - 1]:
                self.take(self._ordered[at - 1])
                at -= 1
        bisect.insort(self._ordered, text)
        self._caches[text] = cache
        self.nbytes += cache.nbytes

    def oldest(self, but: Ids | None = None) -> Ids | None:
        """The text that was not used for the longest time, other than `but`; None: there is
        none."""
        return next((text for text in self._caches if text != but), None)
