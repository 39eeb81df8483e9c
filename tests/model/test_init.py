"""The first weights of a new model: what each form promises, at any shape that it supports."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manta.config import load
from manta.errors import ConfigError
from manta.model.gpt import GPT, Attention, ModelConfig
from manta.model.init import InitConfig, fit_bigrams, initialise
from manta.model.rope import rotate
from manta.train.settings import PretrainConfig

few = settings(deadline=None, max_examples=25)
OWN_HEAD = ModelConfig(
    vocab_size=60, context_length=32, n_layer=2, n_embd=32, tie_embeddings=False, qk_norm=True
)


def made(c: ModelConfig, init: InitConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(c)
    initialise(model, init)
    return model


def tokens_of(c: ModelConfig, rows: int = 3) -> Tensor:
    assert c.vocab_size is not None
    generator = torch.Generator().manual_seed(9)
    return torch.randint(c.vocab_size, (rows, c.context_length), generator=generator)


def test_gpt2_is_what_the_model_starts_with_anyway() -> None:
    torch.manual_seed(0)
    plain = GPT(OWN_HEAD).state_dict()
    for name, weight in made(OWN_HEAD, InitConfig()).state_dict().items():
        assert torch.equal(weight, plain[name]), name


@pytest.mark.parametrize("family", ["gpt2", "modern"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_identity_passes_the_embeddings_on(family: str, is_tied: bool) -> None:
    c = ModelConfig(
        vocab_size=60, n_layer=3, n_embd=32, context_length=16, family=family,  # type: ignore[arg-type]
        tie_embeddings=is_tied,
    )  # fmt: skip
    model = made(c, InitConfig(kind="identity"))
    tokens = tokens_of(c)
    x = model.embedding(tokens)
    if family == "gpt2":
        x = x + model.positions(torch.arange(16))
    logits = model(tokens)
    assert torch.allclose(logits, model.head(model.norm(x), None, "mean"), atol=1e-5)
    loss = model(tokens, tokens)
    if not is_tied:  # all tokens alike
        assert not logits.any() and loss.item() == pytest.approx(math.log(60), rel=1e-6)
    loss.backward()
    rms = model.embedding.weight.data[:60].square().mean().sqrt()
    assert rms == pytest.approx(0.02 if is_tied else 0.5, rel=0.1)
    assert not model.embedding.weight.data[60:].any()  # the padding


def attention_of(model: GPT, tokens: Tensor, layer: int) -> Tensor:
    """The places that each head of a block attends to: (B, H, T, T)."""
    c, x, branch = model.config, model.embedding(tokens), None
    rope = model.cos[: tokens.size(1)], model.sin[: tokens.size(1)]
    for block in model.blocks[:layer]:
        x, branch = block(x, branch, rope, None, None)
    x = x if branch is None else x + branch
    block = model.blocks[layer]
    attention = block.get_submodule("attention")
    assert isinstance(attention, Attention)
    found = attention.qkv(block.get_submodule("attention_norm")(x))
    found = found.view(*tokens.shape, -1, c.head_size).transpose(1, 2)
    q, k, _ = found.split([c.n_head, c.kv_heads, c.kv_heads], dim=1)
    q, k = rotate(attention.q_norm(q), *rope), rotate(attention.k_norm(k), *rope)
    scores = q @ k.repeat_interleave(c.n_head // c.kv_heads, dim=1).mT / c.head_size**0.5
    at = torch.arange(tokens.size(1))
    return scores.masked_fill(at > at[:, None], -torch.inf).softmax(-1)


@few
@given(
    shape=st.sampled_from([(4, 4, 16), (4, 2, 16), (4, 1, 32), (2, 2, 64), (6, 3, 32)]),
    heads=st.integers(1, 6),
    theta=st.sampled_from([1e4, 1e5, 5e5]),
    seed=st.integers(0, 99),
)
def test_heads_look_at_the_token_that_is_their_number_back(
    shape: tuple[int, int, int], heads: int, theta: float, seed: int
) -> None:
    n_head, n_kv_head, head_size = shape
    c = ModelConfig(
        vocab_size=50, context_length=24, n_layer=2, n_head=n_head, n_kv_head=n_kv_head,
        n_embd=n_head * head_size, qk_norm=True, rope_theta=theta, tie_embeddings=False,
    )  # fmt: skip
    model = made(c, InitConfig(kind="identity", previous_tokens=heads), seed)
    with torch.no_grad():
        weights = attention_of(model, tokens_of(c, 1), layer=0)[0]
    at = torch.arange(c.context_length)
    for head in range(min(heads, n_head)):
        back = head + 1
        nearest = weights[head].argmax(dim=-1)[back:]
        hits = (nearest == at[back:] - back).float().mean()
        assert hits > 0.8, f"head {head}: {hits}"  # the rest of the channels have a small say


def chain(seed: int, size: int, count: int) -> Tensor:
    """Tokens of a Markov chain."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(size, size, generator=generator) ** 8 + 1e-3
    tokens = [0]
    for _ in range(count):
        tokens.append(int(torch.multinomial(rates[tokens[-1]], 1, generator=generator)))
    return torch.tensor(tokens)


