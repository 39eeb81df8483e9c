"""Packing: the same documents with the same targets, in an order in which fewer are cut."""

import dataclasses
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manta.data.packing import count_cuts, fill, pack

wide = settings(deadline=None, max_examples=150)


@dataclasses.dataclass(frozen=True)
class Case:
    line: np.ndarray
    seq_len: int
    eot: int


def case(
    lengths: list[int], seq_len: int, eot: int = 9, dtype: str = "uint16", headless: bool = False
) -> Case:
    """A line of documents of these lengths, with other tokens from a small alphabet. It is cut, or
    its last document is extended, to whole rows and one target."""
    rows = max(1, sum(lengths) // seq_len)
    line = np.random.default_rng(sum(lengths)).integers(1, 5, rows * seq_len + 1).astype(dtype)
    starts = np.cumsum([0, *lengths])
    line[starts[starts < len(line)]] = eot
    if headless:
        line[0] = 1
    return Case(line, seq_len, eot)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seq_len = draw(st.sampled_from([1, 2, 3, 7, 16, 50]))
    # Lengths from one token to many rows; the line may also begin inside a document.
    longest = draw(st.sampled_from([1, 2, seq_len, 2 * seq_len, 9 * seq_len]))
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=80))
    dtype, eot = draw(st.sampled_from([("uint16", 0), ("uint16", 65535), ("uint32", 100_000)]))
    return case(lengths, seq_len, eot, dtype, headless=draw(st.booleans()))


def documents(line: np.ndarray, eot: int) -> list[tuple[int, ...]]:
    """The documents of the inputs; the first one is what the line starts with."""
    found: list[list[int]] = []
    for token in line[:-1].tolist():
        if token == eot or not found:
            found.append([])
        found[-1].append(token)
    return [tuple(document) for document in found]


