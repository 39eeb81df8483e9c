"""Generation with a cache equals generation without; a prompt in a batch equals one alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import SMALL, small_model, some_tokens
from manta.model.generate import Sampling, generate, generate_batch

few = settings(deadline=None, max_examples=15)


@pytest.mark.parametrize("name", SMALL)
@given(data=st.data())
@few
def test_cached_logits_equal_the_full_forward_in_any_chunks(name: str, data: st.DataObject) -> None:
    model = small_model(name, context_length=16)
    length = data.draw(st.integers(1, 16))
    tokens = some_tokens(2, length, vocab=50, seed=data.draw(st.integers(0, 99)))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())))
    cache = model.new_cache(2, 16)
    with torch.no_grad():
        expected = model(tokens)
        chunks = [
            model(tokens[:, a:b], cache=cache)
            for a, b in zip([0, *cuts], [*cuts, length], strict=True)
        ]
    assert cache.lengths == [length, length]
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_last_only_gives_the_last_of_all_logits(name: str) -> None:
    model = small_model(name)
    tokens = some_tokens(3, 8, vocab=50)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, last_only=True), model(tokens)[:, -1:])


@pytest.mark.parametrize("name", SMALL)
@given(
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=20),
    context_length=st.integers(2, 9),
    temperature=st.just(0.0) | st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, 60),
    seed=st.integers(0, 2**32),
)
@few
def test_generation_with_cache_equals_generation_without(
    name: str,
    prompt: list[int],
    context_length: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> None:
    """The prompt may be longer than the context, and 20 new tokens overflow it several times."""
    model = small_model(name, context_length)
    cached, uncached = (
        list(
            generate(
                model,
                prompt,
                20,
                sampling=Sampling(temperature=temperature, top_k=top_k),
                seed=seed,
                use_cache=use_cache,
            )
        )
        for use_cache in (True, False)
    )
    assert cached == uncached
    assert len(cached) == 20


def test_generation_reads_only_the_context_and_after_overflow_only_its_newer_half() -> None:
    model = small_model("modern", context_length=8)
    prompt = some_tokens(1, 20, vocab=50)[0].tolist()
    # The 8 last tokens of the prompt fill the context: the second token sees the 4 last.
    first, second = generate(model, prompt, 2, sampling=Sampling(temperature=0))
    with torch.no_grad():
        assert model(torch.tensor([prompt[-8:]]))[0, -1].argmax() == first
        assert model(torch.tensor([[*prompt[-3:], first]]))[0, -1].argmax() == second


def test_a_seed_gives_the_same_text_again_and_another_seed_another() -> None:
    model = small_model("modern")
    same = [list(generate(model, [1, 2], 30, seed=7)) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != list(generate(model, [1, 2], 30, seed=8))


def test_temperature_0_and_top_1_take_the_likeliest_token_whatever_the_seed() -> None:
    model = small_model("gpt2")
    greedy = list(generate(model, [3], 30, sampling=Sampling(temperature=0), seed=1))
    assert greedy == list(generate(model, [3], 30, sampling=Sampling(temperature=0), seed=2))
    assert greedy == list(
        generate(model, [3], 30, sampling=Sampling(temperature=1.5, top_k=1), seed=3)
    )


def test_top_k_draws_only_from_the_k_likeliest_tokens() -> None:
    model = small_model("modern")
    with torch.no_grad():
        likeliest = set(model(torch.tensor([[5, 6]]))[0, -1].topk(3).indices.tolist())
    drawn = {
        next(generate(model, [5, 6], 1, sampling=Sampling(temperature=5, top_k=3), seed=s))
        for s in range(60)
    }
    assert drawn == likeliest


@pytest.mark.parametrize("name", SMALL)
@given(
    prompts=st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=12), min_size=1, max_size=5),
    context_length=st.integers(1, 9),
    temperature=st.just(0.0) | st.floats(0.2, 3),
    stop=st.none() | st.integers(0, 49),
    use_cache=st.booleans(),
)
@few
def test_each_prompt_of_a_batch_gets_what_it_gets_alone(
    name: str,
    prompts: list[list[int]],
    context_length: int,
    temperature: float,
    stop: int | None,
    use_cache: bool,
) -> None:
    model = small_model(name, context_length=context_length)
    seeds = list(range(len(prompts)))
    found: list[list[int]] = [[] for _ in prompts]
    batch = generate_batch(
        model,
        prompts,
        14,
        seeds=seeds,
        sampling=Sampling(temperature=temperature),
        stop=stop,
        use_cache=use_cache,
    )
    for new in batch:
        for i, token in new.items():
            found[i].append(token)
    for prompt, seed, tokens in zip(prompts, seeds, found, strict=True):
        alone = generate(
            model, prompt, 14, seed=seed, sampling=Sampling(temperature=temperature), stop=stop
        )
        assert tokens == list(alone)


def test_what_memory_held_before_reaches_no_row() -> None:
    model = small_model("modern")
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # this makes torch.empty fill with NaN
    try:
        batch = generate_batch(model, [[1], [2, 3, 4, 5], [6, 7]], 8, seeds=[0, 1, 2])
        assert [len(new) for new in batch] == [3] * 8
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_ends_before_the_stop_token(use_cache: bool) -> None:
    model = small_model("modern")
    whole = list(generate(model, [1], 30, seed=5, use_cache=use_cache))
    stop = whole[10]
    stopped = list(generate(model, [1], 30, seed=5, stop=stop, use_cache=use_cache))
    assert stopped == whole[: whole.index(stop)]
    several = list(generate(model, [1], 30, seed=5, stop=(whole[15], stop), use_cache=use_cache))
    assert several == whole[: min(whole.index(stop), whole.index(whole[15]))]
    unused = next(t for t in range(50) if t not in whole)
    assert list(generate(model, [1], 30, seed=5, stop=unused, use_cache=use_cache)) == whole


def test_generation_uses_no_dropout_and_leaves_the_model_training() -> None:
    model = small_model("gpt2", dropout=0.5)
    expected = list(generate(model, [1], 20, sampling=Sampling(temperature=0)))
    assert not model.training
    model.train()
    assert list(generate(model, [1], 20, sampling=Sampling(temperature=0))) == expected
    assert model.training
