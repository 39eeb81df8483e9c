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
from manta.model.shape import ModelConfig
from manta.text.tokenizer import Tokenizer, byte_of_character, r50k_pat_str
from manta.text.tokenizer_json import halves

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


def write(file: Path, model: GPT, tokenizer: Tokenizer, name: str) -> None:
    """Writes the model and its tokenizer as GGUF.

    Raises:
        CheckpointError: llama.cpp has no such tokenizer.
        ConfigError: gguf is not installed.
    """
    gguf = _package()
    c = model.config
    if tokenizer.pattern != r50k_pat_str:
        raise CheckpointError(
            "to=gguf: the tokenizer does not split text as GPT-2's does; use to=hf"
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
    tokens, merges = vocabulary(c, tokenizer)
    kinds = [gguf.TokenType.NORMAL] * tokenizer.eot + [gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.UNUSED] * (len(tokens) - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
    for key, weight in tensors(model).items():
        writer.add_tensor(key, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    tokens, merges = vocabulary(model.config, tokenizer)
    for key, list_ in (("tokens", tokens), ("merges", merges)):
        same = same and reader.get_field(f"tokenizer.ggml.{key}").contents() == list_
    if not same:
        raise CheckpointError(f"{file}: gguf reads back something else; please report this")
    return {"tensors": len(found), "tokens": len(tokens)}


def vocabulary(c: ModelConfig, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The tokens as text, one for each of the model's ids, and the merges, first to last."""
    shown = {byte: character for character, byte in byte_of_character().items()}
    ordered = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    names = {token: "".join(shown[byte] for byte in token) for token in ordered}
    pairs = [halves(token, tokenizer.ranks) for token in ordered if len(token) > 1]
    tokens = [*names.values(), END_OF_TEXT]
    assert c.vocab_size is not None
    tokens += [f"[unused {i}]" for i in range(len(tokens), c.vocab_size)]
    return tokens, [f"{names[left]} {names[right]}" for left, right in pairs]


def tensors(model: GPT) -> dict[str, np.ndarray]:
    """The weights by llama.cpp's names; a tied head is left out, as it is the embedding."""
    c = model.config
    state = {name: w.detach().float().cpu() for name, w in model.state_dict().items()}
    if c.tie_embeddings:
        del state["head.weight"]
    if c.family == "gpt2":  # llama.cpp's GPT-2 requires biases
        for name in [n for n in state if n.startswith(("blocks.", "norm."))]:
            bias = name.removesuffix("weight") + "bias"
            state.setdefault(bias, torch.zeros(len(state[name])))
    found = {}
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
