"""Bytes without a token, which texts lose, as in transformers: SmolLM2's tokenizer lacks some."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import regex


class LostBytes:
    """Takes the bytes that a tokenizer lacks out of words, before tokens merge: what was apart by
    one of them may merge then."""

    def __init__(
        self, pattern: str, lacking: bytes, sizes: np.ndarray, ids_of: Callable[[bytes], list[int]]
    ):
        """Takes the tokenizer's pattern of words, the bytes, its tokens' numbers of bytes (V,), and
        a function that returns the ids of a word."""
        # Rust, which tiktoken is written in, has another form for a character by its number.
        here = regex.sub(r"\\x\{(\w+)\}", lambda m: f"\\U{int(m[1], 16):08x}", pattern)
        self._words, self._lacking = regex.compile(here), lacking
        self._sizes, self._ids_of = sizes, ids_of

    def taken_out(self, text: str, windows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The ids of a text in parts, without those from V on, each of which stands for one of the
        bytes. `windows` are the ids with them."""
        ids = np.concatenate([*windows])
        known = ids < len(self._sizes)
        if known.all():
            yield ids
            return
        ends = np.cumsum(np.where(known, self._sizes[np.where(known, ids, 0)], 1))
        lost = iter(ends[~known].tolist())  # the places after the bytes
        place, stop, done = next(lost), 0, 0
        for word in self._words.finditer(text):
            raw = word.group().encode()
            start, stop = stop, stop + len(raw)
            if place > stop:
                continue
            first, last = np.searchsorted(ends, [start, stop], side="right").tolist()
            yield ids[done:first]
            done = last
            if kept := raw.translate(None, self._lacking):
                yield np.array(self._ids_of(kept), ids.dtype)
            while place <= stop:
                place = next(lost, len(text.encode()) + 1)
        yield ids[done:]
