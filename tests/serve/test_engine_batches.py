"""Each request gets what it gets alone, whatever else is in the batch, comes and goes."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import SMALL
from helpers.serving import (
    CONTEXT,
    Asked,
    alone,
    ask,
    batch_of,
    made_tokenizer,
    request,
    run,
    serving_model,
    step,
)
from manta.model.memory import cache_bytes
from manta.model.sampling import Sampling
from manta.serve.engine.request import Ended, Penalties, Request, Started

few = settings(deadline=None, max_examples=12)

prompts = st.lists(st.integers(0, 200), min_size=1, max_size=CONTEXT)
beginnings = st.sampled_from([[], [7] * 9, [7] * 9 + [8] * 8, list(range(20))])
samplings = st.builds(
    Sampling,
    temperature=st.just(0.0) | st.floats(0.3, 2),
    top_k=st.none() | st.integers(1, 300),
    top_p=st.just(1.0) | st.floats(0.1, 1),
    min_p=st.just(0.0) | st.floats(0, 0.5),
)
penalties = st.just(Penalties()) | st.builds(
    Penalties, st.floats(0.5, 2), st.floats(-2, 2), st.floats(-2, 2)
)


@st.composite
def requests(draw: Any) -> Request:
    return Request(
        tuple((draw(beginnings) + draw(prompts))[:CONTEXT]),
        draw(st.integers(0, 12)),
        draw(samplings),
        draw(penalties),
        draw(st.just({}) | st.dictionaries(st.integers(0, 260), st.floats(-9, 9), max_size=3)),
        seed=draw(st.integers(0, 2**32)),
        stop=draw(st.just(()) | st.just(("th", "\n", "e"))),
        ends=draw(st.just(frozenset()) | st.just(frozenset(range(0, 260, 9)))),
    )


@pytest.mark.parametrize("name", SMALL)
@given(data=st.data())
@few
def test_each_request_gets_what_it_gets_alone(name: str, data: st.DataObject) -> None:
    model = serving_model(name)
    wanted = data.draw(st.lists(requests(), min_size=1, max_size=7))
    least = cache_bytes(model.config, CONTEXT, "fp32") * (3 if name == "lstm" else 1)
    batch = batch_of(
        model,
        limit=least + data.draw(st.integers(0, 6)) * least // 4,  # little, so that rows wait
        most=data.draw(st.integers(1, 5)),
        chunk=data.draw(st.integers(1, 9)),
    )
    asked: list[Asked] = []
    cancelled = set()
    for one in wanted:
        asked.append(Asked(batch, one))
        for _ in range(data.draw(st.integers(0, 4))):
            step(batch)
        if data.draw(st.integers(0, 5)) == 0:
            number = data.draw(st.integers(0, len(asked) - 1))
            if not asked[number].is_over:
                asked[number].handle.cancel()
                cancelled.add(number)
    run(batch)
    assert len(batch.prefixes.texts) <= len(asked)
    for number, one in enumerate(asked):
        expected = alone(model, one.request)
        found = one.ended
        assert one.events == [
            event for event in one.events if isinstance(event, Started)
        ] + one.pieces + [found]
        assert "".join(piece.text for piece in one.pieces) == found.text
        if number in cancelled:
            assert found.reason == "cancelled"
            assert expected.ids[: len(found.ids)] == found.ids
        else:
            assert found == expected


@pytest.mark.parametrize("ended_by", ["length", "id", "text"])
@pytest.mark.parametrize("name", SMALL)
def test_a_turn_reads_only_its_new_tokens(name: str, ended_by: str) -> None:
    model, tokenizer = serving_model(name), made_tokenizer()
    batch, prompt, known = batch_of(model), [1, 2, 3], 0
    for turn in range(4):
        answer = alone(model, request(prompt, 4)).ids
        ways: dict[str, dict[str, Any]] = {
            "length": {"max_tokens": 3},
            "id": {"ends": frozenset(answer[3:])},
            "text": {"stop": (tokenizer.decode(answer[-1:]),)},
        }
        before = batch.counts().prefilled
        asked = ask(batch, *prompt, **{"max_tokens": 9, **ways[ended_by]})
        assert asked.started.cached == known
        assert batch.counts().prefilled - before == len(prompt) - known
        kept = asked.ended.ids
        known = len(prompt) + len(kept)
        prompt = [*prompt, *kept, 50 + turn, 60 + turn]


@pytest.mark.parametrize("name", [name for name in SMALL if name != "lstm"])
def test_texts_that_begin_alike_share_what_they_have_in_common(name: str) -> None:
    batch = batch_of(serving_model(name))
    system, rest = list(range(10)), [20, 21, 22]
    first = ask(batch, *system, *rest)
    assert first.started.cached == 0
    assert ask(batch, *system, 30, 31).started.cached == len(system)  # another conversation
    again = ask(batch, *system, *rest)  # the same prompt: only its last token is read
    assert again.started.cached == len(system) + len(rest) - 1
    assert again.ended == first.ended
    edited = ask(batch, *system, *rest, *first.ended.ids[:2], 40)
    assert edited.started.cached == len(system) + len(rest) + 2
    branch = ask(batch, *system, *rest, *first.ended.ids, 41)  # the other branch is still there
    assert branch.started.cached == len(system) + len(rest) + 5


def test_a_state_serves_texts_that_begin_with_all_of_its_own() -> None:
    batch = batch_of(serving_model("lstm"))
    first = ask(batch, 1, 2, 3)
    longer = (1, 2, 3, *first.ended.ids, 9)
    assert ask(batch, *longer).started.cached == 8
    assert ask(batch, *longer, 4).started.cached == 8  # the state after the answer is still there
    assert ask(batch, 1, 2, 3).started.cached == 0
    assert ask(batch, 1, 2, 4).started.cached == 0


def test_a_state_is_there_from_before_a_text_that_ended_an_answer() -> None:
    model = serving_model("lstm")
    batch = batch_of(model)
    whole = ask(batch, 1, 2, 3, max_tokens=12).ended
    stop = made_tokenizer().decode(whole.ids[6:8])
    stopped = ask(batch, 1, 2, 3, max_tokens=12, stop=(stop,)).ended
    assert stopped.reason == "stop"
    goes_on = ask(batch, 1, 2, 3, *stopped.ids, 9)
    assert goes_on.started.cached == 3 + len(stopped.ids)


def test_requests_at_once_read_their_common_beginning_once() -> None:
    batch = batch_of(serving_model("modern"), chunk=32)
    prompt = list(range(24))
    asked = [Asked(batch, request(prompt, seed=seed)) for seed in range(4)]
    run(batch)
    assert [one.started.cached for one in asked] == [0, 23, 23, 23]
    assert batch.counts().prefilled == 24 + 3


@pytest.mark.parametrize("name", SMALL)
def test_a_turn_that_comes_at_once_waits_until_the_answer_before_is_read(name: str) -> None:
    model = serving_model(name)
    batch = batch_of(model, chunk=16)
    answer = alone(model, request([1, 2, 3], 4)).ids
    first = Asked(batch, request([1, 2, 3], 4))
    while not first.is_over:
        step(batch)
    second = Asked(batch, request([1, 2, 3, *answer, 9]))
    run(batch)
    assert second.started.cached == 7
    assert batch.counts().prefilled == 3 + 1


def test_a_long_prompt_does_not_keep_others_waiting() -> None:
    batch = batch_of(serving_model("gpt2"), chunk=4)
    writing = Asked(batch, request([1, 2], max_tokens=20))
    step(batch)
    Asked(batch, request(range(28)))
    for number in range(2, 8):
        step(batch)
        assert len(writing.pieces) == number


def test_a_request_waits_for_room_and_none_is_too_large_in_silence() -> None:
    model = serving_model("gpt2")
    batch = batch_of(model, tokens=20)
    first, second = (Asked(batch, request([n] * 10, max_tokens=8)) for n in (1, 2))
    step(batch)
    assert batch.counts().waiting == 1
    too_large = Asked(batch, request([3] * 10, max_tokens=11))
    assert "ask for fewer tokens" in too_large.failed.why
    run(batch)
    for one in (first, second):
        assert one.ended == alone(model, one.request)
    assert batch.counts().evicted == 1


def test_those_that_came_last_are_put_back_when_texts_grow() -> None:
    from manta.serve.engine import batch as batches

    model = serving_model("modern")
    batch = batch_of(model, tokens=48)
    was, batches.GROWTH = batches.GROWTH, 1
    try:
        asked = [Asked(batch, request([n], max_tokens=24)) for n in (1, 2, 3)]
        run(batch)
    finally:
        batches.GROWTH = was
    assert batch.counts().put_back > 0
    for one in asked:
        assert one.ended == alone(model, one.request)
        assert one.started.cached == 0


def test_a_client_that_goes_away_frees_its_place_within_a_step() -> None:
    batch = batch_of(serving_model("gpt2"), most=1)
    gone, waiting = Asked(batch, request([1], 30)), Asked(batch, request([2], 3))
    also_gone = Asked(batch, request([3], 3))
    step(batch)
    gone.handle.cancel()
    also_gone.handle.cancel()
    step(batch)
    assert gone.ended.reason == also_gone.ended.reason == "cancelled"
    assert len(gone.ended.ids) == 1
    assert waiting.pieces
    run(batch)
    assert waiting.ended.reason == "length"


def test_what_fails_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug for one token, no number for another, and something that cannot be chosen from."""
    model = serving_model("modern")
    embed = type(model.embedding).forward

    def fails(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        if (tokens == 99).any():
            raise RuntimeError("out of memory\nand more")
        return embed(self, tokens).masked_fill((tokens == 98).unsqueeze(2), torch.nan)

    batch = batch_of(model, most=8)
    asked = [
        Asked(batch, request([n, n, n, n, n], sampling=Sampling(top_k=top_k), seed=n))
        for n, top_k in ((1, None), (99, None), (2, None), (98, None), (3, -7))
    ]
    expected = [alone(model, one.request) for one in (asked[0], asked[2])]
    monkeypatch.setattr(type(model.embedding), "forward", fails)
    run(batch)
    assert asked[1].failed.why == "RuntimeError: out of memory"
    assert "Error" in asked[3].failed.why
    assert "Error" in asked[4].failed.why
    assert [asked[0].ended, asked[2].ended] == expected
    assert batch.counts().running == 0


@pytest.mark.parametrize(
    ("prompt", "keys", "said"),
    [
        ([], {}, "the prompt has 0 tokens: it should have 1 to 32, the model's context"),
        ([1] * 33, {}, "the prompt has 33 tokens"),
        ([1, 270], {}, "270 is not the id of a token: they are 0 to 269"),
        ([-1], {}, "-1 is not the id of a token"),
        ([1], {"logit_bias": {10**6: 1.0}}, "1000000 is not the id of a token"),
    ],
)
def test_what_the_model_cannot_take_is_refused(
    prompt: list[int], keys: dict[str, Any], said: str
) -> None:
    batch = batch_of(serving_model("gpt2"))
    assert said in Asked(batch, request(prompt, **keys)).failed.why
    assert batch.is_idle


def test_the_context_ends_an_answer() -> None:
    batch = batch_of(serving_model("gpt2"))
    assert len(ask(batch, *range(CONTEXT - 2), max_tokens=9).ended.ids) == 2
    full = ask(batch, *range(CONTEXT), max_tokens=9)
    assert full.ended == Ended("length", (), "")
    assert ask(batch, 1, max_tokens=0).ended == Ended("length", (), "")


def test_the_bits_of_a_text_do_not_depend_on_its_company() -> None:
    model = serving_model("gpt2")
    one = dataclasses.replace(request([3, 4, 5], 12), alternatives=3)
    expected = None
    for others in range(5):
        batch = batch_of(model, most=8)
        for n in range(others):
            Asked(batch, request([9 + n] * (2 * n + 1), 9))
        step(batch)
        asked = Asked(batch, one)
        run(batch)
        tokens = [token for piece in asked.pieces for token in piece.tokens]
        expected = expected or tokens
        assert [t.id for t in tokens] == [t.id for t in expected]
