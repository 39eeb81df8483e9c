"""Completions as tasks ask for them: draws, lengths, ends, and what Manta does not support."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from helpers.evaluation import TEXT
from helpers.models import small_model
from manta.errors import ConfigError, DataError
from manta.evaluate.adapter import MantaLM, in_process, loglikelihood_requests
from manta.evaluate.surprise import pieces
from manta.evaluate.worker import Worker, pool_of
from manta.model.gpt import GPT
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer

CONTEXT = 32
DRAWN = {"until": [], "max_gen_toks": 10, "do_sample": True}
few = settings(deadline=None, max_examples=10)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([TEXT], 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    """It has seven ids more than the tokenizer, and likes these best."""
    made = small_model("modern", CONTEXT, vocab_size=tokenizer.vocab_size + 7)
    with torch.no_grad():
        made.head.weight[tokenizer.vocab_size : tokenizer.vocab_size + 7] *= 20
    return made


@pytest.fixture(scope="module")
def lm(model: GPT, tokenizer: Tokenizer) -> MantaLM:
    return in_process(model, tokenizer)


def asked(*arguments: tuple[str, dict[str, Any]]) -> list[Instance]:
    return [Instance("generate_until", {}, a, 0, metadata=("mine", 0, 1)) for a in arguments]


def said(lm: MantaLM, prompt: str, **options: Any) -> str:
    (found,) = lm.generate_until(asked((prompt, options)))
    return found


# Draws


def test_each_copy_of_a_drawn_request_has_a_draw_of_its_own(lm: MantaLM) -> None:
    """lm-eval asks the same request as often as a task's `repeats` says."""
    first, again = (lm.generate_until(asked(("The cat", DRAWN)) * 8) for _ in range(2))
    assert len(set(first)) == 8
    assert first == again
    assert len(set(lm.generate_until(asked(("The cat", DRAWN | {"do_sample": False})) * 8))) == 1


@given(
    order=st.permutations(["a", "a", "a", "b", "b", "The cat", "The dog"]),
    count=st.integers(1, 7),
)
@few
def test_a_draw_follows_from_the_request_and_how_often_it_was_asked(
    lm: MantaLM, order: list[str], count: int
) -> None:
    """The other requests, and their order, change nothing; so neither does `limit`."""
    numbers = itertools.count
    times = {text: numbers() for text in order}
    found = lm.generate_until(asked(*[(text, DRAWN) for text in order[:count]]))
    for text, completion in zip(order[:count], found, strict=True):
        number = next(times[text])
        alone = lm.generate_until(asked((text, DRAWN)) * (number + 1))
        assert completion == alone[number]


def test_another_seed_draws_other_completions(
    lm: MantaLM, model: GPT, tokenizer: Tokenizer
) -> None:
    pool = pool_of(Worker(model, tokenizer))
    other = MantaLM(pool, tokenizer, CONTEXT, tokenizer.vocab_size, seed=1)
    requests = asked(("The cat", DRAWN), ("The dog", DRAWN))
    drawn = zip(lm.generate_until(requests), other.generate_until(requests), strict=True)
    assert all(a != b for a, b in drawn)


@pytest.mark.parametrize("keys", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0}], ids=str)
def test_a_draw_among_one_token_is_greedy(lm: MantaLM, keys: dict[str, Any]) -> None:
    greedy = said(lm, "The cat", max_gen_toks=10)
    assert said(lm, "The cat", **DRAWN, **keys) == greedy
    assert said(lm, "The cat", **DRAWN) != greedy


def test_a_temperature_alone_means_draws_and_do_sample_false_none(lm: MantaLM) -> None:
    drawn, greedy = said(lm, "The cat", **DRAWN), said(lm, "The cat", max_gen_toks=10)
    assert said(lm, "The cat", max_gen_toks=10, temperature=1) != greedy != drawn
    assert said(lm, "The cat", max_gen_toks=10, temperature=1, do_sample=False) == greedy
    assert said(lm, "The cat", max_gen_toks=10, temperature=0.0, num_beams=1) == greedy
    for keys in ({"top_k": 0}, {"top_k": -1}, {"top_k": None, "top_p": None}, {"top_p": 1}):
        requests = asked(("The cat", DRAWN | keys))
        assert lm.generate_until(requests)[0] != greedy


