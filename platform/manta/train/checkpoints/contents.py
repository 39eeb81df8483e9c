"""What a checkpoint says about itself: the state of its training, and its list of files."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manta import foreign, layout, storage
from manta.config import Count, Natural
from manta.errors import CheckpointError
from manta.train.step.schedule import Extension

# The files that every checkpoint has; one that was imported has no optimizer's state.
OF_A_MODEL = (layout.WEIGHTS, layout.MODEL_CONFIG, layout.STATE, layout.ENCODING)


@foreign.exact
@dataclasses.dataclass
class TrainState:
    """What a run needs, with weights and optimizer state, to resume as if it had never stopped.

    The position in the data is `step`: global batch k has the same tokens wherever it is read.
    Randomness in a step is drawn from (seed, step, rank), so it has no state to save.
    """

    step: Natural = 0
    val_loss: float | None = None
    """The val loss at this step; null: it was not measured."""
    val_sample: dict[str, int] = dataclasses.field(default_factory=dict)
    """The number of val targets that are measured, by identity of the val split; empty: an earlier
    version measured the split's beginning. Val losses of different samples are not compared."""
    best_val_loss: float | None = None
    evals_since_best: Natural = 0
    total_steps: Natural = 0
    """The length that the run was planned to have; 0: an earlier version did not keep it."""
    lr: float | None = None
    """The learning rate of the last step (of the blocks' matrices, as in the log)."""
    extension: Extension | None = None
    """The point at which the run got its length, if schedule.extend=continue applied there."""
    train_seconds: float = 0.0
    stopped_early: bool = False
    dtype: str = ""
    optimizer: str = ""
    trainable: str = "all"
    """The weights that learn: the optimizer has the state of these alone."""
    compiled: bool | None = None
    micro_batch: Natural = 0
    """Sequences that a worker computes at once. The first start's choice is kept, so that a resumed
    run computes just like one that never stopped."""
    spikes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The state of the detector of loss spikes (`Detector.state`)."""
    world_size: Count = 1
    zero_stage: Natural = 0
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Everything that decides the order of the data: it must be the same when the run resumes."""
    datasets: list[str] = dataclasses.field(default_factory=list)
    """The folders of the datasets at the time of the save."""


@dataclasses.dataclass
class _Spikes:
    """What `Detector` takes from `TrainState.spikes`."""

    losses: list[float] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    skipped: Natural = 0


@dataclasses.dataclass
class _Data:
    """What a run that resumes computes with of `TrainState.data`; it compares the rest."""

    mix: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)


def load_state(path: str) -> TrainState:
    """The state of training in the checkpoint at `path`. Raises CheckpointError if it is missing or
    damaged, or another version of Manta wrote it."""
    file = storage.join(path, layout.STATE)
    state = foreign.read_json(file, TrainState, CheckpointError)
    try:
        foreign.check(state.spikes, _Spikes)
        foreign.check(state.data, _Data)
    except ValueError as e:
        raise CheckpointError(f"{file}: {e}; restore or recreate the file") from None
    return state


@dataclasses.dataclass(frozen=True)
class File:
    size: Natural
    sha256: str


@dataclasses.dataclass(frozen=True)
class _Manifest:
    files: dict[str, File]


def files_of(path: str) -> dict[str, File]:
    """The manifest's files by their names, which include those of every model."""
    try:
        found = foreign.read_json(storage.join(path, layout.MANIFEST), _Manifest, CheckpointError)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: not a whole checkpoint ({e})") from None
    outside = [foreign.line(name) for name in found.files if not foreign.is_plain_name(name)]
    if outside:
        raise CheckpointError(
            f"{path}: not a whole checkpoint ({layout.MANIFEST} names {outside[0]!r}, which is no "
            "file in this folder)"
        )
    lacking = [name for name in OF_A_MODEL if name not in found.files]
    if lacking:
        raise CheckpointError(
            f"{path}: not a whole checkpoint ({layout.MANIFEST} does not name {', '.join(lacking)})"
        )
    return found.files


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


def copy(path: str, to: str) -> None:
    """Copies a whole checkpoint to another folder, which becomes one last of all."""
    names = list(files_of(path))
    with local(path, names) as folder:
        for name in names:
            storage.upload(folder / name, storage.join(to, name))
    storage.write_bytes(
        storage.join(to, layout.MANIFEST), storage.read_bytes(storage.join(path, layout.MANIFEST))
    )
