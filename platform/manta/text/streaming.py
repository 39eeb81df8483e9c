"""Text that comes bit by bit, from ids or from pieces, up to where one of some texts begins in it.

Where it ends does not depend on the pieces: the text to end at that is complete first decides.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from manta.text.tokenizer import Tokenizer


class Until:
    """Text in pieces, up to where one of `stops` begins; an empty one is nowhere."""

    def __init__(self, stops: Iterable[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_over = False
        """Whether one of `stops` came."""

    def add(self, text: str) -> str:
        """Takes more text; returns what can be told now. The rest may be the beginning of a stop,
        and waits for what follows."""
        self._held += text
        at = first(self._held, self._stops)
        if at is not None:
            self.is_over = True
            told, self._held = self._held[:at], ""
            return told
        waits = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        end = len(self._held) - waits
        told, self._held = self._held[:end], self._held[end:]
        return told

    def end(self) -> str:
        """The text that still waited, as nothing follows."""
        told, self._held = self._held, ""
        return told


def first(text: str, stops: Iterable[str]) -> int | None:
    """The place at which the first of `stops` to be complete begins; of those that are complete at
    the same character, the longest. None: nowhere."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of a text that are the beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def until(texts: Iterable[str], stops: Iterable[str]) -> Iterator[str]:
    """Yields texts up to where one of `stops` begins in them."""
    held = Until(stops)
    for text in texts:
        if told := held.add(text):
            yield told
        if held.is_over:
            return
    if told := held.end():
        yield told


class TextStream:
    """The text of ids that come one by one: whole characters, up to where one of `stops` begins."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str] = ()):
        self._newest: int | None = 0
        self._texts = tokenizer.stream(self._ids())
        self._until = Until(stops)

    def _ids(self) -> Iterator[int]:
        while self._newest is not None:
            yield self._newest

    @property
    def is_over(self) -> bool:
        """Whether one of `stops` came."""
        return self._until.is_over

    def add(self, token: int) -> str:
        """Takes the next id; returns what can be told now."""
        self._newest = token
        return self._until.add(next(self._texts))

    def end(self) -> str:
        """The text that still waited, as no id follows."""
        self._newest = None
        told = self._until.add(next(self._texts))
        return told + self._until.end()


def ids_before(tokenizer: Tokenizer, ids: Sequence[int], stops: Iterable[str]) -> list[int]:
    """The ids before the text that ends them, or all of them. A token that has text of both is
    replaced by the ids of its text before."""
    decode = tokenizer.tiktoken.decode_single_token_bytes
    pieces = [decode(token) for token in ids]
    raw = b"".join(pieces)
    # One character for each byte, as places are counted in bytes.
    bytewise = [stop.encode().decode("latin-1") for stop in stops if stop]
    at = first(raw.decode("latin-1"), bytewise)
    if at is None:
        return list(ids)
    ends = [end for end in itertools.accumulate(map(len, pieces), initial=0) if end <= at]
    rest = raw[ends[-1] : at]
    try:
        between = tokenizer.encode(rest.decode())
    except UnicodeDecodeError:  # the end of a character that an earlier token begins
        between = [tokenizer.ranks[bytes([b])] for b in rest if b not in tokenizer.lacking]
    return [*ids[: len(ends) - 1], *between]
