"""Checkpoints on disk: each one is whole or absent.

A checkpoint is a folder whose manifest is written last (`layout` names its files). It contains no
pickle: reading a checkpoint runs no code, whoever wrote it.
"""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from manta import config as configs
from manta import foreign, layout, ownership, storage
from manta.config import Count, PositiveFloat, config
from manta.errors import CheckpointError, ConfigError
from manta.job import hint
from manta.model import lora
from manta.model.families import model_of
from manta.model.gpt import LanguageModel, ModelConfig
from manta.model.lora import LoraConfig
from manta.terminal import named
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import adapters, fragments, tensors
from manta.train.checkpoints.adapters import Adapter, own_weights
from manta.train.checkpoints.contents import TrainState, files_of, load_state, local
from manta.train.checkpoints.places import (
    candidates,
    check_place,
    find,
    names_of_runs,
    newest,
    not_found,
    unfinished,
)
from manta.train.step.engine import Engine

__all__ = [
    "CheckpointConfig", "TrainState", "candidates", "check_place", "find", "load_state", "local",
    "names_of_runs", "newest", "not_found", "own_weights", "unfinished",
]  # fmt: skip

OWN_FILES = re.compile(
    rf"({layout.MANIFEST}|{layout.WEIGHTS}|{layout.MODEL_CONFIG}|{layout.STATE}|{layout.ENCODING}"
    rf"|{layout.ADAPTER}|{layout.ADAPTER_CONFIG}|{layout.OPTIMIZER_INDEX}"
    rf"|{layout.OPTIMIZER}/rank-\d+\.safetensors)"
    rf"({storage.UNFINISHED_ENDING})?"
)


