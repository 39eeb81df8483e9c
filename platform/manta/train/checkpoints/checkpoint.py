"""Checkpoints: whole or absent.

A checkpoint is a folder whose manifest is written last (`layout` names its files). Nothing in it is
a pickle: reading one runs no code, whoever wrote it.
"""

import contextlib
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pyarrow import fs as pafs
from safetensors.torch import load_file, save_file

from manta import config as configs
from manta import layout, storage
from manta.config import Count, PositiveFloat, config
from manta.errors import CheckpointError, DataError
from manta.model.gpt import GPT, ModelConfig
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import fragments
from manta.train.step.engine import Engine

MOST_PARTS = 3  # of a run's name, in which runs are looked for to be named


@config
class CheckpointConfig:
    every: Count | None = 100
    """Steps between checkpoints; null: none by steps. One is also saved at the end, and at
    SIGTERM."""
    every_tokens: Count | None = None
    """Tokens between checkpoints, also."""
    every_minutes: PositiveFloat | Literal["auto"] | None = None
    """Minutes between checkpoints, also. auto: the root of twice the time between failures times
    the time that a save takes, with its writing (Young 1974)."""
    hours_between_failures: PositiveFloat = 3.0
    """Mean time between failures, for every_minutes=auto (Llama 3's was 3.1 hours on 16,384
    GPUs)."""
    keep: Count = 2
    """Newest checkpoints to keep."""
    keep_every: Count | None = None
    """Checkpoints of steps that this divides are kept for good; null: none."""
    keep_best: bool = True
    """The one with the lowest val loss is kept too, of those saved where that was measured."""

    def is_due(self, step: int, tokens_before: int, tokens_after: int) -> bool:
        """Whether step number `step`, which went from so many tokens to so many, ends with one."""
        by_step = self.every is not None and step % self.every == 0
        size = self.every_tokens
        return by_step or (size is not None and tokens_before // size < tokens_after // size)

    def seconds_between(self, cost: float) -> float | None:
        """Between checkpoints by time, each of which takes `cost` seconds."""
        if self.every_minutes == "auto":
            return math.sqrt(2 * 3600 * self.hours_between_failures * cost)
        return None if self.every_minutes is None else 60 * self.every_minutes


@dataclasses.dataclass
class TrainState:
    """Everything that a run needs to go on as if it had not stopped, beside weights and optimizer.

    The position in the data is `step`: global batch k is made of the same tokens wherever it is
    read. Randomness in a step is drawn from (seed, step, rank), so there is no state of it.
    """

    step: int = 0
    val_loss: float | None = None
    """As measured at this step; null: it was not."""
    best_val_loss: float | None = None
    evals_since_best: int = 0
    train_seconds: float = 0.0
    stopped_early: bool = False
    dtype: str = ""
    optimizer: str = ""
    compiled: bool | None = None
    micro_batch: int = 0
    """Sequences that a worker computes at once: what was decided at the start is kept, so that a
    run that goes on computes as one that never stopped."""
    spikes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the detector of loss spikes looks back on."""
    world_size: int = 1
    zero_stage: int = 0
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What decides the order of the data: it must be the same to go on."""
    datasets: list[str] = dataclasses.field(default_factory=list)
    """Where the datasets were."""


def load_state(path: str) -> TrainState:
    content = storage.read_json(storage.join(path, layout.STATE))
    try:
        return TrainState(**content)
    except TypeError as e:
        raise CheckpointError(f"{path}: saved by another version of Manta ({e})") from None


def load_model_config(path: str) -> ModelConfig:
    content = storage.read_json(storage.join(path, layout.MODEL_CONFIG))
    return configs.from_dict(ModelConfig, content)


def load_tokenizer(path: str) -> Tokenizer:
    return tokenizers.load(storage.join(path, layout.ENCODING))


def load_model(path: str, device: torch.device | None = None) -> GPT:
    """The checkpoint's model, in eval mode.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are of another model.
    """
    verify(path, only=layout.WEIGHTS)
    model = GPT(load_model_config(path))
    load_weights(path, model)
    return model.to(device or torch.device("cpu")).eval()


def write_model(
    folder: Path,
    c: ModelConfig,
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    state: TrainState,
) -> list[str]:
    """Writes all of a checkpoint but the optimizer's state and the manifest; the files' names."""
    save_file(weights, folder / layout.WEIGHTS, metadata={"format": "pt"})
    texts = {
        layout.MODEL_CONFIG: json.dumps(configs.to_dict(c), indent=1).encode(),
        layout.STATE: json.dumps(dataclasses.asdict(state), indent=1).encode(),
        layout.ENCODING: tokenizer.serialized,
    }
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    return [layout.WEIGHTS, *texts]


def publish(
    path: str, folder: Path, names: list[str], beat: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Moves files of a checkpoint to their place, and onto the disk; what the manifest says of
    them. It is whole when `commit` has been called.

    Args:
        folder: that they were written to: the checkpoint's own, or one on this machine's disk, from
            which each is gone when it is in its place.
        beat: is called after each.
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
    """Makes the published files a checkpoint: its manifest is written last."""
    storage.write_json(storage.join(path, layout.MANIFEST), {"files": files})


def load_weights(path: str, model: GPT) -> None:
    """The checkpoint's weights into a model of its config, which is not checked to be whole.

    Raises:
        CheckpointError: they are of another model.
    """
    with local(path, [layout.WEIGHTS]) as folder:
        weights = load_file(folder / layout.WEIGHTS)
    # A tied head is saved once, as the embedding.
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"head.weight"} if model.config.tie_embeddings else set()
    if unexpected or set(missing) - tied:
        names = ", ".join([*unexpected, *(set(missing) - tied)][:3])
        raise CheckpointError(
            f"{path}: {layout.WEIGHTS} is not of the model in {layout.MODEL_CONFIG} ({names} ...)"
        )


def load_optimizer(path: str, engine: Engine) -> None:
    """The optimizer's state into an engine of the same model and optimizer, on any number of
    workers at any ZeRO stage; each reads its own part. Rates and decays stay as the config says."""
    index = storage.read_json(storage.join(path, layout.OPTIMIZER_INDEX))
    names = [f"{layout.OPTIMIZER}/{file}" for file in sorted(fragments.files_for(engine, index))]
    with local(path, names) as folder:
        fragments.load_state(engine, index, folder / layout.OPTIMIZER)


@contextlib.contextmanager
def local(path: str, names: list[str]) -> Iterator[Path]:
    """A folder on this machine's disk that has these files of a checkpoint."""
    if storage.is_local(path):
        yield Path(storage.filesystem(path)[1])
        return
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        for name in names:
            storage.download(storage.join(path, name), Path(folder) / name)
        yield Path(folder)


def find(run: str) -> list[str]:
    """The run's committed checkpoints, oldest first."""
    return [path for path in _steps(run) if storage.exists(storage.join(path, layout.MANIFEST))]


def unfinished(run: str) -> list[str]:
    """What saves have begun, and not committed (or never will), oldest first."""
    return [path for path in _steps(run) if not storage.exists(storage.join(path, layout.MANIFEST))]


def _steps(run: str) -> list[str]:
    folder = layout.checkpoints_folder(run)
    return [
        storage.join(folder, item.base_name)
        for item in storage.list_files(folder, recursive=False)
        if item.type == pafs.FileType.Directory and item.base_name.startswith(layout.STEP)
    ]


def latest(run: str, *, say: Callable[[str], None], set_aside: bool = False) -> str | None:
    """The newest checkpoint whose files are all there and whole; damaged ones are named and
    skipped; with `set_aside` renamed too, so that what is trained anew does not replace them."""
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


def names_of_runs(home: str) -> list[str]:
    """The names of the runs that have a checkpoint; those in parts, as a/b, too."""

    def below(name: str, depth: int) -> Iterator[str]:
        folder = layout.run_folder(home, name).rstrip("/")
        for item in storage.list_files(folder, recursive=False):
            part = f"{name}/{item.base_name}".lstrip("/")
            if item.type != pafs.FileType.Directory:
                continue
            if find(layout.run_folder(home, part)):
                yield part
            elif depth > 1:
                yield from below(part, depth - 1)

    return sorted(below("", MOST_PARTS))


def set_aside_as(path: str, why: str) -> str:
    """Renames a checkpoint, so that no run goes on from it; its new path."""
    folder, _, name = path.rpartition("/")
    aside = storage.join(folder, f"{why}{name}-{time.time_ns()}")
    storage.move_folder(path, aside)
    return aside


def remove_unfinished(run: str) -> None:
    """Deletes what saves that were cut short left; for a process that alone writes to the run."""
    for path in unfinished(run):
        storage.delete_folder(path)


def resolve(checkpoint: str, home: str) -> str:
    """The checkpoint that a person names: a run's name or folder (its newest), or a checkpoint's.

    Raises:
        CheckpointError: there is none.
    """
    for folder in candidates(checkpoint, home):
        if storage.exists(storage.join(folder, layout.MANIFEST)):
            return folder
        found = latest(folder, say=print)
        if found is not None:
            return found
    raise not_found(f"checkpoint={checkpoint}", home)


def candidates(name: str, home: str) -> tuple[str, str]:
    """Where a person who gives a run's name, or a folder, may mean."""
    return layout.run_folder(home, name), storage.absolute(name)


def not_found(given: str, home: str) -> CheckpointError:
    """What is `given`, as key=value, leads to no checkpoint; which runs have one."""
    names = names_of_runs(home)
    runs = layout.runs_folder(home)
    there = f"runs with one: {', '.join(names)}" if names else f"no run under {runs} has one yet"
    return CheckpointError(f"{given}: no checkpoint there; give a run's name or a folder ({there})")


def verify(path: str, only: str | None = None) -> None:
    """Checks size and sha256 of the files (or of one) against the manifest; and that they are what
    they should be, as somebody may have written a manifest to a file of another kind.

    Raises:
        CheckpointError: naming the file that is missing or differs.
    """
    for name, entry in _files(path).items():
        if only is None or name == only:
            file = storage.join(path, name)
            storage.check_file(file, entry["size"], entry["sha256"], CheckpointError)
            if name.endswith(".safetensors"):
                _check_safetensors(file, entry["size"])
    if only is None and path.rpartition("/")[2].startswith(layout.STEP):
        step = load_state(path).step
        if step != layout.step_of(path):
            raise CheckpointError(f"{path}: holds step {step}: it is of another step")


def prune(run: str, c: CheckpointConfig) -> list[str]:
    """Deletes the run's checkpoints that `c` does not say to keep; their paths."""
    paths = find(run)
    states = {path: load_state(path) for path in paths}
    kept = set(paths[-c.keep :])
    if c.keep_every is not None:
        kept |= {path for path in paths if states[path].step % c.keep_every == 0}
    measured = [path for path in paths if states[path].val_loss is not None]
    if c.keep_best and measured:
        kept.add(min(measured, key=lambda path: states[path].val_loss or 0.0))
    gone = [path for path in paths if path not in kept]
    for path in gone:
        delete(path)
    return gone


def delete(path: str) -> None:
    """Deletes a checkpoint from its manifest on: one that is half deleted does not look whole."""
    if storage.exists(storage.join(path, layout.MANIFEST)):
        storage.delete_file(storage.join(path, layout.MANIFEST))
    storage.delete_folder(path)


def _check_safetensors(path: str, size: int) -> None:
    """Its header: eight bytes of its own length, and that much JSON."""
    fs, inside = storage.filesystem(path)
    with fs.open_input_stream(inside, compression=None) as f:
        length = int.from_bytes(f.read(8), "little")
        try:
            if not 2 <= length <= size - 8:
                raise ValueError
            json.loads(f.read(length))
        except ValueError:
            raise CheckpointError(f"{path}: is not safetensors, whatever it is") from None


def _files(path: str) -> dict[str, dict[str, Any]]:
    try:
        return storage.read_json(storage.join(path, layout.MANIFEST))["files"]
    except (DataError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path}: not a whole checkpoint ({e})") from None
