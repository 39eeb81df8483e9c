"""The model against transformers' own models; its loss, and the tokens that each token sees."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.models import (
    SMALL,
    SMALL_GPTS,
    VOCAB,
    gpt2_weights,
    scramble,
    small_model,
    some_tokens,
    tiny_config,
    with_weights,
)
from manta.model.families import model_of
from manta.model.gpt import GPT, IGNORED
from manta.model.shape import DropoutConfig

few = settings(deadline=None, max_examples=15)


# Parity with transformers


def llama_weights(theirs: Any) -> dict[str, Tensor]:
    """A LlamaForCausalLM's or Qwen3ForCausalLM's weights under our names."""
    state = theirs.state_dict()
    found = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    for layer in range(theirs.config.num_hidden_layers):
        block, attention = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
        # Ours is one matrix: all queries, then all keys, then all values.
        found[f"blocks.{layer}.attention.qkv.weight"] = torch.cat(
            [state[f"{attention}.{part}_proj.weight"] for part in ("q", "k", "v")]
        )
        for ours, name in (
            ("attention_norm", f"{block}.input_layernorm"),
            ("attention.out", f"{attention}.o_proj"),
            ("attention.q_norm", f"{attention}.q_norm"),
            ("attention.k_norm", f"{attention}.k_norm"),
            ("mlp_norm", f"{block}.post_attention_layernorm"),
            ("mlp.gate", f"{block}.mlp.gate_proj"),
            ("mlp.up", f"{block}.mlp.up_proj"),
            ("mlp.down", f"{block}.mlp.down_proj"),
        ):
            if f"{name}.weight" in state:
                found[f"blocks.{layer}.{ours}.weight"] = state[f"{name}.weight"]
    return found


def assert_same_logits(ours: GPT, theirs: Any) -> None:
    tokens = some_tokens(3, ours.config.context_length)
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        found = ours(tokens)
    assert expected.std() > 0.5, "logits near 0 would agree by themselves"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("keys", "zeroed"),
    [
        ({}, ()),
        ({"qkv_bias": False}, ("attn.c_attn.bias",)),
        ({"bias": False}, (".bias",)),
        ({"bias": False, "qkv_bias": True}, ("proj.bias", "c_fc.bias", "ln_1.bias", "ln_2.bias")),
        ({"tie_embeddings": False}, ()),
        ({"mlp_hidden": 96, "norm_eps": 0.1}, ()),
    ],
    ids=str,
)
def test_gpt2_family_equals_transformers_gpt2(
    keys: dict[str, Any], zeroed: tuple[str, ...]
) -> None:
    """GPT2LMHeadModel always has biases; where ours has none, its biases are 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = tiny_config(family="gpt2", **keys)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=c.context_length,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_inner=c.hidden,
            layer_norm_epsilon=c.norm_eps,
            tie_word_embeddings=c.tie_embeddings,
        )
    )
    scramble(theirs, seed=0)
    if not c.has_bias:
        zeroed = (*zeroed, "ln_f.bias")
    for name, parameter in theirs.named_parameters():
        if name.endswith(zeroed):
            parameter.data.zero_()
    assert_same_logits(with_weights(c, gpt2_weights(theirs)), theirs)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"n_kv_head": 2},
        {"n_kv_head": 1, "tie_embeddings": False},
        {"tie_embeddings": False, "mlp_hidden": 80},
        {"rope_theta": 500.0, "norm_eps": 0.1},
        {"qk_norm": True},
        {"qk_norm": True, "n_kv_head": 2, "tie_embeddings": False, "norm_eps": 0.1},
        {"qk_norm": True, "head_dim": 24, "n_kv_head": 2},
        {"head_dim": 4, "n_head": 8},
        {"rope_scaling": {"kind": "linear", "factor": 2.5}},
        {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_context": 16}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "kind": "llama3",
                "factor": 32.0,
                "original_context": 24,
                "low_freq_factor": 0.5,
                "high_freq_factor": 7.0,
            },
        },
    ],
    ids=str,
)
def test_modern_family_equals_transformers_llama_and_with_qk_norm_qwen3(
    keys: dict[str, Any],
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    c = tiny_config(family="modern", **keys)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": c.n_embd,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "max_position_embeddings": c.context_length,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
    }
    if (scaling := c.rope_scaling).kind != "none":
        shape["rope_parameters"] |= {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    theirs: Any = (
        Qwen3ForCausalLM(Qwen3Config(**shape))
        if c.qk_norm
        else LlamaForCausalLM(LlamaConfig(**shape))
    )
    scramble(theirs, seed=0)
    assert_same_logits(with_weights(c, llama_weights(theirs)), theirs)


# Loss and causality


@pytest.mark.parametrize("name", ["gpt2", "modern-gqa"])
@given(kept=st.lists(st.booleans(), min_size=14, max_size=14).filter(any), seed=st.integers(0, 99))
@few
def test_loss_counts_exactly_the_targets_that_are_not_ignored(
    name: str, kept: list[bool], seed: int
) -> None:
    model = small_model(name)
    tokens, labels = some_tokens(2, 14, vocab=50, seed=seed).split(7, dim=1)
    mask = torch.tensor(kept).view(2, 7)
    targets = labels.masked_fill(~mask, IGNORED)
    with torch.no_grad():
        log_probabilities = model(tokens).log_softmax(dim=-1)
        mean, each = model(tokens, targets), model(tokens, targets, reduction="none")
    by_hand = -log_probabilities.gather(2, labels.unsqueeze(2)).squeeze(2) * mask
    torch.testing.assert_close(each, by_hand)
    torch.testing.assert_close(mean, by_hand.sum() / mask.sum())
    torch.testing.assert_close(each.sum(), mean * mask.sum())
    assert (each[~mask] == 0).all()


@pytest.mark.parametrize("name", ["gpt2", "modern-gqa"])
@given(kept=st.lists(st.booleans(), min_size=14, max_size=14).filter(any), seed=st.integers(0, 99))
@few
def test_the_mean_loss_and_its_gradients_are_those_of_pytorch(
    name: str, kept: list[bool], seed: int
) -> None:
    model = small_model(name)
    tokens, targets = some_tokens(2, 14, vocab=50, seed=seed).split(7, dim=1)
    targets = targets.masked_fill(~torch.tensor(kept).view(2, 7), IGNORED)
    loss = model(tokens, targets)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    found, theirs = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for gradient, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def test_the_loss_of_no_targets_is_0_with_gradients_of_0() -> None:
    model = small_model("modern")
    tokens = some_tokens(2, 8, vocab=50)
    loss = model(tokens, torch.full_like(tokens, IGNORED))
    assert loss == 0
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), key


