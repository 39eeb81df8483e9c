"""The adapters of a checkpoint (LoRA): their weights, and what they are for."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from manta import config as configs
from manta import foreign, layout, storage
from manta.errors import CheckpointError, ConfigError
from manta.model import lora
from manta.model.gpt import ModelConfig
from manta.model.lora import LoraConfig
from manta.terminal import named
from manta.train.checkpoints import tensors
from manta.train.checkpoints.contents import files_of, local


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapters of a model: their settings, and their weights by name."""

    config: LoraConfig
    weights: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class _About:
    """The content of an adapter's JSON file."""

    lora: dict[str, object]
    base: str
    """The sha256 of the file with the weights that the adapters are for."""


def write(folder: Path, c: LoraConfig, model: ModelConfig, weights: dict[str, Tensor]) -> list[str]:
    """Writes the adapters next to the weights that are in `folder` already; returns the names of
    the files."""
    tensors.save(weights, folder / layout.ADAPTER)
    base = storage.sha256(str(folder / layout.WEIGHTS))
    about = {"lora": configs.to_dict(c.for_model(model)), "base": base}
    (folder / layout.ADAPTER_CONFIG).write_text(json.dumps(about, indent=1))
    return [layout.ADAPTER, layout.ADAPTER_CONFIG]


def load(path: str, model: ModelConfig) -> Adapter | None:
    """The adapters of the checkpoint at `path`, which has a model of this config; None if it has
    none.

    Raises:
        CheckpointError: they are damaged, not finite numbers, or for another model.
    """
    c = _settings(path)
    if c is None:
        return None
    _check_fit(path, c, tensors.shapes(model))
    with local(path, [layout.ADAPTER]) as folder:
        weights = tensors.load(folder / layout.ADAPTER)
    tensors.check_finite(weights, storage.join(path, layout.ADAPTER))
    return Adapter(c, weights)


def _settings(path: str) -> LoraConfig | None:
    """The settings of the adapters in the checkpoint at `path`; None if it has none.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapters are for other weights.
    """
    files = files_of(path)
    found = [name for name in (layout.ADAPTER, layout.ADAPTER_CONFIG) if name in files]
    if not found:
        return None
    if len(found) == 1:
        raise CheckpointError(
            f"{path}: {layout.MANIFEST} names {found[0]} without the other file of an adapter "
            f"({layout.ADAPTER}, {layout.ADAPTER_CONFIG}); restore both"
        )
    file = storage.join(path, layout.ADAPTER_CONFIG)
    for name in found:
        entry = files[name]
        storage.check_file(storage.join(path, name), entry.size, entry.sha256, CheckpointError)
    about = foreign.read_json(file, _About, CheckpointError)
    if about.base != files[layout.WEIGHTS].sha256:
        raise CheckpointError(
            f"{file}: the adapter is for other weights (sha256 {foreign.line(about.base[:12])}) "
            f"than those in {layout.WEIGHTS} ({files[layout.WEIGHTS].sha256[:12]}); restore the "
            "files of one checkpoint"
        )
    try:
        c = configs.from_dict(LoraConfig, about.lora)
    except ConfigError as e:
        why = foreign.line(" ".join(str(e).split()))
        raise CheckpointError(f"{file}: {why}; restore the file") from None
    if c.rank is None:
        raise CheckpointError(f"{file}: lora.rank is null; restore the file")
    return c


def _check_fit(path: str, c: LoraConfig, weights: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless the adapters of the checkpoint at `path` are those of `c` in a
    model with weights of these shapes."""
    file = storage.join(path, layout.ADAPTER)
    found = tensors.header(file)
    tensors.check_are_weights(found, file)
    given = {name: entry.shape for name, entry in found.items()}
    wanted = lora.shapes(c, weights)
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - given.keys())]
    wrong += [f"{foreign.line(n)} is surplus" for n in sorted(given.keys() - wanted.keys())]
    wrong += [
        f"{name} is {given[name]}, not {wanted[name]}"
        for name in sorted(given.keys() & wanted.keys())
        if given[name] != wanted[name]
    ]
    if wrong:
        raise CheckpointError(
            f"{file}: the adapter is not for this model: {named(wrong, most=3, between='; ')}; "
            "restore the files of one checkpoint"
        )


def own_weights(path: str) -> dict[str, Tensor]:
    """The weights in the checkpoint at `path`, without its adapters. Raises CheckpointError if they
    are damaged or not finite numbers."""
    with local(path, [layout.WEIGHTS]) as folder:
        weights = tensors.load(folder / layout.WEIGHTS)
    tensors.check_finite(weights, storage.join(path, layout.WEIGHTS))
    return weights
