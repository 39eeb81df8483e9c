"""Checkpoints on disk: each one is whole or absent.

A checkpoint is a folder whose manifest is written last (`layout` names its files). It contains no
pickle: reading a checkpoint runs no code, whoever wrote it.
"""

import contextlib
import dataclasses
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pyarrow import fs as pafs
from safetensors.torch import load_file, save_file

from manta import config as configs
from manta import layout, ownership, storage
from manta.config import Count, PositiveFloat, config
from manta.errors import CheckpointError, DataError
from manta.job import hint
from manta.model.gpt import GPT, ModelConfig
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import fragments
from manta.train.step.engine import Engine
from manta.train.step.schedule import Extension

STEP_NAME = re.compile(re.escape(layout.STEP) + r"\d{8,}")
OWN_FILES = re.compile(
    rf"({layout.MANIFEST}|{layout.WEIGHTS}|{layout.MODEL_CONFIG}|{layout.STATE}|{layout.ENCODING}"
    rf"|{layout.OPTIMIZER_INDEX}|{layout.OPTIMIZER}/rank-\d+\.safetensors)"
    rf"({storage.UNFINISHED_ENDING})?"
)
MOST_PARTS = 3  # of a run's name, as in a/b/c, when `names_of_runs` looks for runs


@config
class CheckpointConfig:
    every: Count | None = 100
    """Steps between checkpoints; null: do not save by steps. A checkpoint is always saved at the
    end and at SIGTERM."""
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


@dataclasses.dataclass
class TrainState:
    """What a run needs, with weights and optimizer state, to resume as if it had never stopped.

    The position in the data is `step`: global batch k has the same tokens wherever it is read.
    Randomness in a step is drawn from (seed, step, rank), so it has no state to save.
    """

    step: int = 0
    val_loss: float | None = None
    """The val loss at this step; null: it was not measured."""
    val_sample: dict[str, int] = dataclasses.field(default_factory=dict)
    """The number of val targets that are measured, by identity of the val split; empty: an earlier
    version measured the split's beginning. Val losses of different samples are not compared."""
    best_val_loss: float | None = None
    evals_since_best: int = 0
    total_steps: int = 0
    """The length that the run was planned to have; 0: an earlier version did not keep it."""
    lr: float | None = None
    """The learning rate of the last step (of the blocks' matrices, as in the log)."""
    extension: Extension | None = None
    """Where the run got its length, if its rate went on there (schedule.extend=continue)."""
    train_seconds: float = 0.0
    stopped_early: bool = False
    dtype: str = ""
    optimizer: str = ""
    compiled: bool | None = None
    micro_batch: int = 0
    """Sequences that a worker computes at once. The first start's choice is kept, so that a resumed
    run computes just like one that never stopped."""
    spikes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The state of the detector of loss spikes (`Detector.state`)."""
    world_size: int = 1
    zero_stage: int = 0
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Everything that decides the order of the data: it must be the same when the run resumes."""
    datasets: list[str] = dataclasses.field(default_factory=list)
    """The folders of the datasets at the time of the save."""


