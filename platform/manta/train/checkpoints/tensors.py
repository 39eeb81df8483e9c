"""Files of tensors (safetensors): their header is checked before anything is read, and the weights
against a model's config before the model is built."""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from manta import foreign, storage
from manta.config import Natural
from manta.errors import CheckpointError
from manta.model.families import model_of
from manta.model.gpt import ModelConfig, unpadded
from manta.terminal import named

# Bytes of an element, by its name in a header.
SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
WEIGHTS = ("F16", "BF16", "F32", "F64")  # the types of weights that Manta reads
METADATA = "__metadata__"
# RoPE's table is the one part of a model that grows with its config and has no weight in the file.
MOST_CONTEXT = 1 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, its shape, and its place in the file's data."""

    dtype: str
    shape: tuple[Natural, ...]
    data_offsets: tuple[Natural, Natural]


def header(path: str) -> dict[str, Entry]:
    """The tensors of a file: eight bytes with the header's length, that much JSON, then the data.

    Raises:
        CheckpointError: it is not such a file, or not whole; the message says what is wrong.
    """
    fs, inside = storage.filesystem(path)
    try:
        size = storage.info(path).size or 0
        with fs.open_input_stream(inside, compression=None) as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("no header")
            if length > foreign.MOST_BYTES:
                raise ValueError(f"a header of {length:,} bytes")
            content = foreign.parse(f.read(length), dict)
        content.pop(METADATA, None)
        found = foreign.check(content, dict[str, Entry])
        _check_places(found, size - 8 - length)
    except (ValueError, OSError) as e:
        why = foreign.line(str(e))
        if isinstance(e, OSError) and not isinstance(e, FileNotFoundError):
            raise CheckpointError(f"{path}: cannot be read ({why}); get it again") from None
        raise CheckpointError(
            f"{path}: not safetensors data, despite its name ({why}); get it again"
        ) from None
    return found


def _check_places(found: Mapping[str, Entry], size: int) -> None:
    """Raises ValueError unless the tensors fill the file's `size` bytes of data, each once."""
    end = 0
    for name, entry in sorted(found.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if entry.dtype not in SIZES:
            raise ValueError(f"{name} has the type {entry.dtype!r}, which Manta does not know")
        if start != end or stop - start != math.prod(entry.shape) * SIZES[entry.dtype]:
            raise ValueError(f"{name} is not where its shape and the tensors before it put it")
        end = stop
    if end != size:
        raise ValueError(f"its tensors have {end:,} bytes, the file has {size:,}")


def load(file: Path) -> dict[str, Tensor]:
    """All tensors of a file on this machine. Raises CheckpointError, as `header` does."""
    header(str(file))
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as e:
        why = foreign.line(str(e))
        raise CheckpointError(f"{file}: not whole safetensors ({why}); get it again") from None


def save(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a file of tensors. Raises OSError, with the system's number, if the disk takes no
    more: safetensors wraps that error in one of its own."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as e:
        found = re.search(r"\(os error (\d+)\)", str(e))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(file)) from None


def check_are_weights(tensors: Mapping[str, Entry], where: str) -> None:
    """Raises CheckpointError, with the tensor's name, if one is not of a type of weights."""
    for name, entry in tensors.items():
        if entry.dtype not in WEIGHTS:
            raise CheckpointError(
                f"{where}: {foreign.line(name)} is {entry.dtype}, and Manta reads "
                f"{', '.join(WEIGHTS)} only; get the weights without quantization"
            )


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError, with the tensor's name, if a value is NaN or infinite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{where}: {foreign.line(name)} has values that are NaN or infinite: no model "
                "computes with them; get the weights again, or an earlier checkpoint (python "
                "jobs/checkpoints.py run=RUN lists them)"
            )


def check_sizes(c: ModelConfig, tensors: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Checks that these tensors can be the weights of a model of config `c`, so that building the
    model takes no more than the file did. It is quick whatever the config says.

    Raises:
        CheckpointError: the config has a size that no tensor has.
    """
    sizes = c.sizes
    largest = max((n for shape in tensors.values() for n in shape), default=0)
    found = [
        f"{key}={size} (the largest size of a tensor there is {largest})"
        for key, size in sizes.items()
        if not 0 < size <= largest
    ]
    if c.n_layer > len(tensors):
        found.append(f"n_layer={c.n_layer} (there are {len(tensors)} tensors)")
    if c.context_length > MOST_CONTEXT:
        found.append(f"context_length={c.context_length} (Manta has at most {MOST_CONTEXT})")
    if found:
        raise CheckpointError(
            f"{where}: its weights are not for the model in its config: {', '.join(found)}; "
            "restore the config"
        )


@functools.lru_cache(maxsize=16)
def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of a model of config `c` in a file, by their names."""
    with torch.device("meta"):
        state = model_of(c).state_dict()
    return {name: tuple(unpadded(name, weight, c).shape) for name, weight in state.items()}


def check_fit(c: ModelConfig, tensors: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Checks that these are the weights of a model of config `c`, by name and shape, without
    building it.

    Raises:
        CheckpointError: some are missing, surplus or of another shape; the message names them.
    """
    check_sizes(c, tensors, where)
    # A tied head is saved once, as the embedding.
    tied = {"head.weight"} if c.tie_embeddings else set()
    wanted = shapes(c)
    given = {name: _without_padding(name, shape, c) for name, shape in tensors.items()}
    found = [f"{name} is missing" for name in sorted(wanted.keys() - given.keys() - tied)]
    found += [f"{foreign.line(n)} is surplus" for n in sorted(given.keys() - wanted.keys())]
    found += [
        f"{name} is {given[name]}, not {wanted[name]}"
        for name in sorted(given.keys() & wanted.keys())
        if given[name] != wanted[name]
    ]
    if found:
        what = named(found, most=3, between="; ")
        raise CheckpointError(f"{where}: its weights are not for the model in its config: {what}")


def _without_padding(name: str, shape: tuple[int, ...], c: ModelConfig) -> tuple[int, ...]:
    """The shape without the padding of the vocabulary, which a file may have or not."""
    is_padded = name in c.padded and shape[:1] == (c.padded_vocab_size,)
    return (c.vocab_size or 0, *shape[1:]) if is_padded else shape
