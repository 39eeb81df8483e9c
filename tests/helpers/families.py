"""Folders of transformers in the forms in which GPT-2, Llama 3.2, Qwen3 and SmolLM2 are published,
with small models and vocabularies."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as splits

from helpers.common import TEXT

FAMILIES = ("gpt2", "llama3", "qwen3", "smollm2")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
CORPUS = [
    TEXT[:6000],
    "".join(map(chr, range(32, 127))) * 3,
    "naïve Ångström 日本語 🐟 don't we'll 12345 3.14\n\n\tdef f(x):\r\n        return x\n" * 20,
]
CONTEXT = 48
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def folder_of(
    family: str, folder: Path, dtype: str = "float32", shard: str = "5GB", **keys: Any
) -> Any:
    """Writes such a folder with random weights; returns transformers' model of it, fp32. `keys`
    change its config."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder.mkdir(parents=True)
    made = {"gpt2": gpt2, "llama3": llama3, "qwen3": qwen3, "smollm2": smollm2}[family](folder)
    generation = made.pop("generation", {})
    kind = {"gpt2": "gpt2", "qwen3": "qwen3"}.get(family, "llama")
    torch.manual_seed(1)
    c = AutoConfig.for_model(kind, **{**made, **keys})
    theirs = AutoModelForCausalLM.from_config(c).eval()
    for weight in theirs.parameters():
        weight.data += torch.randn(weight.shape) * 0.1
    theirs = theirs.to(getattr(torch, dtype))
    ids = {key: made[key] for key in ("bos_token_id", "eos_token_id")}
    theirs.generation_config = GenerationConfig(**{**ids, **generation})
    theirs.save_pretrained(folder, max_shard_size=shard)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def gpt2(folder: Path) -> dict[str, Any]:
    """GPT-2 with one more special token, <pad>."""
    made = _trained(splits.ByteLevel(add_prefix_space=False), 300)
    _save(folder, made, ["<|endoftext|>", "<pad>"], pad_token="<pad>")
    eot = made.token_to_id("<|endoftext|>")
    return {
        "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 302,
        "bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot + 1,
    }  # fmt: skip


def llama3(folder: Path) -> dict[str, Any]:
    """Llama 3.2: merges of all pairs that give a token, a token that only a whole word becomes, a
    token that opens each text, RoPE scaled."""
    split = splits.Sequence([_isolated(LLAMA3), splits.ByteLevel(False, use_regex=False)])
    content = json.loads(_trained(split, 320).to_str())
    ranks = content["model"]["vocab"]
    ranks["Ġunmergeable"] = 320
    pairs = []
    for token, rank in ranks.items():
        both = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in both if a in ranks and b in ranks and rank < 320]
        pairs += [(rank, sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])))]
    content["model"]["merges"] = [pair for _, some in sorted(pairs) for pair in some]
    content["model"]["ignore_merges"] = True
    made = Tokenizer.from_str(json.dumps(content))
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{i}|>" for i in range(6))]
    names += ["<|eot_id|>", "<|python_tag|>"]
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    begin = made.token_to_id(names[0])
    template = processors.TemplateProcessing(
        single=f"{names[0]} $A",
        pair=f"{names[0]} $A {names[0]}:1 $B:1",
        special_tokens=[(names[0], begin)],
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    _save(folder, made, [], bos_token=names[0], eos_token=names[1])
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 40,
    }  # fmt: skip
    return {
        **SHAPE, "vocab_size": 331, "rope_parameters": rope, "tie_word_embeddings": True,
        "bos_token_id": begin, "eos_token_id": begin + 1, "head_dim": 16,
        "generation": {"eos_token_id": [begin + 1, begin + 8]},
    }  # fmt: skip


def qwen3(folder: Path) -> dict[str, Any]:
    """Qwen3: NFC, words that are tokens of their own, heads that are wider than the model, ids that
    no token has."""
    split = _isolated(LLAMA3.replace("{1,3}", ""))
    made = _trained(splits.Sequence([split, splits.ByteLevel(False, use_regex=False)]), 310)
    made.normalizer = normalizers.NFC()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    words = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<think>er"]
    made.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    _save(folder, made, [], CHAT, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    eot = made.token_to_id("<|endoftext|>")
    return {
        **SHAPE, "vocab_size": 340, "head_dim": 24, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": eot, "eos_token_id": eot + 2,
        "generation": {"eos_token_id": [eot + 2, eot], "pad_token_id": eot},
    }  # fmt: skip


def smollm2(folder: Path) -> dict[str, Any]:
    """SmolLM2-Instruct: special tokens first, digits one by one, bytes without a token."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"]
    split = splits.Sequence([splits.Digits(True), splits.ByteLevel(add_prefix_space=False)])
    made = _trained(split, 240, names, alphabet=[])
    _save(folder, made, [], CHAT, bos_token=names[1], eos_token=names[2], pad_token=names[2])
    return {
        **SHAPE, "vocab_size": made.get_vocab_size(), "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip


def _isolated(pattern: str) -> Any:
    return splits.Split(Regex(pattern), "isolated")


def _trained(
    split: Any, size: int, names: list[str] | None = None, alphabet: list[str] | None = None
) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=names or [],
        initial_alphabet=splits.ByteLevel.alphabet() if alphabet is None else alphabet,
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


def _save(
    folder: Path, made: Tokenizer, names: list[str], chat: str | None = None, **parts: str
) -> None:
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    made.save(str(folder / "tokenizer.json"))
    if names[:1] == ["<|endoftext|>"]:
        parts = {f"{part}_token": names[0] for part in ("bos", "eos", "unk")} | parts
    settings = {**parts, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    if chat is not None:
        settings["chat_template"] = chat
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def spelled(made: Any) -> list[str]:
    """Texts that have the names of the tokenizer's added tokens in them."""
    names = [token.content for token in made.extras.added]
    return [*names, "".join(names), *(f"a{x} {y}b" for x, y in itertools.pairwise(names))]
