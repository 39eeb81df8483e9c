"""GGUF, the format of llama.cpp: fp32 weights and the tokenizer in one file.

The gguf package, which writes it, is an extra: `pip install 'manta[export]'`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from manta.errors import CheckpointError, ConfigError
from manta.export.weights import model_type
from manta.model.gpt import GPT
from manta.model.rope import slowdown
from manta.model.shape import ModelConfig
from manta.text.tokenizer import Tokenizer, r50k_pat_str
from manta.text.tokenizer_extras import GPT2_DIGITS, LLAMA3, QWEN
from manta.text.tokenizer_json import merges, shown

OUTSIDE = {
    "embedding": "token_embd",
    "positions": "position_embd",
    "norm": "output_norm",
    "head": "output",
}
IN_BLOCKS = {
    "attention_norm": "attn_norm",
    "attention.qkv": "attn_qkv",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention.out": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}

# llama.cpp's names for the ways in which text is split into words.
SPLITS = {r50k_pat_str: "gpt-2", LLAMA3: "llama-bpe", QWEN: "qwen2", GPT2_DIGITS: "smollm"}


def write(file: Path, model: GPT, tokenizer: Tokenizer, name: str) -> None:
    """Writes the model and its tokenizer as GGUF.

    Raises:
        CheckpointError: llama.cpp has no such model or tokenizer.
        ConfigError: gguf is not installed.
    """
    gguf = _package()
    c = model.config
    if found := problems(c, tokenizer):
        raise CheckpointError(
            f"to=gguf: llama.cpp has no such model: {', '.join(found)}; use to=hf"
        )
    writer = gguf.GGUFWriter(file, model_type(c))
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.hidden)
    writer.add_head_count(c.n_head)
    if c.family == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
    else:
        writer.add_head_count_kv(c.kv_heads)
        writer.add_key_length(c.head_size)
        writer.add_value_length(c.head_size)
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
        writer.add_rope_dimension_count(c.head_size)
        if c.rope_scaling.kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(c.rope_scaling.factor)
    _add_tokenizer(writer, c, tokenizer, gguf)
    for key, weight in tensors(model).items():
        writer.add_tensor(key, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def problems(c: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """What llama.cpp does not have of a model and its tokenizer."""
    found = []
    if c.rope_scaling.kind == "llama3" and c.qk_norm:
        found.append("model.rope_scaling.kind=llama3 with qk_norm (its Qwen3 has no such RoPE)")
    pre = SPLITS.get(tokenizer.pattern)
    if pre is None:
        found.append("a tokenizer that splits text otherwise than GPT-2, Llama 3, Qwen and SmolLM")
    made = len(merges(tokenizer)) + sum(len(token) == 1 for token in tokenizer.ranks)
    if pre != "llama-bpe" and made < len(tokenizer.ranks):
        found.append(f"{len(tokenizer.ranks) - made} tokens that no merges make")
    return found


def _add_tokenizer(writer: Any, c: ModelConfig, tokenizer: Tokenizer, gguf: Any) -> None:
    extras = tokenizer.extras
    tokens, pairs = vocabulary(c, tokenizer)
    kinds = [gguf.TokenType.NORMAL] * tokenizer.vocab_size
    for token in extras.added:
        special, word = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
        kinds[token.id] = special if token.special else word
    kinds += [gguf.TokenType.UNUSED] * (len(tokens) - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITS[tokenizer.pattern])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(pairs)
    ids = {token.content: token.id for token in extras.added}
    names = extras.names
    writer.add_bos_token_id(ids[names["bos_token"]] if "bos_token" in names else tokenizer.start)
    writer.add_eos_token_id(ids[names["eos_token"]] if "eos_token" in names else tokenizer.eot)
    if len(tokenizer.ends) > 1:  # one of the chat's, and the end of a document
        writer.add_eot_token_id(tokenizer.eot)
    if "pad_token" in names:
        writer.add_pad_token_id(ids[names["pad_token"]])
    writer.add_add_bos_token(extras.bos is not None)
    if extras.chat_template is not None:
        template = extras.chat_template
        listed = template if isinstance(template, str) else _listed(template)
        writer.add_chat_template(listed)


def _listed(templates: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]


def check(file: Path, model: GPT, tokenizer: Tokenizer) -> dict[str, float]:
    """Reads the file with gguf's own reader; returns its numbers of tensors and tokens.

    Raises:
        CheckpointError: the file has something other than what was written.
    """
    reader = _package().GGUFReader(file)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    expected = tensors(model)
    same = found.keys() == expected.keys() and all(
        np.array_equal(found[key].reshape(weight.shape), weight) for key, weight in expected.items()
    )
    tokens, pairs = vocabulary(model.config, tokenizer)
    for key, list_ in (("tokens", tokens), ("merges", pairs)):
        same = same and reader.get_field(f"tokenizer.ggml.{key}").contents() == list_
    if not same:
        raise CheckpointError(f"{file}: gguf reads back something else; please report this")
    return {"tensors": len(found), "tokens": len(tokens)}


def vocabulary(c: ModelConfig, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The tokens as text, one for each of the model's ids, and the merges, first to last."""
    names = shown(tokenizer)
    assert c.vocab_size is not None
    tokens = [f"[unused {i}]" for i in range(c.vocab_size)]
    for token, name in names.items():
        tokens[tokenizer.ranks[token]] = name
    for added in tokenizer.extras.added:
        tokens[added.id] = added.content
    return tokens, [f"{names[left]} {names[right]}" for left, right in merges(tokenizer)]


def tensors(model: GPT) -> dict[str, np.ndarray]:
    """The weights by llama.cpp's names; a tied head is left out, as it is the embedding. llama3's
    scaling of RoPE is a tensor there: by how much each frequency is divided."""
    c = model.config
    state = {name: w.detach().float().cpu() for name, w in model.state_dict().items()}
    if c.tie_embeddings:
        del state["head.weight"]
    if c.family == "gpt2":  # llama.cpp's GPT-2 requires biases
        for name in [n for n in state if n.startswith(("blocks.", "norm."))]:
            bias = name.removesuffix("weight") + "bias"
            state.setdefault(bias, torch.zeros(len(state[name])))
    found = {}
    if c.rope_scaling.kind == "llama3":
        found["rope_freqs.weight"] = slowdown(c)
    for name, weight in state.items():
        module, _, kind = name.rpartition(".")
        if module in OUTSIDE:
            found[f"{OUTSIDE[module]}.{kind}"] = weight
            continue
        _, layer, part = module.split(".", 2)
        key = f"blk.{layer}.{IN_BLOCKS[part]}.{kind}"
        if part != "attention.qkv" or c.family == "gpt2":
            found[key] = weight
            continue
        kv = c.kv_heads * c.head_size
        q, k, v = weight.split([c.n_head * c.head_size, kv, kv])
        if not c.qk_norm:  # its Llama rotates neighbours, ours the halves of a head
            q, k = _interleaved(q, c.head_size), _interleaved(k, c.head_size)
        for letter, matrix in zip("qkv", (q, k, v), strict=True):
            found[key.replace("qkv", letter)] = matrix
    return {key: weight.contiguous().numpy() for key, weight in found.items()}


def _interleaved(weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """The weight (heads D, C), with rows i and i + D/2 of each head made neighbours."""
    heads = weight.view(-1, 2, head_size // 2, weight.size(1))
    return heads.transpose(1, 2).reshape(weight.shape)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "to=gguf needs the gguf package: run `pip install 'manta[export]'`"
        ) from None
    return gguf
