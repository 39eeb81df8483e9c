"""Presets and shapes: their parameters and FLOPs, and what is refused by name."""

from typing import Any

import pytest
import torch
from hypothesis import settings

from helpers.models import R50K_SIZE, SMALL, config_of, small_model
from manta.errors import ConfigError
from manta.model.cost import flops_per_token
from manta.model.families import num_parameters
from manta.model.presets import PRESETS

few = settings(deadline=None, max_examples=15)


# Presets and cost


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-163m", 163_009_536),
        ("gpt2-350m", 354_823_168),
        ("lf-269m", 269_600_768),
        ("casa-350m", 350_357_504),
        ("gpt2-1.5b", 1_557_611_200),
    ],
)
def test_presets_have_their_published_parameter_counts(preset: str, count: int) -> None:
    assert num_parameters(config_of(preset=preset, vocab_size=R50K_SIZE)) == count


def test_quickstart_has_4_million_parameters_with_its_own_vocabulary() -> None:
    # The MLP's width is 8/3 of 256, rounded up to a multiple of 64: 704.
    layer = 4 * 256 * 256 + 3 * 256 * 704 + 2 * 256
    count = num_parameters(config_of(preset="quickstart", vocab_size=4096))
    assert count == 4096 * 256 + 4 * layer + 256
    assert 3e6 < count < 6e6


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"char-rnn"}))  # it has no LSTM
def test_transformers_counts_the_same_parameters(preset: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    c = config_of(preset=preset, vocab_size=R50K_SIZE)
    with torch.device("meta"):
        theirs: Any
        if c.family == "gpt2":
            theirs = GPT2LMHeadModel(
                GPT2Config(
                    n_positions=c.context_length,
                    n_embd=c.n_embd,
                    n_layer=c.n_layer,
                    n_head=c.n_head,
                    tie_word_embeddings=c.tie_embeddings,
                )
            )
        else:
            theirs = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=R50K_SIZE,
                    hidden_size=c.n_embd,
                    intermediate_size=c.hidden,
                    num_hidden_layers=c.n_layer,
                    num_attention_heads=c.n_head,
                    tie_word_embeddings=c.tie_embeddings,
                )
            )
    # transformers' GPT-2 cannot leave out the biases on query, key and value.
    lacking = 0 if c.family == "modern" or c.has_qkv_bias else 3 * c.n_embd * c.n_layer
    assert num_parameters(c) == theirs.num_parameters() - lacking


@pytest.mark.parametrize("name", SMALL)
def test_counted_parameters_are_those_of_the_model(name: str) -> None:
    model = small_model(name)
    weights = {weight.data_ptr(): weight.numel() for weight in model.state_dict().values()}
    assert num_parameters(model.config) == sum(weights.values())


def test_flops_of_gpt2_124m_equal_the_hand_calculation() -> None:
    # A layer has 12 C^2 in matrices and 13 C in biases and norms; then come the last norm and the
    # head, which is the embedding. The position table takes part in no product.
    n = 12 * (12 * 768 * 768 + 13 * 768) + 2 * 768 + 50257 * 768
    assert n == 124_439_808 - 1024 * 768
    expected = 6 * n + 12 * 12 * 768 * 1024
    assert expected == 855_166_464
    assert flops_per_token(config_of(preset="gpt2-124m", vocab_size=R50K_SIZE), 1024) == expected


def test_flops_do_not_count_an_embedding_that_is_only_looked_up() -> None:
    gpt2 = config_of(preset="gpt2-163m", vocab_size=R50K_SIZE)
    n = 163_009_536 - 1024 * 768 - 50257 * 768
    assert flops_per_token(gpt2, 256) == 6 * n + 12 * 12 * 768 * 256
    tied, untied = (
        config_of(preset="lf-269m", vocab_size=R50K_SIZE, tie_embeddings=tie)
        for tie in (True, False)
    )
    assert flops_per_token(tied, 2048) == flops_per_token(untied, 2048)


# Configs


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"n_embd": 100, "n_head": 3}, "n_embd=100 does not divide by n_head=3"),
        ({"n_embd": 12, "n_head": 4}, "RoPE needs an even head size"),
        ({"head_dim": 15}, "head_dim is 15: RoPE needs an even head size"),
        ({"family": "gpt2", "head_dim": 16}, "head_dim=16: with family=gpt2 it is n_embd / n_head"),
        (
            {"family": "gpt2", "rope_scaling": {"kind": "linear", "factor": 2}},
            "rope_scaling is for family=modern",
        ),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling.kind=none has no factors"),
        (
            {"rope_scaling": {"kind": "linear", "low_freq_factor": 2}},
            "rope_scaling.kind=linear has a factor only",
        ),
        (
            {"rope_scaling": {"kind": "llama3", "low_freq_factor": 4}},
            "rope_scaling.high_freq_factor=4: it should be more than low_freq_factor=4",
        ),
        ({"n_head": 4, "n_kv_head": 3}, "n_head=4 does not divide by n_kv_head=3"),
        ({"n_head": 4, "n_kv_head": 8}, "n_head=4 does not divide by n_kv_head=8"),
        ({"bias": True}, "bias=true is for family=gpt2"),
        ({"qkv_bias": True}, "qkv_bias=true is for family=gpt2"),
        ({"family": "gpt2", "qk_norm": True}, "qk_norm and n_kv_head are for family=modern"),
        ({"family": "gpt2", "n_kv_head": 2}, "qk_norm and n_kv_head are for family=modern"),
        ({"family": "llama"}, "family='llama'"),
        ({"preset": "gpt2-125m"}, "did you mean gpt2-124m"),
        ({"n_layers": 4}, "did you mean n_layer"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"n_head": True}, "n_head=True"),
        ({"context_length": "long"}, "context_length='long'"),
        ({"dropout": 1.5}, "dropout=1.5"),
    ],
    ids=str,
)
def test_a_wrong_shape_is_refused_by_name(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(**keys)
    assert said in str(refused.value)


def test_all_problems_of_a_shape_are_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*n_embd=100.*n_kv_head=2.*bias=true"):
        config_of(n_embd=100, n_head=3, n_kv_head=2, bias=True)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_keys_go_over_a_preset(preset: str) -> None:
    c = config_of(preset=preset, n_layer=7, vocab_size=R50K_SIZE)
    assert c.n_layer == 7
    expected = {**PRESETS[preset], "n_layer": 7}
    assert {key: getattr(c, key) for key in expected} == expected