@given(prompt=st.text(max_size=30), temperature=st.floats(0, 5), top_k=st.integers(-1, 400))
@few
def test_a_model_with_more_ids_than_its_tokenizer_says_only_what_decodes(
    lm: MantaLM, prompt: str, temperature: float, top_k: int
) -> None:
    options = DRAWN | {"temperature": temperature, "top_k": top_k}
    assert len(lm.generate_until(asked((prompt, options)) * 3)) == 3


def test_an_id_without_a_token_is_named_among_the_guesses(model: GPT, tokenizer: Tokenizer) -> None:
    (piece, *_) = pieces(model, tokenizer, tokenizer.encode("The cat dug."))
    assert any(text.startswith("[unused 3") for text, _ in piece.guesses), piece


# Lengths and ends


@pytest.mark.parametrize("number", [6, 6.0, "6", "6.0"], ids=repr)
@pytest.mark.parametrize(
    "name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"]
)
def test_a_length_is_a_whole_number_in_any_form(lm: MantaLM, name: str, number: Any) -> None:
    whole = said(lm, "The cat", max_gen_toks=10)
    short = said(lm, "The cat", max_gen_toks=6)
    assert whole.startswith(short) and whole != short
    assert said(lm, "The cat", **{name: number}) == short


@pytest.mark.parametrize("until", ["", [""], ["", "never said"], [], None], ids=repr)
def test_an_empty_stop_string_ends_nothing(lm: MantaLM, until: Any) -> None:
    whole = said(lm, "The cat", max_gen_toks=10)
    assert whole and said(lm, "The cat", max_gen_toks=10, until=until) == whole
    stop = whole[2]
    assert said(lm, "The cat", max_gen_toks=10, until=["", stop]) == whole[: whole.index(stop)]


def test_the_first_of_several_lengths_counts_as_in_lm_eval(lm: MantaLM) -> None:
    found = said(lm, "The cat", max_tokens=2, max_gen_toks=6, max_new_tokens=4)
    assert found == said(lm, "The cat", max_gen_toks=6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repetition_penalty": 1.2, "min_p": 0.1}, r"repetition_penalty=1\.2, min_p=0\.1: Manta"),
        ({"num_beams": 10}, "num_beams=10: should be 1"),
        ({"max_gen_toks": 6.5}, r"max_gen_toks=6\.5: should be a valid integer"),
        ({"max_gen_toks": "many"}, "max_gen_toks='many': should be a valid integer"),
        ({"max_gen_toks": float("inf")}, "max_gen_toks=inf"),
        ({"max_new_tokens": 0}, "max_gen_toks=0: should be greater"),
        ({"max_gen_toks": True}, "max_gen_toks=True: should be a number"),
        ({"max_gen_toks": 32}, r"max_gen_toks=32 leaves no room .* context of 32: choose"),
        ({}, "max_gen_toks=256 leaves no room"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0}, "top_p=0: should be greater than 0"),
        ({"top_p": 1.5}, r"top_p=1\.5: should be less than or equal to 1"),
        ({"top_k": -2}, "top_k=-2: should be at least 1"),
        ({"top_k": 2.5}, r"top_k=2\.5"),
        ({"until": {"a": 1}}, "until=.*valid"),
        ({"do_sample": "perhaps"}, "do_sample='perhaps'"),
    ],
    ids=str,
)
def test_what_manta_cannot_generate_is_refused_with_a_line(
    lm: MantaLM, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^task mine: generation_kwargs\.{words}") as refused:
        lm.generate_until(asked(("The cat", DRAWN), ("The dog", options)))
    assert "\n" not in str(refused.value)


def test_an_empty_continuation_is_refused_with_a_line(lm: MantaLM) -> None:
    requests = loglikelihood_requests([("The cat", " dug."), ("The dog", "")])
    with pytest.raises(DataError, match=r"an empty continuation, after 'The dog'"):
        lm.loglikelihood(requests)