def bare_count(made: Case) -> int:
    """Counts cuts like `count_cuts`, document by document."""
    place = cuts = 0
    for document in documents(made.line, made.eot):
        rows = {i // made.seq_len for i in range(place, place + len(document))}
        cuts += len(rows) > 1 and len(document) <= made.seq_len
        place += len(document)
    return cuts


no_eot = case([40], 8, headless=True)
eot_everywhere = case([1] * 41, 8)
eot_last_only = Case(np.array([1, 2, 3, 4, 9]), 2, 9)
eot_in_last_input = Case(np.array([1, 2, 3, 9, 4]), 2, 9)
one_row = case([3, 2, 3], 8)
only_worse_is_found = case([7, 7, 2, 8, 8], 8)


@wide
@example(no_eot)
@example(eot_everywhere)
@example(eot_last_only)
@example(eot_in_last_input)
@example(one_row)
@given(cases())
def test_whole_documents_change_places_and_every_target_stays_true(made: Case) -> None:
    before = made.line.copy()
    packed = pack(made.line, made.seq_len, made.eot)
    assert packed.dtype == made.line.dtype
    assert np.array_equal(made.line, before)
    assert Counter(packed.tolist()) == Counter(before.tolist())
    assert Counter(pairwise(packed.tolist())) == Counter(pairwise(before.tolist()))

    old, new = documents(before, made.eot), documents(packed, made.eot)
    assert Counter(new) == Counter(old)
    assert (new[0], new[-1], packed[-1]) == (old[0], old[-1], before[-1])


@wide
@example(no_eot)
@example(eot_everywhere)
@example(only_worse_is_found)
@given(cases())
def test_never_more_documents_are_cut(made: Case) -> None:
    packed = pack(made.line, made.seq_len, made.eot)
    cuts = count_cuts(packed, made.seq_len, made.eot)
    assert cuts == bare_count(dataclasses.replace(made, line=packed))
    assert cuts <= count_cuts(made.line, made.seq_len, made.eot) == bare_count(made)


@wide
@given(cases())
def test_the_order_depends_on_the_line_alone(made: Case) -> None:
    packed = pack(made.line, made.seq_len, made.eot)
    assert np.array_equal(packed, pack(made.line.copy(), made.seq_len, made.eot))
    # The order depends on where documents end, not on what is in them.
    other = np.where(made.line == made.eot, made.eot, 7).astype(made.line.dtype)
    other_packed = pack(other, made.seq_len, made.eot)
    assert np.array_equal(other_packed == made.eot, packed == made.eot)


@wide
@given(st.data(), st.integers(0, 7))
def test_lengths_that_are_powers_of_two_pack_perfectly(data: st.DataObject, power: int) -> None:
    seq_len = 2**power
    rows = data.draw(st.lists(st.integers(0, power), max_size=20))
    middle = [2**n for n in rows for _ in range(seq_len // 2**n)]
    lengths = [seq_len, *data.draw(st.permutations(middle)), seq_len]
    made = case(lengths, seq_len)
    assert count_cuts(pack(made.line, seq_len, made.eot), seq_len, made.eot) == 0


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([5, 6, 5, 2, 3, 3], id="pairs"),
        pytest.param([2, 7, 3, 1, 3, 8], id="three in a row"),
        pytest.param([8, 3, 6, 15, 8], id="a long document crosses a row's end"),
        pytest.param([3, 7, 20, 2, 8], id="and leaves room for a short one"),
        pytest.param([8, 14, 3, 21, 2, 8], id="long documents are filled up"),
        pytest.param([3, 3, 6, 15, 5], id="the row of the last is thought of first"),
        pytest.param([13, 6, 3, 2], id="a long first piece"),
        pytest.param([3, 6, 5, 2, 16], id="a long last document"),
    ],
)
def test_a_perfect_order_is_found(lengths: list[int]) -> None:
    made = case(lengths, seq_len=8)
    assert count_cuts(made.line, 8, made.eot) > 0
    assert count_cuts(pack(made.line, 8, made.eot), 8, made.eot) == 0


@pytest.mark.parametrize(("seq_len", "full_rows"), [(256, 0.01), (1024, 0.29), (2048, 0.6)])
def test_of_documents_like_those_of_the_web_almost_none_is_cut(
    seq_len: int, full_rows: float
) -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(600), 1.0, 256 * seq_len // 900).astype(int)
    made = case((lengths + 1).tolist(), seq_len, headless=True)
    fitting = sum(len(document) <= seq_len for document in documents(made.line, made.eot))
    assert count_cuts(made.line, seq_len, made.eot) > 0.25 * fitting
    packed = pack(made.line, seq_len, made.eot)
    assert count_cuts(packed, seq_len, made.eot) < 0.01 * fitting
    # Long documents are cut no more often than they must be, where short ones fill up their rows.
    assert np.mean(packed[seq_len:-1:seq_len] == made.eot) > full_rows
    assert np.mean(made.line[seq_len:-1:seq_len] == made.eot) < 0.01


# --- rows of whole documents ---------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 40), max_size=60), extra=st.integers(0, 20))
def test_rows_are_filled_with_whole_documents_until_none_fits(
    lengths: list[int], extra: int
) -> None:
    row_tokens = max(lengths, default=1) + extra
    rows = fill(lengths, row_tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for number, row in enumerate(rows):
        room = row_tokens - sum(lengths[i] for i in row)
        assert room >= 0 and lengths[row[0]] == max(lengths[i] for i in row)
        assert all(lengths[i] > room for later in rows[number + 1 :] for i in later)


@pytest.mark.parametrize("row_tokens", [512, 1024, 2048])
def test_of_rows_of_short_conversations_almost_nothing_is_padding(row_tokens: int) -> None:
    lengths = (20 + np.random.default_rng(0).lognormal(3.0, 0.7, 5000)).astype(int).clip(max=500)
    rows = fill(lengths.tolist(), row_tokens)
    assert len(rows) <= 1.01 * lengths.sum() / row_tokens + 1