@config
class CheckpointConfig:
    every: Count | None = 100
    """Steps between checkpoints; null: do not save by steps. A checkpoint is always saved at the
    end, and when the run is told to stop."""
    every_tokens: Count | None = None
    """Tokens between checkpoints, in addition to `every`; null: do not save by tokens."""
    every_minutes: PositiveFloat | Literal["auto"] | None = None
    """Minutes between checkpoints, in addition to `every`; null: do not save by time. auto: the
    square root of 2 x time between failures x time of a save with its writing (Young 1974)."""
    hours_between_failures: PositiveFloat = 3.0
    """Mean time between failures, for every_minutes=auto (Llama 3's was 3.1 hours on 16,384
    GPUs)."""
    keep: Count = 2
    """How many of the newest checkpoints to keep."""
    keep_every: Count | None = None
    """Checkpoints whose step is a multiple of this are kept for good; null: none."""
    keep_best: bool = True
    """Whether the checkpoint with the lowest val loss is kept too, among those saved at a step
    where the val loss was measured; one for each sample of the val split that was measured."""

    def is_due(self, step: int, tokens_before: int, tokens_after: int) -> bool:
        """Whether a checkpoint is due after step `step`, which took the run from `tokens_before` to
        `tokens_after` tokens."""
        by_step = self.every is not None and step % self.every == 0
        size = self.every_tokens
        return by_step or (size is not None and tokens_before // size < tokens_after // size)

    def seconds_between(self, cost: float) -> float | None:
        """Seconds between checkpoints by time, if a save takes `cost` seconds; None: do not save by
        time."""
        if self.every_minutes == "auto":
            return math.sqrt(2 * 3600 * self.hours_between_failures * cost)
        return None if self.every_minutes is None else 60 * self.every_minutes


def load_model_config(path: str) -> ModelConfig:
    file = storage.join(path, layout.MODEL_CONFIG)
    content = foreign.read_json(file, dict[str, Any], CheckpointError)
    try:
        return configs.from_dict(ModelConfig, content)
    except ConfigError as e:
        why = foreign.line(" ".join(str(e).split()))
        raise CheckpointError(f"{file}: {why}; restore the file") from None


def load_tokenizer(path: str) -> Tokenizer:
    """The checkpoint's tokenizer. Raises CheckpointError if its file is missing or damaged, or has
    more ids than the model."""
    made, c = _tokenizer(path), load_model_config(path)
    if made.vocab_size > (c.vocab_size or 0):
        raise CheckpointError(
            f"{path}: {layout.ENCODING} has {made.vocab_size} ids, the model in "
            f"{layout.MODEL_CONFIG} only {c.vocab_size}; restore the files"
        )
    return made


def _tokenizer(path: str) -> Tokenizer:
    return tokenizers.load(storage.join(path, layout.ENCODING), CheckpointError)


def load_model(
    path: str,
    device: torch.device | None = None,
    *,
    classifies: bool = False,
    bare: bool = False,
) -> LanguageModel:
    """The checkpoint's model, in eval mode: a language model, or one that `classifies` texts.
    Adapters are merged into it, or left out if it is to be `bare`.

    Raises:
        CheckpointError: a file is missing or damaged, the weights belong to another model or are
            not finite numbers, or the model is of the other sort.
    """
    verify(path, only=layout.WEIGHTS)
    c = load_model_config(path)
    refuse_other_sort(path, c, classifies)
    _check_fit(path, c)
    model = model_of(c)
    _read_weights(path, model, bare=bare)
    return model.to(device or torch.device("cpu")).eval()


def refuse_other_sort(path: str, c: ModelConfig, classifies: bool = False) -> None:
    """Raises CheckpointError unless the model of this config classifies texts, or predicts tokens,
    as is needed."""
    if c.labels and not classifies:
        raise CheckpointError(
            f"{path}: a classifier of texts ({named(c.labels, most=5)}), which predicts no tokens; "
            "use jobs/classify.py, or give the run that it started from"
        )
    if classifies and not c.labels:
        raise CheckpointError(
            f"{path}: a language model, not a classifier; make one of it with python "
            "jobs/finetune.py kind=classify base=RUN data.source=FILE"
        )


def write_model(
    folder: Path,
    c: ModelConfig,
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    state: TrainState,
    adapters_of: LoraConfig = LoraConfig(),  # noqa: B008  # frozen
) -> list[str]:
    """Writes a checkpoint's files, except for the optimizer's state and the manifest; returns their
    names. `weights` may have adapters, made as `adapters_of` says."""
    own, adapter = lora.split(weights)
    tensors.save(own, folder / layout.WEIGHTS)
    more = adapters.write(folder, adapters_of, c, adapter) if adapter else []
    texts = {
        layout.MODEL_CONFIG: json.dumps(configs.to_dict(c), indent=1).encode(),
        layout.STATE: json.dumps(dataclasses.asdict(state), indent=1).encode(),
        layout.ENCODING: tokenizer.serialized,
    }
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    return [layout.WEIGHTS, *texts, *more]


def publish(
    path: str, folder: Path, names: list[str], beat: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Moves files of a checkpoint to their place, and makes sure that they are on the disk. Returns
    their entries for the manifest. The checkpoint is not whole before `commit`.

    Args:
        folder: where the files were written: the checkpoint's own folder, or one on this machine's
            disk, from which each file is deleted once it is in its place.
        beat: is called after each file is read, and after each is moved.
    """
    files = {}
    is_there = storage.is_local(path) and folder == Path(storage.filesystem(path)[1])
    for name in names:
        file = folder / name
        if is_there:
            storage.sync(file)
        files[name] = {"size": file.stat().st_size, "sha256": storage.sha256(str(file))}
        beat()
        if not is_there:
            storage.upload(file, storage.join(path, name))
            file.unlink()
            beat()
    return files


def commit(path: str, files: dict[str, dict[str, Any]]) -> None:
    """Turns the published files into a checkpoint by writing its manifest."""
    storage.write_json(storage.join(path, layout.MANIFEST), {"files": files})


def load_weights(path: str, model: LanguageModel) -> None:
    """Loads the checkpoint's weights into a model of its config, without verifying the checkpoint.

    Raises:
        CheckpointError: the weights belong to another model, or are not finite numbers.
    """
    _check_fit(path, model.config)
    _read_weights(path, model)


def load_weights_for(path: str, tokenizer: Tokenizer, model: LanguageModel) -> None:
    """Loads the checkpoint's weights, without verifying it, into a model of its config for a
    tokenizer that extends the checkpoint's. Rows for new ids begin at the mean of the others'
    (Hewitt 2021). The checkpoint's adapters are merged into its weights; those of the model stay.
    A classifier keeps the head that it has if the checkpoint's model has other labels, or none.

    Raises:
        CheckpointError: the weights belong to another model, or are not finite numbers.
    """
    known = load_tokenizer(path).vocab_size
    theirs = load_model_config(path)
    _check_fit(path, theirs)
    weights = _merged(path)
    if model.config.labels and theirs.labels != model.config.labels:
        weights.pop("head.weight", None)
    names = set(model.config.padded) if tokenizer.vocab_size > known else set()
    for name in names & weights.keys():
        rows = weights[name].float()
        mean = rows[:known].mean(0, keepdim=True)
        new = mean.expand(tokenizer.vocab_size - known, -1)
        weights[name] = torch.cat([rows[:known], new, rows[tokenizer.vocab_size :]])
    model.load_state_dict(weights, strict=False)  # a tied head is saved once, as the embedding


def load_adapter(path: str) -> Adapter | None:
    """The adapters of the checkpoint at `path`; None if it has none. Raises CheckpointError if they
    are damaged, or for another model."""
    return adapters.load(path, load_model_config(path))


def _read_weights(path: str, model: LanguageModel, *, bare: bool = False) -> None:
    """Reads weights that are known to fit the model, and adapters: into those of the model, if it
    has some, or else into its weights."""
    adapter = load_adapter(path) if lora.has_adapters(model) else None
    weights = own_weights(path) if bare or adapter else _merged(path)
    weights |= adapter.weights if adapter else {}
    model.load_state_dict(weights, strict=False)  # a tied head is saved once, as the embedding


def _merged(path: str) -> dict[str, torch.Tensor]:
    """The weights in the checkpoint at `path`, with its adapters merged into them."""
    weights, adapter = own_weights(path), load_adapter(path)
    return lora.merged(weights, adapter.weights, adapter.config) if adapter else weights


def load_optimizer(path: str, engine: Engine) -> None:
    """Loads the optimizer's state into an engine of the same model and optimizer, on any number of
    workers at any ZeRO stage. Each worker reads its own part. Learning rates and weight decays stay
    as the config says."""
    index = fragments.read_index(path)
    names = [f"{layout.OPTIMIZER}/{file}" for file in sorted(fragments.files_for(engine, index))]
    with local(path, names) as folder:
        fragments.load_state(engine, index, folder / layout.OPTIMIZER)


def latest(run: str, *, say: Callable[[str], None], set_aside: bool = False) -> str | None:
    """The newest checkpoint whose files are all present and whole, or None. Reports damaged
    checkpoints to `say` and skips them; with `set_aside`, also renames them, so that steps trained
    again do not overwrite them."""
    for path in reversed(find(run)):
        try:
            verify(path)
            return path
        except CheckpointError as e:
            where = ""
            if set_aside:
                where = f" (set aside as {set_aside_as(path, layout.DAMAGED)})"
            say(f"skipping a damaged checkpoint: {e}{where}")
    return None


def set_aside_as(path: str, why: str) -> str:
    """Renames a checkpoint, so that no run resumes from it; returns its new path."""
    folder, _, name = path.rpartition("/")
    aside = storage.join(folder, f"{why}{name}-{time.time_ns()}")
    storage.move_folder(path, aside)
    return aside


def remove_unfinished(run: str) -> None:
    """Deletes the folders that interrupted saves left behind. No other process may be writing to
    the run."""
    for path in unfinished(run):
        if not ownership.is_link(path):
            delete(path)


def resolve(checkpoint: str, home: str, key: str = "checkpoint") -> str:
    """The checkpoint that a person means by a run's name or folder (its newest checkpoint), or by a
    checkpoint's folder; `key`: the config's key that named it.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    for folder in candidates(checkpoint, home):
        if storage.exists(storage.join(folder, layout.MANIFEST)):
            return folder
        found = latest(folder, say=hint)
        if found is not None:
            return found
    raise not_found(f"{key}={checkpoint}", home)


def verify(path: str, only: str | None = None) -> None:
    """Checks size and sha256 of all files (or of `only`) against the manifest. Also checks that
    they are of the right kind, as somebody may have written a matching manifest for other files.

    Raises:
        CheckpointError: a file is missing or differs; the message names it.
    """
    for name, entry in files_of(path).items():
        if only is None or name == only:
            file = storage.join(path, name)
            storage.check_file(file, entry.size, entry.sha256, CheckpointError)
            if name.endswith(".safetensors"):
                tensors.header(file)
    if only is None:
        _check_contents(path)


def _check_contents(path: str) -> None:
    """Checks that the files describe one checkpoint, whatever their checksums say."""
    step = load_state(path).step
    if layout.is_step(path.rpartition("/")[2]) and step != layout.step_of(path):
        raise CheckpointError(f"{path}: holds step {step}, not the step in its name")
    _tokenizer(path)
    _check_fit(path, load_model_config(path))
    load_adapter(path)
    if layout.OPTIMIZER_INDEX in files_of(path):
        fragments.check_index(path)


def _check_fit(path: str, c: ModelConfig) -> None:
    """Raises CheckpointError unless the weights are those of the model of config `c`."""
    file = storage.join(path, layout.WEIGHTS)
    found = tensors.header(file)
    tensors.check_are_weights(found, file)
    tensors.check_fit(c, {name: entry.shape for name, entry in found.items()}, file)


def prune(run: str, c: CheckpointConfig) -> list[str]:
    """Deletes the run's checkpoints that `c` does not keep, except links to checkpoints elsewhere;
    returns their paths."""
    paths = find(run)
    states = {path: load_state(path) for path in paths}
    kept = set(paths[-c.keep :])
    if c.keep_every is not None:
        kept |= {path for path in paths if states[path].step % c.keep_every == 0}
    measured = [path for path in paths if states[path].val_loss is not None]
    samples = [states[path].val_sample for path in measured]
    if c.keep_best:
        for sample in (s for i, s in enumerate(samples) if s not in samples[:i]):
            alike = [path for path in measured if states[path].val_sample == sample]
            kept.add(min(alike, key=lambda path: states[path].val_loss or 0.0))
    gone = [path for path in paths if path not in kept and not ownership.is_link(path)]
    for path in gone:
        delete(path)
    return gone


def delete(path: str) -> None:
    """Deletes a checkpoint's files, its manifest first: a half-deleted checkpoint must not look
    whole. Files of a person's in its folder stay.

    Raises:
        DataError: its folder, or the one with all checkpoints, is a symbolic link.
    """
    folder, _, name = path.rpartition("/")
    run, _, checkpoints = folder.rpartition("/")
    ownership.refuse_links(folder, [name])
    ownership.refuse_links(run, [checkpoints])
    if storage.exists(storage.join(path, layout.MANIFEST)):
        storage.delete_file(storage.join(path, layout.MANIFEST))
    ownership.clear(path, OWN_FILES)
