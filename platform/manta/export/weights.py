"""A model's config and weights in transformers' form, and back: names, layouts, shapes.

The gpt2 family is transformers' GPT2LMHeadModel; the modern family is LlamaForCausalLM, or
Qwen3ForCausalLM with QK-norm. This file does not import transformers.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from manta import foreign
from manta.config import Count, from_dict
from manta.errors import CheckpointError, ConfigError
from manta.model.shape import ModelConfig, RopeScaling
from manta.terminal import named
from manta.train.checkpoints.tensors import shapes as shapes_of

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Constants that some files keep next to the weights.
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
# Keys that other models have, and values with which they change nothing.
INERT: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "use_sliding_window": (False, None),
    "attention_chunk_size": (None,),
    "partial_rotary_factor": (1, None),
    "logits_scaling": (1, None),
    "logit_scale": (1, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
}
# What transformers' Qwen3 has where its config.json says nothing.
QWEN3_DEFAULTS = {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768}
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our weights, and the transformers weights whose rows it stacks, one or several."""

    ours: str
    theirs: tuple[str, ...]
    is_transposed: bool = False
    """Whether theirs is transposed: GPT-2's Conv1D holds (in, out), nn.Linear (out, in)."""


def model_type(c: ModelConfig) -> str:
    return "gpt2" if c.family == "gpt2" else "qwen3" if c.qk_norm else "llama"


def rows(c: ModelConfig) -> list[Row]:
    """Every weight that transformers' class for `c` has; ours may lack some of the biases."""
    return _gpt2_rows(c) if c.family == "gpt2" else _llama_rows(c)


def _gpt2_rows(c: ModelConfig) -> list[Row]:
    found = [
        Row("embedding.weight", ("transformer.wte.weight",)),
        Row("positions.weight", ("transformer.wpe.weight",)),
        Row("norm.weight", ("transformer.ln_f.weight",)),
        Row("norm.bias", ("transformer.ln_f.bias",)),
    ]
    for layer in range(c.n_layer):
        for ours, name, is_conv1d in (
            ("attention_norm", "ln_1", False),
            ("attention.qkv", "attn.c_attn", True),
            ("attention.out", "attn.c_proj", True),
            ("mlp_norm", "ln_2", False),
            ("mlp.up", "mlp.c_fc", True),
            ("mlp.down", "mlp.c_proj", True),
        ):
            block, theirs = f"blocks.{layer}.{ours}", f"transformer.h.{layer}.{name}"
            found.append(Row(f"{block}.weight", (f"{theirs}.weight",), is_conv1d))
            found.append(Row(f"{block}.bias", (f"{theirs}.bias",)))
    return found + _head(c)


def _llama_rows(c: ModelConfig) -> list[Row]:
    found = [
        Row("embedding.weight", ("model.embed_tokens.weight",)),
        Row("norm.weight", ("model.norm.weight",)),
    ]
    norms = ("q_norm", "k_norm") if c.qk_norm else ()
    for layer in range(c.n_layer):
        block, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        # Ours is one matrix: all queries, then all keys, then all values.
        qkv = tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in ("q", "k", "v"))
        found.append(Row(f"{block}.attention.qkv.weight", qkv))
        for ours, name in (
            ("attention_norm", "input_layernorm"),
            ("attention.out", "self_attn.o_proj"),
            *((f"attention.{norm}", f"self_attn.{norm}") for norm in norms),
            ("mlp_norm", "post_attention_layernorm"),
            ("mlp.gate", "mlp.gate_proj"),
            ("mlp.up", "mlp.up_proj"),
            ("mlp.down", "mlp.down_proj"),
        ):
            found.append(Row(f"{block}.{ours}.weight", (f"{theirs}.{name}.weight",)))
    return found + _head(c)


def _head(c: ModelConfig) -> list[Row]:
    """The row of the head; none for a tied head, which is stored once, as the embedding."""
    return [] if c.tie_embeddings else [Row("head.weight", ("lm_head.weight",))]


