"""The fingerprint of a batch depends on its tokens and their places, not on who has them."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.orders import splitmix
from manta.data.fingerprint import fingerprint

few = settings(deadline=None, max_examples=25)
batches = st.tuples(st.integers(1, 12), st.integers(2, 6), st.integers(0, 2**32)).map(
    lambda shape: np.random.default_rng(shape[2]).integers(-1, 60_000, shape[:2])
)


@few
@given(batches, st.integers(0, 10**6))
def test_a_fingerprint_is_the_sum_of_its_places_and_tokens(rows: np.ndarray, slot: int) -> None:
    first = slot * rows.shape[1]
    marks = [splitmix((first + i) * 2**32 + t + 1) for i, t in enumerate(rows.ravel().tolist())]
    assert fingerprint(rows, slot) == sum(marks) % 2**64


@few
@given(batches, st.data())
def test_a_fingerprint_does_not_depend_on_who_has_which_rows(
    rows: np.ndarray, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=3))
    places = [0, *sorted(cuts), len(rows)]
    parts = [fingerprint(rows[a:b], a) for a, b in itertools.pairwise(places)]
    assert sum(parts) % 2**64 == fingerprint(rows, 0)


@few
@given(batches, st.data())
def test_a_fingerprint_changes_with_any_token_and_any_place(
    rows: np.ndarray, data: st.DataObject
) -> None:
    def place() -> tuple[int, int]:
        row, column = (data.draw(st.integers(0, n - 1)) for n in rows.shape)
        return row, column

    before = fingerprint(rows, 3)
    other = rows.copy()
    other[place()] += 1
    assert fingerprint(other, 3) != before
    assert fingerprint(rows, 4) != before
    a, b = place(), place()
    swapped = rows.copy()
    swapped[a], swapped[b] = rows[b], rows[a]
    assert (fingerprint(swapped, 3) == before) == (rows[a] == rows[b])


@few
@given(batches)
def test_a_fingerprint_is_of_the_ids_whatever_their_type(rows: np.ndarray) -> None:
    ignored = rows.astype(np.int32)
    assert fingerprint(ignored, 1) == fingerprint(rows.astype(np.int64), 1)
    ids = np.maximum(rows, 0)
    ids[0, 0] = 65_535
    kinds = ("uint16", "uint32", "int32", "int64")
    assert len({fingerprint(ids.astype(kind), 1) for kind in kinds}) == 1
