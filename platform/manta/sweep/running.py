"""Trains what a plan asks for, with lanes, until the plan is over or somebody stops it."""

import dataclasses
import queue
import signal
import time
from collections.abc import Callable
from typing import Any, Protocol

from manta.cluster import nodes
from manta.data import mixture
from manta.data.manifest import Manifest
from manta.errors import ClusterError, MantaError, TrainingError
from manta.monitor.metrics import Metrics
from manta.monitor.settings import AlertsConfig
from manta.monitor.watch import CLOSING_SECONDS, Close
from manta.sweep.lanes import Lane, Over
from manta.sweep.plan import Result, Segment
from manta.sweep.work import Work, reason
from manta.train.checkpoints import checkpoint
from manta.train.faults.signals import Asked, Moving
from manta.train.faults.stopping import told_to_stop
from manta.train.lane import Ended, Free
from manta.train.patience import GivenUp, in_short
from manta.train.settings import PretrainConfig

MOST_STARTS = 3  # of a lane, in a row, whose workers fail before they ask for work


class Trains(Protocol):
    """What lanes train for: the plan of a sweep, or the ladder of a study of scaling."""

    segments: list[Segment]

    @property
    def is_over(self) -> bool: ...

    def ready(self) -> list[Segment]: ...

    def tell(self, result: Result) -> None: ...

    def config_of(self, segment: Segment) -> PretrainConfig: ...

    def states(self) -> dict[str, str]: ...


@dataclasses.dataclass
class Spent:
    """What a sweep has spent since it was started."""

    segments: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    """Seconds of steps, over all lanes."""


