"""Reorders whole documents so that the ends of rows cut few of them, and fills rows with whole
conversations. Pure arithmetic.

A line of N * seq_len + 1 tokens is cut into N rows; the last token is only a target. Each document
starts with the end-of-text token, so the token after a document is that same token, whichever
document follows. Documents can therefore change places and every input keeps its true target:
nothing is padded, dropped or repeated. Two pieces stay where they are: the first, which may be the
rest of a document that began before the line, and the last, which may continue after it.
"""

import bisect

import numpy as np

# How many documents are considered for each row. With more, more rows are filled exactly, but each
# row takes longer.
CANDIDATES = 128


def pack(line: np.ndarray, seq_len: int, eot: int) -> np.ndarray:
    """Reorders the documents of (N * seq_len + 1,) tokens so that the ends of rows cut fewer.

    Returns the line itself if it finds no better order.
    """
    assert (len(line) - 1) % seq_len == 0
    bounds = _bounds(line, eot)
    lengths = np.diff(bounds)
    cuts = _cuts(lengths, seq_len)
    if cuts == 0:
        return line
    order = _order(lengths.tolist(), seq_len)
    if _cuts(lengths[order], seq_len) >= cuts:
        return line
    stops = bounds.tolist()
    return np.concatenate([*(line[stops[i] : stops[i + 1]] for i in order), line[-1:]])


def count_cuts(line: np.ndarray, seq_len: int, eot: int) -> int:
    """The number of documents in (N * seq_len + 1,) tokens that would fit in a row, but are cut.

    Documents that are longer than a row must be cut, and do not count.
    """
    return _cuts(np.diff(_bounds(line, eot)), seq_len)


def _bounds(line: np.ndarray, eot: int) -> np.ndarray:
    """The start of each document of the inputs, and the end of the last one: (documents + 1,).

    The line starts with the first document, whether that is whole or not.
    """
    starts = np.flatnonzero(line[1:-1] == eot) + 1
    return np.concatenate([[0], starts, [len(line) - 1]])


def _cuts(lengths: np.ndarray, seq_len: int) -> int:
    """The number of `lengths` (documents,), laid end to end, that fit in a row and yet are cut."""
    ends = np.cumsum(lengths)
    cut = (ends - lengths) // seq_len != (ends - 1) // seq_len
    return int(np.count_nonzero(cut & (lengths <= seq_len)))


def _order(lengths: list[int], seq_len: int) -> list[int]:
    """The new order of the documents: the first stays first and the last stays last.

    Short documents (those that fit in a row) fill the rest of a row exactly, if any of them have
    that sum. If none have, the longest one that fits goes there, as it is the hardest to place. If
    none fits, a long document crosses the end of the row, which costs nothing, as it must be cut
    anyway. Long documents are worth most when no exact fit is left, so as long as there are many
    short ones, rows are filled with short ones alone.
    """
    middle = range(1, len(lengths) - 1)
    stock = _Stock([i for i in middle if lengths[i] <= seq_len], lengths, seq_len)
    long = [i for i in middle if lengths[i] > seq_len]
    order: list[int] = []
    place = 0  # position in the row

    def put(documents: list[int]) -> None:
        nonlocal place
        for i in documents:
            order.append(i)
            place = (place + lengths[i]) % seq_len

    def room_after(i: int) -> int:
        return -(place + lengths[i]) % seq_len

    # The last document ends with the last row. The documents that fill the row before it are chosen
    # now, while there are the most to choose from.
    before_last = -lengths[-1] % seq_len
    end = stock.take(before_last) if stock.can_fill(before_last) else []
    put([0])
    while stock.tokens:
        # A long document leaves half a row free on average: is that enough for all short ones?
        if place == 0 and stock.tokens < len(long) * seq_len / 2:
            exact = [i for i in long[:CANDIDATES] if stock.can_fill(room_after(i))]
            if exact:
                i = min(exact, key=room_after)
                long.remove(i)
                put([i, *stock.take(room_after(i))])
                continue
        room = seq_len - place
        if stock.can_fill(room):
            put(stock.take(room))
        elif length := stock.longest(room):
            put([stock.pop(length)])
        elif long:
            i = max(long[:CANDIDATES], key=lambda i: (stock.can_fill(room_after(i)), room_after(i)))
            long.remove(i)
            put([i])
        else:
            put([stock.pop(stock.longest(seq_len))])  # a cut that cannot be helped
    return [*order, *long, *end, len(lengths) - 1]


