"""llm.c's checkpoints of GPT-2: a header of 256 numbers, then all weights in a fixed order.

The layout is that of llm.c's train_gpt2.c (versions 3, fp32, and 5, bf16). Linear layers are
(out, in), as in Manta.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from manta.config import from_dict
from manta.errors import CheckpointError, ConfigError
from manta.model import cost
from manta.model.gpt import GPT
from manta.model.shape import ModelConfig
from manta.train.checkpoints import tensors

MAGIC = 20240326
HEADER = 256  # int32 each
DTYPES = {3: torch.float32, 5: torch.bfloat16}
FIRST = ["embedding.weight", "positions.weight"]
OF_LAYERS = ["attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up", "mlp.down"]
LAST = ["norm.weight", "norm.bias"]


def order(c: ModelConfig) -> list[str]:
    """Our names in the file's order: one weight of all layers, then the next weight."""
    names = [f"{part}.{kind}" for part in OF_LAYERS for kind in ("weight", "bias")]
    layers = [f"blocks.{layer}.{name}" for name in names for layer in range(c.n_layer)]
    return [*FIRST, *layers, *LAST]


def problems(c: ModelConfig) -> list[str]:
    """The fields of a config that llm.c does not support, each with what llm.c has."""
    found = []
    if c.family != "gpt2":
        return [f"model.family={c.family} (llm.c has gpt2)"]
    if not c.tie_embeddings:
        found.append("model.tie_embeddings=false (llm.c ties them)")
    if c.hidden != 4 * c.n_embd:
        found.append(f"model.mlp_hidden={c.hidden} (llm.c has 4 n_embd, {4 * c.n_embd})")
    if c.norm_eps != 1e-5:
        found.append(f"model.norm_eps={c.norm_eps:g} (llm.c has 1e-05)")
    return found


def write(file: Path, model: GPT) -> None:
    """Writes version 3, fp32. Biases that the model lacks are 0.

    Raises:
        CheckpointError: llm.c has no such model.
    """
    c = model.config
    if found := problems(c):
        raise CheckpointError(f"to=llmc: llm.c has no such model: {', '.join(found)}; use to=hf")
    state = model.state_dict()
    header = np.zeros(HEADER, dtype=np.int32)
    assert c.vocab_size is not None
    shape = [c.context_length, c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.padded_vocab_size]
    header[:8] = [MAGIC, 3, *shape]
    with file.open("wb") as out:
        out.write(header.tobytes())
        for name in order(c):
            weight = state.get(name)
            if weight is None:
                weight = torch.zeros(len(state[name.removesuffix("bias") + "weight"]))
            if name == "embedding.weight":
                padding = c.padded_vocab_size - c.vocab_size
                weight = torch.nn.functional.pad(weight, (0, 0, 0, padding))
            out.write(weight.detach().float().cpu().contiguous().numpy().tobytes())


def read(file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of a file, and its weights by our names, fp32.

    Raises:
        CheckpointError: the file is missing, cut short, or not a checkpoint of llm.c, or it has
            values that are NaN or infinite.
    """
    if not file.is_file():
        raise CheckpointError(f"path={file}: no such file; give a .bin that llm.c wrote")
    with file.open("rb") as data:
        header = np.frombuffer(_take(data, 4 * HEADER, file), dtype=np.int32)
        magic, version, length, vocab, layers, heads, channels, padded = header[:8].tolist()
        if magic != MAGIC or version not in DTYPES:
            raise CheckpointError(
                f"{file}: not an llm.c model (magic {magic}, version {version}; expected "
                f"{MAGIC}, and 3 or 5)"
            )
        sizes = {
            "vocab_size": vocab,
            "context_length": length,
            "n_layer": layers,
            "n_head": heads,
            "n_embd": channels,
        }
        try:
            c = from_dict(ModelConfig, {"family": "gpt2", **sizes})
        except ConfigError as e:
            why = " ".join(str(e).split())
            raise CheckpointError(f"{file}: {why}; get the file again") from None
        if padded < vocab:
            raise CheckpointError(
                f"{file}: its vocabulary of {vocab} tokens has {padded} rows with padding; get the "
                "file again"
            )
        _check_size(file, c, padded, DTYPES[version].itemsize)
        with torch.device("meta"):
            shapes = {name: weight.shape for name, weight in GPT(c).state_dict().items()}
        state = {}
        for name in order(c):
            shape = (padded, channels) if name == "embedding.weight" else tuple(shapes[name])
            count = int(np.prod(shape))
            dtype = DTYPES[version]
            raw = bytearray(_take(data, count * dtype.itemsize, file))
            state[name] = torch.frombuffer(raw, dtype=dtype).float().view(shape)
        state["embedding.weight"] = state["embedding.weight"][:vocab].clone()
    tensors.check_finite(state, str(file))
    return c, state


def _check_size(file: Path, c: ModelConfig, padded: int, itemsize: int) -> None:
    """Checks that the file has as many bytes as the model in its header, before it is built.

    Raises:
        CheckpointError: it is cut short, or data continues after the last weight.
    """
    rows = padded - c.padded_vocab_size  # llm.c's own padding may differ from ours
    elements = sum(weight.total for weight in cost.weights(c)) + rows * c.n_embd
    expected, found = 4 * HEADER + itemsize * elements, file.stat().st_size
    if found != expected:
        what = "cut short" if found < expected else "data continues after the last weight"
        raise CheckpointError(
            f"{file}: {what} ({found:,} bytes; the model in its header has {expected:,}); get the "
            "file again"
        )


def _take(data: BinaryIO, count: int, file: Path) -> bytes:
    found = data.read(count)
    if len(found) < count:
        raise CheckpointError(f"{file}: cut short; get the file again")
    return found
