"""Small models with random weights, and transformers' weights under Manta's names."""

from typing import Any

import torch
from torch import Tensor

from manta.config import from_dict
from manta.model.families import model_of
from manta.model.gpt import GPT, ModelConfig

R50K_SIZE = 50257
VOCAB = 97

# One of each kind of attention and position, and one with neither; small, so that a context is
# soon full.
SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "modern": {"family": "modern"},
    "modern-gqa": {"n_kv_head": 2, "tie_embeddings": False},
    "modern-qk-norm": {"n_kv_head": 1, "qk_norm": True},
    "modern-wide-heads": {
        "n_kv_head": 2,
        "head_dim": 12,
        "rope_scaling": {
            "kind": "llama3",
            "factor": 4.0,
            "original_context": 8,
            "high_freq_factor": 2.0,
        },
    },
    "lstm": {"family": "lstm"},
}
SMALL_GPTS = [name for name in SMALL if name != "lstm"]


def config_of(**keys: Any) -> ModelConfig:
    return from_dict(ModelConfig, keys)


def tiny_config(**keys: Any) -> ModelConfig:
    """Two layers, 64 wide, four heads: the Hugging Face models get the same shape."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 32, "vocab_size": VOCAB}
    return config_of(**{**shape, **keys})


def small_model(name: str, context_length: int = 8, **keys: Any) -> Any:
    shape = {"n_embd": 32, "context_length": context_length, "vocab_size": 50, **SMALL[name]}
    model = model_of(tiny_config(**{**shape, **keys}))
    return scramble(model, seed=1).eval()


def scramble(model: Any, seed: int) -> Any:
    """Puts random numbers into every parameter, also biases and norms: their first values, 0 and 1,
    would hide a mistake."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=random)
    return model


def some_tokens(batch: int, length: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, length), generator=random)


def gpt2_weights(theirs: Any) -> dict[str, Tensor]:
    """A GPT2LMHeadModel's weights under our names."""
    state = theirs.state_dict()
    found = {
        "embedding.weight": state["transformer.wte.weight"],
        "positions.weight": state["transformer.wpe.weight"],
        "norm.weight": state["transformer.ln_f.weight"],
        "norm.bias": state["transformer.ln_f.bias"],
        "head.weight": state["lm_head.weight"],
    }
    for layer in range(theirs.config.n_layer):
        for ours, name, is_conv1d in (
            ("attention_norm", "ln_1", False),
            ("attention.qkv", "attn.c_attn", True),
            ("attention.out", "attn.c_proj", True),
            ("mlp_norm", "ln_2", False),
            ("mlp.up", "mlp.c_fc", True),
            ("mlp.down", "mlp.c_proj", True),
        ):
            weight = state[f"transformer.h.{layer}.{name}.weight"]
            # GPT-2's Conv1D holds (in, out), nn.Linear (out, in).
            found[f"blocks.{layer}.{ours}.weight"] = weight.T if is_conv1d else weight
            found[f"blocks.{layer}.{ours}.bias"] = state[f"transformer.h.{layer}.{name}.bias"]
    return found


def with_weights(c: ModelConfig, weights: dict[str, Tensor]) -> GPT:
    """One of our models with these weights, all of them used; biases that it lacks must be 0."""
    model = GPT(c).eval()
    lacking = weights.keys() - model.state_dict().keys()
    for name in lacking:
        assert name.endswith(".bias") and not weights[name].any(), name
    model.load_state_dict({k: v for k, v in weights.items() if k not in lacking}, strict=True)
    return model
