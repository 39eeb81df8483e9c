"""Adapters: what they compute, what they cost, and which of them are refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.config import from_dict, load
from manta.errors import ConfigError
from manta.finetune.settings import FinetuneConfig
from manta.model import lora
from manta.model.activations import activations
from manta.model.cost import adapters, flops_per_token, learning, weights
from manta.model.families import num_parameters
from manta.model.gpt import GPT
from manta.model.lora import TARGETS, LoraConfig
from manta.model.shape import ModelConfig
from manta.model.trainable import learning as learning_of
from manta.train.settings import PretrainConfig

few = settings(deadline=None, max_examples=20)
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt2-untied": {"family": "gpt2", "tie_embeddings": False, "qkv_bias": False},
    "modern-gqa": {"n_kv_head": 2},
    "modern-qk-norm": {"n_kv_head": 1, "qk_norm": True, "tie_embeddings": False, "head_dim": 32},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 8},
    "attention": {"rank": 4, "targets": ["qkv", "out"]},
    "up": {"rank": 2, "alpha": 3, "targets": ["up"]},
    "embeddings": {"rank": 4, "embeddings": True},
}


def shape(name: str, **keys: Any) -> ModelConfig:
    common = {"n_layer": 3, "n_head": 4, "n_embd": 96, "vocab_size": 300, "context_length": 64}
    return from_dict(ModelConfig, {**common, **SHAPES[name], **keys})


def adapted(c: ModelConfig, given: dict[str, Any], trained: bool = False) -> GPT:
    """A model with adapters; after training, their B is not zero."""
    torch.manual_seed(7)
    model = GPT(c)
    lora.attach(model, from_dict(LoraConfig, given))
    if trained:
        for name, weight in model.named_parameters():
            if name.endswith(lora.B):
                torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


@given(
    name=st.sampled_from(sorted(SHAPES)),
    rank=st.integers(1, 9),
    alpha=st.one_of(st.none(), st.floats(0.5, 40)),
    targets=st.one_of(
        st.none(), st.sets(st.sampled_from(["qkv", "out", "up", "down"]), min_size=1)
    ),
)
@few
def test_merged_adapters_compute_the_same_and_new_ones_nothing(
    name: str, rank: int, alpha: float | None, targets: set[str] | None
) -> None:
    c = shape(name, n_layer=2, n_embd=32, context_length=16)
    keys: dict[str, Any] = {"rank": rank, "alpha": alpha, "targets": targets and sorted(targets)}
    settings = from_dict(LoraConfig, keys)
    torch.manual_seed(7)
    base = GPT(c).eval().double()  # a scale of 40 makes fp32's roundings 40 times as large
    model = adapted(c, keys).double()
    tokens = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        assert torch.equal(model(tokens), base(tokens))
        model = adapted(c, keys, trained=True).double()
        own, pairs = lora.split(model.state_dict())
        assert own.keys() == base.state_dict().keys()
        alone = GPT(c).eval().double()
        alone.load_state_dict(lora.merged(own, pairs, settings.for_model(c)))
        found, expected = alone(tokens), model(tokens)
        assert (found - expected).abs().max() < 1e-9
        assert (found - base(tokens)).abs().max() > 1e-4
    shapes = {name: tuple(weight.shape) for name, weight in own.items()}
    assert lora.shapes(settings, shapes) == {n: tuple(w.shape) for n, w in pairs.items()}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_weights_that_learn_are_those_that_are_counted(name: str, adapter: str) -> None:
    c, settings = shape(name), from_dict(LoraConfig, ADAPTERS[adapter])
    model = adapted(c, ADAPTERS[adapter])
    counted = sorted(w.shape for w in learning(c, "all", settings) for _ in range(w.count))
    assert sorted(tuple(w.shape) for _, w in learning_of(model)) == counted
    every = [*weights(c), *adapters(c, settings)]
    assert sum(p.numel() for p in model.parameters()) == sum(w.total for w in every)
    # Forward and the gradients of inputs for all, the gradient of a weight for those that learn.
    looked_up = 0 if c.tie_embeddings else c.vocab_size * c.n_embd  # type: ignore[operator]
    looked_up += c.context_length * c.n_embd if c.family == "gpt2" else 0
    extra = sum(w.total for w in adapters(c, settings))
    head = c.vocab_size * c.n_embd if settings.embeddings else 0  # type: ignore[operator]
    expected = 4 * (num_parameters(c) - looked_up + extra) + 2 * (extra + head)
    assert flops_per_token(c, 16, "all", settings) == expected + 12 * 3 * c.query_size * 16


@pytest.mark.parametrize(
    ("adapter", "least"), [("all", 0.95), ("attention", 0.95), ("up", 0.6), ("embeddings", 0.98)]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_what_autograd_saves_is_what_is_predicted(
    name: str, dtype: Any, adapter: str, least: float
) -> None:
    c, batch = shape(name), 3
    model = adapted(c, ADAPTERS[adapter]).train()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    tokens = torch.zeros(batch, c.context_length, dtype=torch.long)
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saving, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = model(tokens, tokens)
    found = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    predicted = activations(
        c, batch, c.context_length, dtype, device="cpu",
        lora=from_dict(LoraConfig, ADAPTERS[adapter]),
    )  # fmt: skip
    # In the first block some of what is counted is not kept, as nothing before it learns.
    share = found / (predicted.held - predicted.loss)
    assert least < share < 1.02
    del loss


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_the_same_when_blocks_are_recomputed(mode: Any) -> None:
    c = shape("modern-gqa", n_layer=2)
    tokens = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(3))
    found = []
    for recompute in ("none", mode):
        model = adapted(c, {"rank": 4}, trained=True).train()
        model.recompute = recompute
        model(tokens, tokens).backward()
        found.append({n: w.grad for n, w in learning_of(model)})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6), name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["lora.alpha=4"], r"lora\.alpha is for adapters: set lora.rank, or omit it"),
        (["lora.rank=0"], r"lora\.rank"),
        (["lora.rank=4", "lora.dropout=1"], r"lora\.dropout=1: nothing would be left"),
        (["lora.rank=4", "lora.targets=[q_proj]"], "'q_proj': did you mean qkv\\? valid are qkv"),
        (["lora.rank=4", "lora.targets=[gates]"], "'gates': did you mean gate\\?"),
        (["lora.rank=4", "lora.targets=[qkv,qkv]"], "each matrix once"),
        (["lora.rank=4", "lora.targets=[]"], "at least one"),
        (["lora.rank=4", "trainable=head"], "lora.rank=4: with adapters, nothing else learns"),
    ],
)
def test_adapters_that_cannot_be_are_refused(keys: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(FinetuneConfig, ["base=a", "kind=text", *keys])


def test_a_model_that_starts_from_nothing_has_no_adapters() -> None:
    with pytest.raises(ConfigError, match="weights that do not learn come from a checkpoint"):
        load(PretrainConfig, ["lora.rank=8"])


def test_what_a_model_does_not_have_is_said() -> None:
    gate = from_dict(LoraConfig, {"rank": 8, "targets": ["gate", "up"]})
    assert "the gpt2 family's MLP has none" in gate.conflicts(shape("gpt2"))[0]
    assert gate.conflicts(shape("modern-gqa")) == []
    assert (
        "more than the model's matrices have (96)"
        in LoraConfig(rank=97).conflicts(shape("modern-gqa"))[0]
    )
    assert LoraConfig().conflicts(shape("gpt2")) == LoraConfig().problems() == []
    assert LoraConfig(rank=4).for_model(shape("gpt2")).targets == ("qkv", "out", "up", "down")
    assert LoraConfig(rank=4).for_model(shape("modern-gqa")).targets == TARGETS
