"""Penalties and settings are transformers', log-probabilities those of a plain forward."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import SMALL
from helpers.serving import (
    VOCAB,
    Asked,
    alone,
    ask,
    batch_of,
    made_tokenizer,
    request,
    run,
    serving_model,
)
from manta.model.sampling import Sampling, pick
from manta.serve.engine.choice import _adjusted, choose
from manta.serve.engine.request import Penalties, Request, Token
from manta.serve.engine.row import Handle, Row

few = settings(deadline=None, max_examples=25)


def row_of(asked: Request, answer: tuple[int, ...] = ()) -> Row:
    row = Row(asked, lambda _: None, Handle(), made_tokenizer(), 64)
    row.ids += answer
    return row


@given(
    ids=st.lists(st.integers(0, 39), min_size=1, max_size=12),
    penalty=st.floats(0.2, 3),
    seed=st.integers(0, 99),
)
@few
def test_the_repetition_penalty_is_that_of_transformers(
    ids: list[int], penalty: float, seed: int
) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits.clone())
    row = row_of(request(ids[:1], penalties=Penalties(repetition=penalty)), tuple(ids[1:]))
    torch.testing.assert_close(_adjusted([row], logits), theirs)


@given(min_p=st.floats(0.001, 1), temperature=st.floats(0.3, 3), seed=st.integers(0, 99))
@few
def test_min_p_leaves_the_tokens_that_it_leaves_in_transformers(
    min_p: float, temperature: float, seed: int
) -> None:
    from transformers import MinPLogitsWarper

    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)) * 3
    theirs = MinPLogitsWarper(min_p)(torch.tensor([[0]]), logits / temperature)
    kept = set(torch.nonzero(theirs[0] > -torch.inf).flatten().tolist())
    many = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    sampling = Sampling(temperature=temperature, min_p=min_p)
    drawn = pick(logits.expand(len(many), -1), sampling, many).tolist()
    assert set(drawn) <= kept
    shares = torch.softmax(theirs[0], 0)
    assert {id for id in kept if shares[id] > 0.001} <= set(drawn)


def test_presence_and_frequency_count_the_answer_only() -> None:
    logits = torch.zeros(1, VOCAB)
    row = row_of(request([1, 2], penalties=Penalties(presence=0.5, frequency=0.25)), (2, 3, 3))
    found = _adjusted([row], logits)[0]
    assert found.nonzero().flatten().tolist() == [2, 3]
    assert found[2] == -0.75
    assert found[3] == -1.0


def test_a_bias_forbids_and_forces_whatever_the_penalties() -> None:
    model = serving_model("modern")
    likeliest = alone(model, request([1, 2], 1)).ids[0]
    harsh = Penalties(repetition=3.0, presence=2.0, frequency=2.0)
    batch = batch_of(model)
    biased = ask(batch, 1, 2, max_tokens=1, logit_bias={likeliest: -100.0}, penalties=harsh)
    assert biased.ended.ids[0] != likeliest
    forced = ask(batch, 1, 2, max_tokens=6, logit_bias={77: 100.0}, penalties=harsh)
    assert forced.ended.ids == (77,) * 6


def test_ids_that_the_tokenizer_lacks_are_never_the_engines() -> None:
    logits = torch.zeros(60, VOCAB)
    logits[:, 5:] = 9.0
    rows = [
        row_of(request([1], sampling=Sampling(n % 3), alternatives=1, seed=n)) for n in range(60)
    ]
    found = choose(rows, logits, 5)
    assert max(token.id for token in found) < 5
    assert found[0].alternatives[0][0] >= 5  # the model's own opinion is told


def test_settings_that_are_equal_are_drawn_together_as_apart() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    kinds = [Sampling(0.7, 20), Sampling(0), Sampling(0.7, 20), Sampling(1.5, None, 0.8)]
    asked = [request([1], sampling=kind, seed=n) for n, kind in enumerate(kinds)]
    together = choose([row_of(one) for one in asked], logits, 260)
    apart = [choose([row_of(one)], logits[n : n + 1], 260)[0] for n, one in enumerate(asked)]
    assert together == apart


def plain_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids]))[0], dim=1)


def check(token: Token, logprobs: torch.Tensor, count: int) -> None:
    assert token.logprob == pytest.approx(logprobs[token.id].item(), abs=1e-5)
    values, ids = logprobs.topk(count)
    assert [id for id, _ in token.alternatives] == ids.tolist()
    assert [p for _, p in token.alternatives] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_log_probabilities_are_those_of_a_plain_forward(name: str) -> None:
    """The batch has and has not what the cache had; the answer's are those before all settings."""
    model = serving_model(name)
    batch = batch_of(model, chunk=5)
    settings = {
        "sampling": Sampling(1.3, 40), "penalties": Penalties(1.5), "logit_bias": {5: 3.0}
    }  # fmt: skip
    ask(batch, 3, 4, 5)
    asked = [
        Asked(batch, request([3, 4, 5, n, 9, 8, 7, n], 6, alternatives=n, seed=n, **settings))
        for n in range(4)
    ]
    scored = Asked(
        batch, request([3, 4, 5, 6, 7, 8, 9, 3, 4], 1, prompt_alternatives=3, alternatives=2)
    )
    run(batch)
    for number, one in enumerate(asked):
        tokens = [token for piece in one.pieces for token in piece.tokens]
        assert tuple(token.id for token in tokens) == one.ended.ids
        ids = [*one.request.prompt, *one.ended.ids]
        logprobs = plain_logprobs(model, ids)
        for place, token in enumerate(tokens, len(one.request.prompt) - 1):
            check(token, logprobs[place], number)
    assert scored.started.cached == 0
    first, *others = scored.started.prompt
    assert first == Token(3)
    assert [first.id, *(token.id for token in others)] == list(scored.request.prompt)
    logprobs = plain_logprobs(model, list(scored.request.prompt))
    for place, token in enumerate(others):
        check(token, logprobs[place], 3)


def test_a_prompt_is_scored_without_an_answer() -> None:
    """What lm-eval asks for with `echo`, `logprobs` and max_tokens 0; and a prompt of one token."""
    model = serving_model("gpt2")
    batch = batch_of(model)
    found = ask(batch, 3, 1, 4, max_tokens=0, prompt_alternatives=1)
    logprobs = plain_logprobs(model, [3, 1, 4])
    for place, token in enumerate(found.started.prompt[1:]):
        check(token, logprobs[place], 1)
    assert not found.pieces
    assert found.ended.ids == ()
    single = ask(batch, 3, max_tokens=0, prompt_alternatives=1)
    assert single.started.prompt == (Token(3),)
    again = ask(batch, 3, 1, 4, max_tokens=2)  # what was scored is a beginning like any other
    assert again.started.cached == 2


def test_a_seed_gives_the_same_answer_and_another_seed_another() -> None:
    batch = batch_of(serving_model("modern"))
    one = request([1, 2], 20, sampling=Sampling(2.0), seed=7)
    found = [Asked(batch, one), Asked(batch, dataclasses.replace(one, seed=8)), Asked(batch, one)]
    run(batch)
    first, other, again = (asked.ended.ids for asked in found)
    assert first == again != other
