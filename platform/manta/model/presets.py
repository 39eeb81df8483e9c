"""Named model shapes, as data: each lists its differences from ModelConfig's defaults.

The vocabulary comes from the dataset's tokenizer; parameter counts are with r50k_base (50,257).
"""

from typing import Any

GPT2: dict[str, Any] = {
    "family": "gpt2",
    "context_length": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
}

PRESETS: dict[str, dict[str, Any]] = {
    # ModelConfig's defaults: 4.2M with the default vocabulary of 4,096.
    "quickstart": {},
    # GPT-2 small, 124,439,808 parameters (Radford et al. 2019).
    "gpt2-124m": GPT2,
    # The same with an untied head and no bias on query, key and value: 163,009,536, the model of
    # "Build a Large Language Model (from Scratch)".
    "gpt2-163m": {**GPT2, "tie_embeddings": False, "qkv_bias": False},
    # GPT-2 medium, 354,823,168.
    "gpt2-350m": {**GPT2, "n_layer": 24, "n_head": 16, "n_embd": 1024},
    # LF_LLM-269M, 269,600,768.
    "lf-269m": {
        "family": "modern",
        "context_length": 2048,
        "n_layer": 16,
        "n_head": 16,
        "n_embd": 1024,
        "mlp_hidden": 3072,
    },
    # 350,357,504. RoPE and a context of 2,048 are given; the MLP's width is chosen for the size.
    "casa-350m": {
        "family": "modern",
        "context_length": 2048,
        "n_layer": 24,
        "n_head": 16,
        "n_embd": 1024,
        "mlp_hidden": 2688,
    },
    # GPT-2 XL, 1,557,611,200.
    "gpt2-1.5b": {**GPT2, "n_layer": 48, "n_head": 25, "n_embd": 1600},
    # The defaults of char-rnn (Karpathy 2015), for tokens that are characters.
    "char-rnn": {
        "family": "lstm",
        "context_length": 50,
        "n_layer": 2,
        "n_embd": 128,
        "tie_embeddings": False,
    },
}

# `model.depth` alone gives a shape through these. Width grows with depth, as in nanochat.
CHANNELS_PER_BLOCK = 64
HEAD_SIZE = 64
DEPTH_CONTEXT = 1024


def shape_of_depth(depth: Any) -> dict[str, Any]:
    """Returns the keys of a model of `depth` blocks; {} if `depth` is not a positive integer."""
    if type(depth) is not int or depth < 1:
        return {}
    return {
        "family": "modern",
        "context_length": DEPTH_CONTEXT,
        "n_layer": depth,
        "n_head": depth * CHANNELS_PER_BLOCK // HEAD_SIZE,
        "n_embd": depth * CHANNELS_PER_BLOCK,
        "qk_norm": True,
    }