def to_theirs(c: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `GPT.state_dict()`, by transformers' names."""
    found = {}
    for row in rows(c):
        weight = state.get(row.ours)
        if weight is None:  # a bias that our model lacks and theirs requires
            weight = torch.zeros(len(state[row.ours.removesuffix("bias") + "weight"]))
        parts = [weight]
        if len(row.theirs) > 1:
            kv = c.kv_heads * c.head_size
            parts = list(weight.split([c.n_head * c.head_size, kv, kv]))
        for name, part in zip(row.theirs, parts, strict=True):
            found[name] = (part.T if row.is_transposed else part).contiguous()
    return found


def to_ours(c: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The reverse of `to_theirs`: a state for `GPT.load_state_dict`, fp32.

    Raises:
        CheckpointError: tensors are missing, surplus or of another shape; the message names them.
    """
    given = {_full(name): t for name, t in without_buffers(tensors).items()}
    if c.tie_embeddings:
        given.pop("lm_head.weight", None)
    wanted = rows(c)
    names = {name for row in wanted for name in row.theirs}
    problems = [f"{name} is missing" for name in sorted(names - given.keys())]
    problems += [f"{foreign.line(n)} is surplus" for n in sorted(given.keys() - names)]
    found = {}
    shapes = shapes_of(c)
    for row in wanted:
        if any(name not in given for name in row.theirs):
            continue
        parts = [given[name].float() for name in row.theirs]
        is_matrix = len(shapes[row.ours]) == 2
        weight = None
        if all(part.ndim == 2 for part in parts) == is_matrix:
            parts = [part.T if row.is_transposed and is_matrix else part for part in parts]
            if len({part.shape[1:] for part in parts}) == 1:
                weight = torch.cat(parts)
        if weight is None or weight.shape != shapes[row.ours]:
            are = " + ".join(str(tuple(part.shape)) for part in parts)
            problems.append(f"{' + '.join(row.theirs)} is {are}, not {tuple(shapes[row.ours])}")
            continue
        found[row.ours] = weight.contiguous()
    if problems:
        what = named(problems, between="; ")
        raise CheckpointError(f"{where}: not the weights of its config: {what}")
    return found


def without_buffers(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors that are weights, without constants that are next to them."""
    return {name: tensor for name, tensor in tensors.items() if not BUFFERS.search(name)}


def _full(name: str) -> str:
    """The full name of a weight; some files of GPT-2 leave out its first part."""
    is_full = name.startswith(("transformer.", "lm_head.", "model."))
    return name if is_full else f"transformer.{name}"


def to_config(c: ModelConfig, ids: Mapping[str, Any]) -> dict[str, Any]:
    """The content of transformers' config.json; `ids` has the keys for the ids of tokens, such as
    eos_token_id."""
    kind = model_type(c)
    common = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": "float32",
        "vocab_size": c.vocab_size,
        **ids,
        "tie_word_embeddings": c.tie_embeddings,
    }
    if kind == "gpt2":
        return common | {
            "n_positions": c.context_length,
            "n_embd": c.n_embd,
            "n_layer": c.n_layer,
            "n_head": c.n_head,
            "n_inner": c.mlp_hidden,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": c.norm_eps,
            "embd_pdrop": c.rates["embeddings"],
            "attn_pdrop": c.rates["attention_weights"],
            "resid_pdrop": c.rates["attention"],
        }
    return common | {
        "hidden_size": c.n_embd,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": c.context_length,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_theta": c.rope_theta, **_to_rope(c.rope_scaling)},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    }


def _to_rope(s: RopeScaling) -> dict[str, Any]:
    if s.kind == "none":
        return {"rope_type": "default"}
    if s.kind == "linear":
        return {"rope_type": "linear", "factor": s.factor}
    return {
        "rope_type": "llama3",
        "factor": s.factor,
        "low_freq_factor": s.low_freq_factor,
        "high_freq_factor": s.high_freq_factor,
        "original_max_position_embeddings": s.original_context,
    }


@dataclasses.dataclass
class _Theirs:
    """The keys of their config.json with which `from_config` computes."""

    model_type: str
    hidden_size: Count = 4096
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count = 2048
    original_max_position_embeddings: Count | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None