class _Stock:
    """The documents that fit in a row and have no place yet, and the sums of their lengths."""

    def __init__(self, documents: list[int], lengths: list[int], seq_len: int) -> None:
        self.tokens = 0
        self._by_length: dict[int, list[int]] = {}
        # Reversed, so that `pop` takes documents of equal length in the order of the line.
        for i in reversed(documents):
            self._by_length.setdefault(lengths[i], []).append(i)
            self.tokens += lengths[i]
        self._sizes = sorted(self._by_length)
        self._row = (2 << seq_len) - 1
        self._each = 0
        self._candidates: list[int] = []
        self._sums: list[int] = []

    def longest(self, room: int) -> int:
        """The length of the longest document of at most `room` tokens; 0 if there is none."""
        place = bisect.bisect_right(self._sizes, room)
        return self._sizes[place - 1] if place else 0

    def can_fill(self, room: int) -> bool:
        """Whether some candidates have `room` tokens together (no candidates have 0)."""
        return self._search()[-1] >> room & 1 == 1

    def fullest(self, room: int) -> int:
        """The most tokens, up to `room`, that some candidates have together; 0 if all have more."""
        return (self._search()[-1] & ((2 << room) - 1)).bit_length() - 1

    def take(self, room: int) -> list[int]:
        """Removes candidates that have `room` tokens together; prefers long ones to many."""
        sums, candidates = self._search(), self._candidates
        taken = []
        for i in reversed(range(len(candidates))):
            length = candidates[i]
            if length <= room and sums[i] >> (room - length) & 1:
                taken.append(self.pop(length))
                room -= length
        assert room == 0, "take(room) is called only if can_fill(room)"
        return taken

    def pop(self, length: int) -> int:
        """Removes and returns one document of this length."""
        documents = self._by_length[length]
        self.tokens -= length
        if len(documents) <= self._each:
            self._sums = []  # it was a candidate
        if len(documents) == 1:
            del self._by_length[length]
            del self._sizes[bisect.bisect_left(self._sizes, length)]
        return documents.pop()

    def _search(self) -> list[int]:
        """The sums of lengths that the first i candidates can form, up to a row, for each i.

        Each set of sums is an integer: bit n is set if some of the candidates have n tokens
        together.
        """
        if not self._sums:
            # Candidates have every length if there are few lengths, else lengths that are spread
            # evenly from short to long.
            count = min(len(self._sizes), CANDIDATES)
            step = (len(self._sizes) - 1) / max(1, count - 1)
            sizes = [self._sizes[round(i * step)] for i in range(count)]
            self._each = CANDIDATES // max(1, count)
            self._candidates = [n for n in sizes for _ in self._by_length[n][: self._each]]
            self._sums = [1]
            for length in self._candidates:
                last = self._sums[-1]
                self._sums.append(last | last << length & self._row)
        return self._sums


def fill(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """Puts documents of these lengths, each at most `row_tokens`, into rows without cutting any.

    A row gets the longest document that is left, and others that fill its rest exactly, or as far
    as possible. Returns the indexes of the documents in each row, the longest first.
    """
    assert max(lengths, default=0) <= row_tokens
    stock = _Stock(list(range(len(lengths))), lengths, row_tokens)
    rows: list[list[int]] = []
    while stock.tokens:
        row = [stock.pop(stock.longest(row_tokens))]
        room = row_tokens - lengths[row[0]]
        while room and stock.longest(
            room
        ):  # candidates are not all: others may fit in what is left
            filled = stock.fullest(room)
            row += stock.take(filled) if filled else [stock.pop(stock.longest(room))]
            room = row_tokens - sum(lengths[i] for i in row)
        rows.append(row)
    return rows
