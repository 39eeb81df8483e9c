"""A segment of a trial in the hands of a lane: what comes before its training, and its result."""

import contextlib
import re
import time
from collections.abc import Callable

from manta import config as configs
from manta import layout, storage
from manta.data.manifest import Manifest
from manta.data.order import batches_for
from manta.errors import CheckpointError, MantaError
from manta.monitor.settings import AlertsConfig
from manta.monitor.watch import Close, watching
from manta.sweep.plan import Result, Segment
from manta.terminal import line
from manta.train import earlier
from manta.train.checkpoints import checkpoint
from manta.train.checkpoints.contents import copy
from manta.train.lane import Piece
from manta.train.patience import in_short
from manta.train.plan import from_weights
from manta.train.pretrain import check, held, start_of, watched
from manta.train.records.logbook import evaluations, read_metrics
from manta.train.resume import is_finished
from manta.train.settings import PretrainConfig, save_run_config
from manta.train.supervise import Supervisor

# Lines of a run that a sweep does not pass on: there would be many of them.
ROUTINE = re.compile(
    r"step \d+/\d+ \| (?!val )|step \d+ sample:|saved step |starting on |resuming at "
    r"|embeddings and head fitted|the run ends at step|the config has another schedule"
)


class Work:
    """A segment that a lane has, or will have as soon as it asks.

    The run is held for this process from `begin` to `release`.
    """

    def __init__(
        self,
        segment: Segment,
        c: PretrainConfig,
        datasets: tuple[Manifest, ...],
        say: Callable[[str], None],
        alerts: AlertsConfig,
        later: list[Close],
    ):
        """Takes the segment and the run that it trains, of the sweep's whole length. What has to be
        closed at the sweep's end is put into `later`."""
        self.segment, self._alerts, self._later = segment, alerts, later
        self._datasets, self._held = datasets, contextlib.ExitStack()
        self._supervisor = Supervisor(c, datasets, lambda text: self._say(say, text), list)

    def _say(self, say: Callable[[str], None], text: str) -> None:
        if not ROUTINE.match(text):
            say(f"{self.segment.trial} | {text}")

    @property
    def c(self) -> PretrainConfig:
        """The run; after a lack of memory its micro batches are smaller."""
        return self._supervisor.c

    @property
    def shape(self) -> tuple[object, ...]:
        """What must be the same for two segments to be trained by the same workers."""
        counts = self.c.worker_counts if self.c.fewest_workers < self.c.most_workers else ()
        return (self.c.num_workers, tuple(counts), self.c.deterministic)

    @property
    def until(self) -> int:
        """The step at the end of the segment."""
        c = self.c
        return min(batches_for(c.stages, self.segment.until, c.sequence_length), c.total_steps)

    def begin(self) -> Result | None:
        """Checks and writes what comes before the training; returns the result if the run has been
        trained that far already.

        Raises:
            MantaError: the run cannot be trained.
        """
        if self.segment.source is not None:
            self._copy(self.segment.source)
        path = start_of(self.c)
        if path is not None and self._reached(path):
            return self.result()
        c = from_weights(self.c, path)
        check(c, path, self._datasets, lambda _: None)
        self._held.enter_context(held(c, time.time(), self._supervisor.say))
        save_run_config(c)
        watch = watching(watched(c, self._alerts), self._supervisor.say, self._later)
        self._supervisor.watch = self._held.enter_context(watch)
        return None

    def piece(self, question: str) -> Piece:
        """What the lane is told."""
        until = None if self.until == self.c.total_steps else self.until
        return Piece(question, configs.to_dict(self.c), until)

    def hear(self, message: object) -> None:
        """Takes in what a worker says."""
        self._supervisor.hear(message)

    def recover(self, error: RuntimeError) -> None:
        """Decides how the segment goes on after its workers failed. Raises GivenUp or TrainingError
        if it does not."""
        self._supervisor.recover(error)

    def release(self) -> None:
        """Lets go of the run."""
        self._supervisor.watch = None
        self._held.close()

    def result(self) -> Result | None:
        """What came of the segment, from the run's records; None: its end is not reached."""
        found = checkpoint.find(self.c.run_folder)
        if not found or not self._reached(found[-1]):
            return None
        state = checkpoint.load_state(found[-1])
        loss = state.val_loss
        if loss is None or state.step > self.until:
            loss = self._loss_before(self.until)
        return Result(self.segment.trial, self.segment.until, loss)

    def failed(self, why: str, *, diverged: bool = False) -> Result:
        return Result(self.segment.trial, self.segment.until, None, why, diverged)

    def measured(self) -> float | None:
        """Tokens per second of the steps so far; None: there are too few of them."""
        path = storage.join(self.c.run_folder, layout.METRICS)
        return earlier.measured(read_metrics(path))

    def _reached(self, path: str) -> bool:
        is_there = checkpoint.load_state(path).step >= self.until
        return is_finished(self.c, path) or is_there

    def _loss_before(self, step: int) -> float | None:
        """The newest val loss up to a step, of a run that has gone further."""
        records = read_metrics(storage.join(self.c.run_folder, layout.METRICS))
        found = evaluations(records, step)
        return float(found[-1]["val_loss"]) if found else None

    def _copy(self, source: str) -> None:
        """Gives a run that has no checkpoint that of another run at the segment's start."""
        if checkpoint.find(self.c.run_folder):
            return
        step = batches_for(self.c.stages, self.segment.start, self.c.sequence_length)
        run = layout.run_folder(self.c.home_folder, source)
        path = layout.checkpoint_folder(run, step)
        if path not in checkpoint.find(run):
            raise CheckpointError(
                f"{path}: the run {source} has no checkpoint at step {step}, from which "
                f"{self.segment.trial} goes on; give the sweep another name="
            )
        copy(path, layout.checkpoint_folder(self.c.run_folder, step))


def reason(error: Exception) -> str:
    """Why a trial failed, in a line that is the same each time: without numbers of processes."""
    if isinstance(error, MantaError):
        return line(" ".join(str(error).split()))
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return line(re.sub(r"\b(pid|ip)=[^\s,)]+", r"\1=...", in_short(lines[-1] if lines else "?")))