class Running:
    """Gives the segments of a plan to lanes, and the plan their results."""

    def __init__(
        self,
        plan: Trains,
        datasets: tuple[Manifest, ...],
        folder: str,
        most_lanes: int,
        say: Callable[[str], None],
        started: Callable[[Work], None] = lambda _: None,
        alerts: AlertsConfig = AlertsConfig(),  # noqa: B008  # frozen
    ):
        """Takes a plan whose sweep is in `folder`. `started` is called with the work of a lane at
        each line of its log; the trials' alerts go where `alerts` says."""
        self.plan, self.spent = plan, Spent()
        self._alerts, self._later = alerts, list[Close]()
        self._metrics = Metrics(folder.rpartition("/")[2])
        self._datasets, self._most, self._say, self._started = datasets, most_lanes, say, started
        self._shared = {"folder": folder, "files": nodes.sizes([*mixture.files(datasets)])}
        self._lanes: list[Lane] = []
        self._events: queue.SimpleQueue[tuple[Lane, Any]] = queue.SimpleQueue()
        self._works: dict[tuple[str, int], Work] = {}
        self._failed_starts = 0
        left = {(s.trial, s.until) for s in plan.ready()}
        self._done = sum((s.trial, s.until) not in left for s in plan.segments)
        self._since: dict[str, float] = {}

    def run(self) -> signal.Signals | None:
        """Trains to the end of the plan. Returns None then, else the signal that stopped it; all is
        saved.

        Raises:
            MantaError: no lane can work, for a reason that a person has to remove.
            RuntimeError: the workers fail before they have begun.
        """
        with told_to_stop(self, self._say) as told:
            try:
                self._assign()
                while self._lanes:
                    lane, message = self._events.get()
                    self._take(lane, message, is_told=told.by is not None)
                    if told.by is None:
                        self._assign()
                    if isinstance(message, Free | Ended | Over):
                        self._count()
            finally:
                for work in self._works.values():
                    work.release()
                until = time.monotonic() + CLOSING_SECONDS
                for close in self._later:
                    close(until)
        return told.by if not self.plan.is_over else None

    def put(self, asked: Asked) -> None:
        """Passes a request on to all lanes."""
        for lane in list(self._lanes):
            lane.put(asked)

    def _assign(self) -> None:
        """Gives the lanes that ask something to do, starts lanes for what is left, and ends those
        for which there will be nothing."""
        while True:
            at_work = {lane.work for lane in self._lanes if lane.work is not None}
            waiting = [w for w in map(self._work_of, self.plan.ready()) if w not in at_work]
            asking = [lane for lane in self._lanes if lane.question and lane.work is None]
            # In the plan's order: a copy comes before its source goes on.
            work = waiting[0] if waiting else None
            if work is None:
                if not at_work and self.plan.is_over:
                    for lane in asking:
                        lane.answer()
                return
            if fitting := [lane for lane in asking if lane.shape == work.shape]:
                if self._begin(work):
                    fitting[0].give(work)
                continue
            starting = [lane for lane in self._lanes if not lane.has_asked]
            wanted = len([w for w in waiting if w.shape == work.shape])
            coming = len([lane for lane in starting if lane.shape == work.shape])
            if len(self._lanes) < self._most and coming < wanted:
                self._start(work)
                continue
            if asking and len(self._lanes) >= self._most and not coming:
                asking[0].answer()  # its workers are of another number: others follow
            return

    def _count(self) -> None:
        """Publishes how many trials are in each state."""
        at_work = {lane.work.segment.trial for lane in self._lanes if lane.work is not None}
        states = dict.fromkeys(("running", "failed", "complete", "waiting"), 0)
        for trial, state in self.plan.states().items():
            states["running" if trial in at_work else state] += 1
        for state, count in states.items():
            self._metrics.publish({"trials": count}, state=state)

    def _work_of(self, segment: Segment) -> Work:
        key = (segment.trial, segment.until)
        if key not in self._works:
            c = dataclasses.replace(self.plan.config_of(segment), resume="auto")
            more = (self._say, self._alerts, self._later)
            self._works[key] = Work(segment, c, self._datasets, *more)
        return self._works[key]

    def _start(self, work: Work) -> None:
        used = {lane.number for lane in self._lanes}
        number = next(n for n in range(1, self._most + 1) if n not in used)
        self._lanes.append(Lane(number, work, self._datasets, self._shared, self._events))

    def _begin(self, work: Work) -> bool:
        """Prepares some work; returns False if there is nothing to train."""
        try:
            result = work.begin()
        except ClusterError:
            raise
        except MantaError as e:
            result = work.failed(reason(e))
        if result is not None:
            self._tell(work, result)
            return False
        found = checkpoint.find(work.c.run_folder)
        self._since[work.segment.trial] = _train_seconds(found[-1]) if found else 0.0
        return True

    def _take(self, lane: Lane, message: Any, is_told: bool) -> None:
        if isinstance(message, Free):
            lane.question, lane.has_asked = message.question, True
            self._failed_starts = 0
            if lane.work is not None:  # its workers were started again, or did not hear the answer
                lane.answer()
        elif isinstance(message, Ended):
            self._end(lane, message)
        elif isinstance(message, Over):
            self._lanes.remove(lane)
            self._after(lane, message.error, is_told)
        elif lane.work is not None:
            lane.work.hear(message)
            self._started(lane.work)
        elif isinstance(message, str):
            self._say(message)

    def _end(self, lane: Lane, ended: Ended) -> None:
        work, lane.work = lane.work, None
        if work is None:
            return  # said twice
        if ended.diverged is None:
            result = work.result()
        else:
            result = work.failed(reason(TrainingError(ended.diverged)), diverged=True)
        work.release()
        if result is not None:  # else it was told to stop
            self._spend(work)
            self._tell(work, result)

    def _spend(self, work: Work) -> None:
        segment, found = work.segment, checkpoint.find(work.c.run_folder)
        self.spent.segments += 1
        self.spent.tokens += segment.until - segment.start
        before = self._since.get(segment.trial, 0.0)
        self.spent.step_seconds += max(0.0, _train_seconds(found[-1]) - before) if found else 0.0

    def _tell(self, work: Work, result: Result) -> None:
        del self._works[work.segment.trial, work.segment.until]
        self.plan.tell(result)
        self._done += 1
        tokens = f"{work.segment.until:,} tokens"
        what = f"val loss {result.loss:.4f}" if result.loss is not None else f"FAILED: {result.why}"
        self._say(f"{result.trial} done at {tokens}: {what} ({self._done} done)")

    def _after(self, lane: Lane, error: Exception | None, is_told: bool) -> None:
        """Decides what follows from the end of a lane's workers."""
        work, lane.work = lane.work, None
        if work is not None:
            work.release()
        if error is None or isinstance(error, Moving) or is_told:
            if error is not None and not isinstance(error, Moving):
                self._say(f"lane {lane.number}: {in_short(str(error))}")
            return
        if isinstance(error, ClusterError) or work is None:
            self._failed_starts += 1
            is_fatal = isinstance(error, MantaError) or self._failed_starts > MOST_STARTS
            if is_fatal and not self._lanes:
                raise error
            if is_fatal:
                self._most = max(1, len(self._lanes))
            self._say(f"lane {lane.number} is gone: {in_short(str(error))}")
            return
        try:
            if isinstance(error, MantaError) or not isinstance(error, RuntimeError):
                raise error
            work.recover(error)
        except (GivenUp, TrainingError, MantaError) as e:
            self._tell(work, work.failed(reason(e)))


def _train_seconds(path: str) -> float:
    return checkpoint.load_state(path).train_seconds