def counts_of(tokens: Tensor, size: int) -> Tensor:
    codes = tokens[:-1] * size + tokens[1:]
    return torch.bincount(codes, minlength=size**2).view(size, size).float()


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 99), previous=st.integers(0, 2))
def test_a_model_fitted_to_pairs_predicts_them_as_the_counts_do(seed: int, previous: int) -> None:
    tokens = chain(seed, 60, 4000)
    counts = counts_of(tokens, 60)
    rate = (counts / counts.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-12)
    entropy = -(counts * rate.log()).sum().item() / counts.sum().item()
    init = InitConfig(kind="identity", bigram_steps=60, previous_tokens=previous)
    model = made(OWN_HEAD, init, seed)
    loss = fit_bigrams(model, counts, init)
    assert loss < 1.15 * entropy + 0.1
    rows = tokens[: 125 * 32 + 1]
    inputs, targets = rows[:-1].view(-1, 32), rows[1:].view(-1, 32)
    with torch.no_grad():
        assert model(inputs, targets).item() == pytest.approx(loss, rel=0.1)
    weights = model.embedding.weight.data
    assert weights[:60].square().mean().sqrt() == pytest.approx(init.rms(OWN_HEAD), rel=1e-4)
    assert not weights[60:].any() and not model.head.weight.data[60:].any()


def test_no_steps_leave_a_head_that_knows_nothing() -> None:
    counts = counts_of(chain(0, 60, 500), 60)
    model = made(OWN_HEAD, InitConfig(kind="identity"))
    loss = fit_bigrams(model, counts, InitConfig(kind="identity", bigram_steps=1))
    assert loss < math.log(60) + 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["init.bigram_steps=3"], "set model.tie_embeddings=false"),
        (
            ["init.bigram_steps=3", "model.tie_embeddings=false", "model.vocab_size=9000"],
            "vocabularies up to 8192, not 9000",
        ),
        (["init.previous_tokens=2"], "model.qk_norm=true"),
        (["init.previous_tokens=1", "model.preset=gpt2-124m"], "modern family"),
        (["init.embedding_rms=0"], "greater than 0"),
        (["init.induction_heads=[1]", "init.previous_tokens=1"], "need init.kind=identity"),
        (["init.induction_heads=[1,2]", "init.previous_tokens=1"], "init.previous_tokens=2"),
        (["init.induction_heads=[1]", "model.n_layer=1"], "model.n_layer=2"),
        (["init.induction_heads=[2]", "init.previous_tokens=2", "model.n_head=1"], "n_head=2"),
        (["init.induction_heads=[0]"], "greater than or equal to 1"),
        (
            ["init.induction_heads=[1]", "init.previous_tokens=1", "model.context_length=30000"],
            "model.rope_theta=900000000",
        ),
    ],
)
def test_what_cannot_start_so_is_said(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, arguments)
    assert words in str(caught.value)


@settings(deadline=None, max_examples=8)
@given(
    shape=st.sampled_from([(4, 4, 64), (4, 2, 64), (2, 2, 128)]),
    heads=st.lists(st.integers(1, 2), min_size=1, max_size=5),
    fits=st.booleans(),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_induction_heads_look_at_what_came_next(
    shape: tuple[int, int, int], heads: list[int], fits: bool, seed: int
) -> None:
    n_head, n_kv_head, head_size = shape
    c = ModelConfig(
        vocab_size=500, context_length=200, n_layer=2, n_head=n_head, n_kv_head=n_kv_head,
        n_embd=n_head * head_size, qk_norm=True, rope_theta=1e5, tie_embeddings=False,
    )  # fmt: skip
    init = InitConfig(
        kind="identity",
        previous_tokens=n_head,
        induction_heads=tuple(heads),
        bigram_steps=5 if fits else 0,
    )
    torch.manual_seed(seed)
    model = GPT(c)

    def fit(model: GPT) -> None:
        fit_bigrams(model, torch.rand(500, 500) ** 8, init)

    initialise(model, init, fit if fits else lambda model: None)
    tokens = torch.stack([torch.randperm(500)[:100] for _ in range(4)])
    # The text repeats itself, pair by pair in another order: each token has occurred once before,
    # and the second one of a pair after the same token.
    order = torch.randperm(50)
    again = tokens.view(4, 50, 2)[:, order].reshape(4, 100)
    weights = attention_of(model, torch.cat([tokens, again], dim=1), layer=1)
    first = (2 * order[:, None] + torch.arange(2)).flatten()  # where each stood before
    for head, alike in enumerate(heads[:n_head]):
        leader = head * n_kv_head // n_head * n_head // n_kv_head
        if heads[leader] != alike:
            continue
        rows = torch.arange(100) if alike == 1 else torch.arange(1, 100, 2)
        rows = rows[first[rows] + 1 < 100]  # where something came next before the repeat
        found = weights[:, head, 100 + rows, first[rows] + 1]
        assert found.median() > 0.7, f"head {head}, {alike} alike: {found.median()}"


def test_channels_for_signatures_are_free_at_first() -> None:
    c = ModelConfig(
        vocab_size=60, context_length=32, n_layer=2, n_embd=64, n_head=2, tie_embeddings=False,
        qk_norm=True, rope_theta=1e4,
    )  # fmt: skip
    init = InitConfig(kind="identity", previous_tokens=2, induction_heads=(1, 2), bigram_steps=4)
    model = made(c, init)
    fit_bigrams(model, counts_of(chain(0, 60, 500), 60), init)
    free = init.reserved(c)
    assert free == slice(1, 17)
    assert not model.embedding.weight[:, free].any() and not model.head.weight[:, free].any()
    assert model.embedding.weight[:60, 17:].all()
