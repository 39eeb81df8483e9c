"""Rows that read a shared beginning once: each pair occurs once, with the same scores as alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import SMALL, small_model
from manta.errors import DataError
from manta.evaluate.rows import Pair, Row, batches_of, rows_of
from manta.evaluate.worker import Worker
from manta.model.attention import branch_mask, branch_positions
from manta.text import tokenizer as tokenizers

LENGTH = 12
ids = st.integers(0, 40)
beginnings = st.lists(ids, min_size=1, max_size=LENGTH + 4).map(tuple)


@st.composite
def pairs_with_common_beginnings(draw: st.DrawFn) -> list[Pair]:
    some = draw(st.lists(beginnings, min_size=1, max_size=3))
    continuations = st.lists(ids, min_size=1, max_size=LENGTH).map(tuple)
    return draw(
        st.lists(st.builds(Pair, st.sampled_from(some), continuations), min_size=1, max_size=12)
    )


def seen_by(row: Row, place: int) -> tuple[int, ...]:
    """The tokens that the token at `place` sees by the model's own mask, in order of position."""
    if row.branches is None:
        return row.tokens[: place + 1]
    branches = torch.tensor([row.branches])
    places = branch_mask(branches)[0, 0, place].nonzero().flatten().tolist()
    positions = branch_positions(branches)[0, places].tolist()
    assert positions == list(range(len(places)))
    return tuple(row.tokens[i] for i in places)


@given(pairs=pairs_with_common_beginnings())
@settings(deadline=None, max_examples=200)
def test_each_token_is_predicted_once_from_what_stands_before_it(pairs: list[Pair]) -> None:
    rows = rows_of(pairs, LENGTH)
    answers = [(row, answer) for row in rows for answer in row.answers]
    assert sorted(answer.pair for _, answer in answers) == list(range(len(pairs)))
    for row, answer in answers:
        pair = pairs[answer.pair]
        assert len(row.tokens) <= LENGTH and answer.tokens == pair.continuation
        line = (pair.context + pair.continuation)[-(LENGTH + 1) :]
        first = len(line) - len(pair.continuation)
        for offset, place in enumerate(answer.places):
            assert seen_by(row, place) == line[: first + offset]


@given(
    pairs=pairs_with_common_beginnings(), most=st.integers(1, 60), most_logits=st.integers(1, 40)
)
@settings(deadline=None, max_examples=100)
def test_batches_hold_every_row_and_are_no_larger_than_they_may_be(
    pairs: list[Pair], most: int, most_logits: int
) -> None:
    rows = rows_of(pairs, LENGTH)
    batches = batches_of(rows, most, most_logits)
    assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)
    for batch in batches:
        assert len({row.branches is None for row in batch}) == 1
        size = len(batch) * max(len(row.tokens) for row in batch)
        logits = sum(len(answer.places) for row in batch for answer in row.answers)
        assert len(batch) == 1 or (size <= most and logits <= most_logits)


@pytest.mark.parametrize("name", SMALL)
def test_scores_are_those_of_each_pair_alone(name: str) -> None:
    model = small_model(name, context_length=LENGTH)
    made = tokenizers.train(["a text to train a tokenizer on"], 257)
    worker = Worker(model, made)

    @given(pairs=pairs_with_common_beginnings())
    @settings(deadline=None, max_examples=25)
    def check(pairs: list[Pair]) -> None:
        found = {}
        for batch in batches_of(rows_of(pairs, LENGTH), 50, 1000):
            found |= {scored.pair: scored for scored in worker.score(batch)}
        for index, pair in enumerate(pairs):
            line = torch.tensor((pair.context + pair.continuation)[-(LENGTH + 1) :])
            with torch.no_grad():
                logits = model(line[None, :-1])[0, -len(pair.continuation) :]
            targets = line[-len(pair.continuation) :]
            expected = -F.cross_entropy(logits, targets, reduction="sum").item()
            assert found[index].log_likelihood == pytest.approx(expected, abs=1e-4)
            margin = logits.topk(2).values
            if (margin[:, 0] - margin[:, 1]).min() > 1e-4:
                assert found[index].is_greedy == bool((logits.argmax(1) == targets).all())

    check()


def test_a_continuation_that_cannot_fit_is_refused() -> None:
    with pytest.raises(DataError, match="13 tokens is longer than the model's context of 12"):
        rows_of([Pair((1,), (2,) * 13)], LENGTH)
