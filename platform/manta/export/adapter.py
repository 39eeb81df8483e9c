"""A model with LoRA's adapters as PEFT has it: a transformers folder, and one with the adapters.

PEFT is an extra: `pip install 'manta[peft]'`. It opens what was written, and is compared, before
the folder is in its place.
"""

from pathlib import Path
from typing import Any

import torch

from manta.errors import CheckpointError, ConfigError
from manta.export import huggingface, weights
from manta.export.special_tokens import write_json
from manta.model import lora
from manta.model.gpt import GPT
from manta.model.shape import ModelConfig
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import tensors
from manta.train.checkpoints.adapters import Adapter

# Names within the written folder.
BASE, ADAPTER = "base", "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
PREFIX = "base_model.model."
ABOUT_BASE = (
    "The base of the adapter in ../adapter: PEFT's PeftModel.from_pretrained takes both. Alone, it "
    "is the model without its adapter.\n"
)
USE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("FOLDER/base")
model = PeftModel.from_pretrained(base, "FOLDER/adapter")  # .merge_and_unload() merges it
tokenizer = AutoTokenizer.from_pretrained("FOLDER/base")
tokens = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))
```"""


def write(folder: Path, base: GPT, adapter: Adapter, tokenizer: Tokenizer, card: str) -> None:
    """Writes the base, the adapter and the model card to an existing folder, which will have its
    name.

    Raises:
        CheckpointError: transformers has no such model.
    """
    (folder / BASE).mkdir()
    huggingface.write(folder / BASE, base, tokenizer, ABOUT_BASE)
    (folder / ADAPTER).mkdir()
    tensors.save(_theirs(base.config, adapter), folder / ADAPTER / WEIGHTS)
    config = _config(base.config, adapter, f"{folder.name}/{BASE}")
    write_json(folder / ADAPTER / CONFIG, config)
    (folder / "README.md").write_text(card)


def _theirs(c: ModelConfig, adapter: Adapter) -> dict[str, torch.Tensor]:
    """The adapters' weights by PEFT's names. Where transformers has several matrices for one of
    ours, each has a copy of A and its own rows of B."""
    rows = {row.ours.removesuffix(".weight"): row for row in weights.rows(c)}
    found = {}
    for layer, a, b in lora.pairs(adapter.weights):
        names = rows[layer].theirs
        kv = c.kv_heads * c.head_size
        parts = b.split([c.query_size, kv, kv]) if len(names) > 1 else [b]
        for name, part in zip(names, parts, strict=True):
            module = PREFIX + name.removesuffix(".weight")
            found[f"{module}.lora_A.weight"] = a.float().clone()
            found[f"{module}.lora_B.weight"] = part.float().clone()
    return found


def _config(c: ModelConfig, adapter: Adapter, base: str) -> dict[str, Any]:
    """The content of PEFT's config of an adapter."""
    assert adapter.config.rank is not None
    is_gpt2 = c.family == "gpt2"
    names = [name for row in weights.rows(c) for name in row.theirs]
    wanted = {name.removeprefix(PREFIX) for name in _modules(c, adapter)}
    # transformers' GPT-2 has two matrices named c_proj, so the name of what has them is needed.
    parts = 2 if is_gpt2 else 1
    targets = [".".join(name.split(".")[-1 - parts : -1]) for name in names if name in wanted]
    return {
        "peft_type": "LORA",
        # With a classifier's task, PEFT would look for the head among the adapter's weights.
        "task_type": None if c.labels else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.scale * adapter.config.rank,
        "lora_dropout": adapter.config.dropout,
        "target_modules": sorted(set(targets)),
        "fan_in_fan_out": is_gpt2,
        "bias": "none",
        "inference_mode": True,
    }


def _modules(c: ModelConfig, adapter: Adapter) -> set[str]:
    """The names of transformers' weights that have an adapter."""
    layers = {layer for layer, *_ in lora.pairs(adapter.weights)}
    found = [row for row in weights.rows(c) if row.ours.removesuffix(".weight") in layers]
    return {name for row in found for name in row.theirs}


def check(folder: Path, model: GPT, tokenizer: Tokenizer) -> float:
    """Opens the folder with PEFT, and compares its logits with those of the model, before and after
    PEFT merges the adapter; returns the largest difference of a logit.

    Raises:
        CheckpointError: a logit differs.
        ConfigError: PEFT is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ConfigError(
            "to=peft opens what it wrote with PEFT, which is not installed: run "
            "`pip install 'manta[peft]'`"
        ) from None
    theirs: Any = PeftModel.from_pretrained(huggingface.opened(folder / BASE), folder / ADAPTER)
    theirs.eval()
    found = max(
        huggingface.difference(theirs, model, tokenizer),
        huggingface.difference(theirs.merge_and_unload(), model, tokenizer),
    )
    if not found <= huggingface.TOLERANCE:
        raise CheckpointError(
            f"{folder}: logits of PEFT's model differ by {found:.2g} (at most "
            f"{huggingface.TOLERANCE:g} is allowed); please report this with the model's config"
        )
    return found
