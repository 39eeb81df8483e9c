"""Models of each family that is exported, saved as checkpoints."""

from pathlib import Path
from typing import Any

import torch

from manta import layout, storage
from manta.config import from_dict
from manta.model import families
from manta.model.gpt import LanguageModel, ModelConfig
from manta.model.lora import LoraConfig
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.plan import with_vocabulary
from manta.train.settings import PretrainConfig, save_run_config

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt2 without biases": {"family": "gpt2", "bias": False, "qkv_bias": False},
    "gpt2, a head of its own": {"family": "gpt2", "tie_embeddings": False, "norm_eps": 0.01},
    "llama": {"family": "modern"},
    "llama, grouped": {"family": "modern", "n_kv_head": 2, "tie_embeddings": False},
    "qwen3": {"family": "modern", "qk_norm": True, "rope_theta": 500.0, "mlp_hidden": 80},
}


def model_of(keys: dict[str, Any], vocab_size: int) -> Any:
    """A small model whose weights are nowhere near 0."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 32}
    torch.manual_seed(0)
    c = from_dict(ModelConfig, {**shape, "vocab_size": vocab_size, **keys})
    model = families.model_of(c).eval()
    for name, weight in model.named_parameters():
        scale = 0.3 if name.endswith(".bias") else 0.1
        weight.data = torch.randn(weight.shape) * scale + ("norm" in name and weight.ndim == 1)
    for name in ("embedding", "head"):  # the padding
        getattr(model, name).weight.data[vocab_size:] = 0
    return model


def save(
    model: LanguageModel,
    tokenizer: Tokenizer,
    home: Path,
    name: str = "run",
    adapters_of: LoraConfig = LoraConfig(),  # noqa: B008  # frozen
) -> str:
    """Saves the model as the first checkpoint of a run; `adapters_of`: how its adapters are."""
    path = layout.checkpoint_folder(f"{home}/runs/{name}", 7)
    Path(path).mkdir(parents=True)
    weights = dict(model.state_dict())
    if model.config.tie_embeddings:
        del weights["head.weight"]
    state = TrainState(step=7)
    names = checkpoint.write_model(Path(path), model.config, weights, tokenizer, state, adapters_of)
    files = {
        n: {"size": (Path(path) / n).stat().st_size, "sha256": storage.sha256(f"{path}/{n}")}
        for n in names
    }
    storage.write_json(f"{path}/MANIFEST.json", {"files": files})
    return path


def save_untrained(c: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Saves a run that has not learnt anything: its config, and a checkpoint with new weights."""
    torch.manual_seed(c.seed)
    model = families.model_of(with_vocabulary(c.model, tokenizer))
    save(model, tokenizer, Path(c.home_folder), c.name)
    save_run_config(c)
