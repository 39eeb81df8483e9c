"""What a run's records say about its health: figures for the conditions of alerts.

Pure arithmetic over what was heard and a clock; nothing here knows of Ray, files or threads.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence

from manta.messages import Logged, Saved, WentBack

RECENT_SECONDS = 30.0  # how far back "recent" steps go
FEWEST_RECENT = 5  # steps, however slow they are
FEWEST_BEFORE = 20  # lines of the log, before the median of their speeds is worth comparing with
MOST_KEPT = 2000
FAULT_SECONDS = 600.0
GOODPUT_SECONDS = 900.0
SHORTEST_INTERVAL = 60.0  # between checkpoints: those of toys come faster than they are written


class Figures:
    """Keeps what was heard of a run, and computes figures from it.

    Args:
        now: the time in seconds, from a clock that never goes back.
        interval: seconds between checkpoints, from seconds per step and tokens per second; None if
            not known.
        planned: tokens per second by the run's plan, if it has one.
    """

    def __init__(
        self,
        now: float,
        interval: Callable[[float, float], float | None] = lambda *_: None,
        planned: float | None = None,
    ):
        self._interval, self._planned = interval, planned
        self._heard = self._saved = self._begun = now
        self._gaps: deque[float] = deque(maxlen=50)
        self._steps: deque[tuple[float, float, float, float]] = deque(maxlen=MOST_KEPT)
        self._faults: deque[float] = deque(maxlen=MOST_KEPT)
        self._speeds: deque[float] = deque(maxlen=MOST_KEPT)
        self._productive: deque[tuple[float, float]] = deque()
        self._between: deque[float] = deque(maxlen=5)
        self._tokens: int | None = None
        self._starts: int | None = None
        self._newest: Saved | None = None
        self._rollbacks = 0

    def hear(self, message: Logged | Saved | WentBack, now: float) -> None:
        """Takes in what a worker says of the run."""
        if isinstance(message, Logged):
            self._log(message, now)
        elif isinstance(message, Saved):
            if self._newest is not None:
                self._between.append(now - self._saved)
            self._newest, self._saved = message, now
        else:
            self._rollbacks += 1
            self._faults.append(now)

    def _log(self, message: Logged, now: float) -> None:
        if message.starts != self._starts:  # a start: what was usual before says nothing
            self._starts, self._tokens, first = message.starts, None, True
            self._gaps.clear()
            if self._newest is None:
                self._saved = now
        else:
            first = False
        steps = [r for r in message.records if "step_seconds" in r]
        if steps and not first:
            self._gaps.append(now - self._heard)
        if steps:
            self._heard = now
        for record in steps:
            if not all(math.isfinite(record.get(k, 0.0)) for k in ("loss", "grad_norm")):
                self._faults.append(now)
            seconds, before = float(record["step_seconds"]), self._tokens
            self._tokens = int(record["tokens"])
            if before is not None:  # the first step of a start compiles and fills caches
                waited = float(record.get("data_wait_seconds", 0.0))
                self._steps.append((now, seconds, max(0, self._tokens - before), waited))
        if (speed := self._speed()) is not None:
            self._speeds.append(speed)
        self._productive.append((now, message.seconds.get("productive", 0.0)))
        while len(self._productive) > 2 and now - self._productive[1][0] >= GOODPUT_SECONDS:
            self._productive.popleft()

    def at(self, now: float) -> dict[str, float]:
        """The figures that are known now, by the names of their metrics."""
        usual = max(self._gaps, default=0.0)
        while self._faults and now - self._faults[0] > FAULT_SECONDS:
            self._faults.popleft()
        found = {
            "seconds_without_step": max(0.0, now - self._heard - usual),
            "loss_faults": float(len(self._faults)),
            "rollbacks": float(self._rollbacks),
            **self._against_usual(),
            **self._checkpoints(now),
        }
        if self._starts is not None:
            found["restarts"] = float(self._starts - 1)
        if self._planned is not None:
            found["planned_tokens_per_second"] = self._planned
        if self._productive and now - self._productive[0][0] >= GOODPUT_SECONDS:
            (since, before), (_, latest) = self._productive[0], self._productive[-1]
            found["recent_goodput"] = min(1.0, max(0.0, latest - before) / (now - since))
        return found

    def _recent(self) -> list[tuple[float, float, float, float]]:
        if not self._steps:
            return []
        newest = self._steps[-1][0]
        found: list[tuple[float, float, float, float]] = []
        for step in reversed(self._steps):
            if len(found) >= FEWEST_RECENT and newest - step[0] > RECENT_SECONDS:
                break
            found.append(step)
        return found

    def _speed(self) -> float | None:
        """Tokens per second of the recent steps; None: there are too few of them."""
        recent = self._recent()
        seconds = sum(s for _, s, _, _ in recent)
        if len(recent) < FEWEST_RECENT or seconds <= 0:
            return None
        return sum(tokens for _, _, tokens, _ in recent) / seconds

    def _against_usual(self) -> dict[str, float]:
        speed = self._speed()
        if speed is None:
            return {}
        recent = self._recent()
        found = {"data_wait_share": sum(w for *_, w in recent) / sum(s for _, s, _, _ in recent)}
        if self._planned:
            found["speed_of_plan"] = speed / self._planned
        if len(self._speeds) >= FEWEST_BEFORE:
            found["speed_of_median"] = speed / max(statistics.median(self._speeds), 1e-9)
        return found

    def _checkpoints(self, now: float) -> dict[str, float]:
        age = now - self._saved
        found = {"checkpoint_age_seconds": age}
        if self._newest is not None:
            found |= {
                "checkpoint_step": float(self._newest.step),
                "checkpoint_seconds": self._newest.seconds,
                "checkpoint_paused_seconds": self._newest.paused,
            }
        interval = statistics.median(self._between) if self._between else None
        if self._steps:
            count, wall = len(self._steps), self._steps[-1][0] - self._steps[0][0]
            each = max(wall / count, statistics.median(s for _, s, _, _ in self._steps))
            tokens = sum(t for _, _, t, _ in self._steps) / count / max(each, 1e-9)
            interval = self._interval(each, tokens) or interval
        if interval is not None:
            found["checkpoint_intervals"] = age / max(interval, SHORTEST_INTERVAL)
        return found


def shares_free(totals: Sequence[tuple[float, float]]) -> float | None:
    """The smallest free share among disks, each as (free, whole) bytes; None if there are none."""
    return min((free / whole for free, whole in totals if whole), default=None)


def lost(most: int, alive: int, left: int) -> int:
    """Nodes that are missing, if at most so many were alive at once, so many are alive now, and so
    many left as intended."""
    return max(0, most - alive - left)