def load_state(path: str) -> TrainState:
    content = storage.read_json(storage.join(path, layout.STATE))
    try:
        if content.get("extension"):
            content["extension"] = Extension(**content["extension"])
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
        CheckpointError: a file is missing or damaged, or the weights belong to another model or are
            not finite numbers.
    """
    verify(path, only=layout.WEIGHTS)
    model = GPT(load_model_config(path))
    load_weights(path, model)
    _check_finite(path, model)
    return model.to(device or torch.device("cpu")).eval()


def _check_finite(path: str, model: GPT) -> None:
    """Raises CheckpointError if a weight is NaN or infinite. What such a model says is not a
    result: its logits are NaN."""
    wrong = {}
    for name, weight in model.named_parameters():
        count = weight.numel() - int(weight.isfinite().sum())
        if count:
            wrong[name] = count
    if wrong:
        name = next(iter(wrong))
        raise CheckpointError(
            f"{path}/{layout.WEIGHTS}: {sum(wrong.values()):,} weights are NaN or infinite, the "
            f"first in {name} ({len(wrong)} of {len(list(model.parameters()))} tensors have some): "
            "its training has perhaps diverged; choose an earlier checkpoint (python "
            "jobs/checkpoints.py run=RUN lists them)"
        )


def write_model(
    folder: Path,
    c: ModelConfig,
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    state: TrainState,
) -> list[str]:
    """Writes a checkpoint's files, except for the optimizer's state and the manifest; returns their
    names."""
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


def load_weights(path: str, model: GPT) -> None:
    """Loads the checkpoint's weights into a model of its config, without verifying the checkpoint.

    Raises:
        CheckpointError: the weights belong to another model.
    """
    with local(path, [layout.WEIGHTS]) as folder:
        weights = load_file(folder / layout.WEIGHTS)
    # A tied head is saved once, as the embedding.
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"head.weight"} if model.config.tie_embeddings else set()
    if unexpected or set(missing) - tied:
        names = ", ".join([*unexpected, *(set(missing) - tied)][:3])
        raise CheckpointError(
            f"{path}: {layout.WEIGHTS} is not for the model in {layout.MODEL_CONFIG} ({names} ...)"
        )


def load_optimizer(path: str, engine: Engine) -> None:
    """Loads the optimizer's state into an engine of the same model and optimizer, on any number of
    workers at any ZeRO stage. Each worker reads its own part. Learning rates and weight decays stay
    as the config says."""
    index = storage.read_json(storage.join(path, layout.OPTIMIZER_INDEX))
    names = [f"{layout.OPTIMIZER}/{file}" for file in sorted(fragments.files_for(engine, index))]
    with local(path, names) as folder:
        fragments.load_state(engine, index, folder / layout.OPTIMIZER)


@contextlib.contextmanager
def local(path: str, names: list[str]) -> Iterator[Path]:
    """A folder on this machine's disk with these files of a checkpoint, downloaded if needed."""
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
    """The folders of saves that are not committed (yet, or ever), oldest first."""
    return [path for path in _steps(run) if not storage.exists(storage.join(path, layout.MANIFEST))]


def _steps(run: str) -> list[str]:
    folder = layout.checkpoints_folder(run)
    return [
        storage.join(folder, item.base_name)
        for item in storage.list_files(folder, recursive=False)
        if item.type == pafs.FileType.Directory and STEP_NAME.fullmatch(item.base_name)
    ]


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


def names_of_runs(home: str) -> list[str]:
    """The names of the runs that have a checkpoint, including names with parts, such as a/b."""

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


def resolve(checkpoint: str, home: str) -> str:
    """The checkpoint that a person means by a run's name or folder (its newest checkpoint), or by a
    checkpoint's folder.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    for folder in candidates(checkpoint, home):
        if storage.exists(storage.join(folder, layout.MANIFEST)):
            return folder
        found = latest(folder, say=hint)
        if found is not None:
            return found
    raise not_found(f"checkpoint={checkpoint}", home)


def candidates(name: str, home: str) -> tuple[str, str]:
    """The folders that `name` may mean: that of the run of this name, or `name` as a path."""
    return layout.run_folder(home, name), storage.absolute(name)


def not_found(given: str, home: str) -> CheckpointError:
    """The error for `given` (as key=value) that leads to no checkpoint. It lists the runs that have
    one."""
    names = names_of_runs(home)
    runs = layout.runs_folder(home)
    there = f"runs with one: {', '.join(names)}" if names else f"no run under {runs} has one yet"
    return CheckpointError(f"{given}: no checkpoint there; give a run's name or a folder ({there})")


def verify(path: str, only: str | None = None) -> None:
    """Checks size and sha256 of all files (or of `only`) against the manifest. Also checks that
    they are of the right kind, as somebody may have written a matching manifest for other files.

    Raises:
        CheckpointError: a file is missing or differs; the message names it.
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
            raise CheckpointError(f"{path}: holds step {step}, not the step in its name")


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


def _check_safetensors(path: str, size: int) -> None:
    """Checks a file's header: eight bytes with the header's length, then that much JSON."""
    fs, inside = storage.filesystem(path)
    with fs.open_input_stream(inside, compression=None) as f:
        length = int.from_bytes(f.read(8), "little")
        try:
            if not 2 <= length <= size - 8:
                raise ValueError
            json.loads(f.read(length))
        except ValueError:
            raise CheckpointError(f"{path}: not safetensors data, despite its name") from None


def _files(path: str) -> dict[str, dict[str, Any]]:
    try:
        return storage.read_json(storage.join(path, layout.MANIFEST))["files"]
    except (DataError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path}: not a whole checkpoint ({e})") from None