def from_config(theirs: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a config.json of transformers describes.

    Raises:
        CheckpointError: Manta has no such model; the message names the fields that differ.
    """
    defaults = QWEN3_DEFAULTS if theirs.get("model_type") == "qwen3" else {}
    try:
        made = foreign.check({**defaults, **theirs}, _Theirs)
    except ValueError as e:
        raise CheckpointError(f"{where}: {e}; restore the file") from None
    kind = made.model_type
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: model_type={foreign.line(kind)} is not one that Manta has: "
            f"{', '.join(ARCHITECTURES)}"
        )
    get = theirs.get
    problems = []

    def must(key: str, *values: Any) -> None:
        if key in theirs and theirs[key] not in values:
            shown = foreign.line(repr(theirs[key]))
            problems.append(f"{key}={shown} (Manta has {values[0]!r})")

    for key, values in INERT.items():
        must(key, *values)
    if set(made.layer_types or ()) - {"full_attention"}:
        must("layer_types", ["full_attention"] * len(made.layer_types or ()))
    tree: dict[str, Any] = {"vocab_size": get("vocab_size", 50257 if kind == "gpt2" else None)}
    if kind == "gpt2":
        must("activation_function", "gelu_new", "gelu_pytorch_tanh")
        must("scale_attn_weights", True)
        must("scale_attn_by_inverse_layer_idx", False)
        must("add_cross_attention", False)
        tree |= {
            "family": "gpt2",
            "context_length": get("n_positions", 1024),
            "n_layer": get("n_layer", 12),
            "n_head": get("n_head", 12),
            "n_embd": get("n_embd", 768),
            "mlp_hidden": get("n_inner"),
            "norm_eps": get("layer_norm_epsilon", 1e-5),
            "tie_embeddings": get("tie_word_embeddings", True),
        }
    else:
        scaling = _from_rope(made, problems)
        must("hidden_act", "silu")
        heads = made.num_attention_heads
        window = made.sliding_window
        cuts = window is not None and window < made.max_position_embeddings
        if cuts and get("use_sliding_window") is not False:
            must("sliding_window", None)
        rope = made.rope_parameters or {}
        tree |= {
            "family": "modern",
            "context_length": made.max_position_embeddings,
            "n_layer": get("num_hidden_layers", 32),
            "n_head": heads,
            "n_embd": made.hidden_size,
            "n_kv_head": made.num_key_value_heads or heads,
            "head_dim": None if made.head_dim == made.hidden_size / heads else made.head_dim,
            "mlp_hidden": get("intermediate_size"),
            "norm_eps": get("rms_norm_eps", 1e-6),
            "rope_theta": rope.get("rope_theta", get("rope_theta", 10000.0)),
            "rope_scaling": scaling,
            "tie_embeddings": get("tie_word_embeddings", False),
            "qk_norm": kind == "qwen3",
        }
    if problems:
        raise CheckpointError(f"{where}: Manta has no such model: {named(problems)}")
    try:
        return from_dict(ModelConfig, tree)
    except ConfigError as e:
        why = foreign.line(" ".join(str(e).split()))
        raise CheckpointError(f"{where}: {why}") from None


def _from_rope(made: _Theirs, problems: list[str]) -> dict[str, Any]:
    """Our keys for the scaling of their RoPE. Adds what Manta does not have to `problems`: it has
    one RoPE for all layers and channels, as it is, or scaled by the same factors at any length."""
    found: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        given = getattr(made, key) or {}
        kind = given.get("rope_type", given.get("type", "default"))
        per_layer = any(isinstance(value, dict) for value in given.values())
        is_known = kind in ("default", "linear", "llama3") and not (found and kind != "default")
        if not is_known or per_layer or given.get("partial_rotary_factor", 1) not in (1, None):
            shown = foreign.line(repr(given))
            problems.append(
                f"{key}={shown} (Manta has rope_type default, linear or llama3 for all layers)"
            )
        elif kind != "default":
            found = {"kind": kind}
            names = {"factor": "factor"}
            if kind == "llama3":
                names |= {name: name for name in ("low_freq_factor", "high_freq_factor")}
                names["original_max_position_embeddings"] = "original_context"
            context = made.original_max_position_embeddings or made.max_position_embeddings
            values = {"original_max_position_embeddings": context, **given}
            if made.original_max_position_embeddings is not None:
                values["original_max_position_embeddings"] = context
            problems += [f"{key} has no {name}" for name in names if values.get(name) is None]
            found |= {ours: values.get(theirs) for theirs, ours in names.items()}
    return found