def test_a_broken_model_still_says_nan() -> None:
    model = small_model("modern")
    tokens = some_tokens(2, 8, vocab=50)
    targets = tokens.clone()
    targets[:, 1:] = IGNORED
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
        assert model(tokens, targets).isnan()


@pytest.mark.parametrize("name", SMALL)
@given(changed=st.integers(0, 7), token=st.integers(0, 49), seed=st.integers(0, 99))
@few
def test_a_token_changes_no_logits_before_it(
    name: str, changed: int, token: int, seed: int
) -> None:
    model = small_model(name)
    tokens = some_tokens(1, 8, vocab=50, seed=seed)
    other = tokens.clone()
    other[0, changed] = token
    with torch.no_grad():
        before, after = model(tokens), model(other)
    torch.testing.assert_close(after[:, :changed], before[:, :changed], atol=1e-5, rtol=1e-5)
    if token != tokens[0, changed]:
        difference = (after - before)[0, changed:].abs().amax(dim=-1)
        assert (difference > 1e-4).all(), "all from there on see it"


@pytest.mark.parametrize("name", SMALL)
def test_a_new_model_predicts_nearly_uniformly(name: str) -> None:
    torch.manual_seed(0)
    model = model_of(tiny_config(**SMALL[name]))
    tokens, targets = some_tokens(8, 64).split(32, dim=1)
    uniform = torch.tensor(float(VOCAB)).log()
    torch.testing.assert_close(model(tokens, targets), uniform, atol=0.2, rtol=0)


def test_dropout_acts_in_training_only() -> None:
    model = small_model("gpt2", dropout=0.5)
    tokens = some_tokens(1, 8, vocab=50)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), model(tokens))
        model.train()
        assert not torch.allclose(model(tokens), model(tokens))


@pytest.mark.parametrize("place", [f.name for f in dataclasses.fields(DropoutConfig)])
@pytest.mark.parametrize("name", SMALL_GPTS)
def test_each_place_has_its_own_dropout(name: str, place: str) -> None:
    tokens = some_tokens(1, 8, vocab=50)
    changes = {}
    for rate in (0.0, 0.5):
        # Everywhere else there is none, whatever the rate that stands for all places.
        others = dict.fromkeys(tiny_config(**SMALL[name]).rates, 0.0)
        model = small_model(name, dropout=0.5, dropouts={**others, place: rate}).train()
        with torch.no_grad():
            changes[rate] = not torch.allclose(model(tokens), model(tokens))
    assert changes == {0.0: False, 0.5: True}


def test_every_parameter_gets_a_gradient() -> None:
    for name in SMALL:
        model = small_model(name)
        tokens, targets = some_tokens(2, 16, vocab=50).split(8, dim=1)
        F.relu(model(tokens, targets)).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (name, key)
