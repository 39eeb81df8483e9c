"""What runs in lanes cost: told before, once the first steps are measured, and after."""

import dataclasses
import time
from collections.abc import Callable

from manta.sweep.running import Spent
from manta.sweep.work import Work
from manta.train.records.logbook import duration


@dataclasses.dataclass(frozen=True)
class Bill:
    """What is to be trained in lanes."""

    what: str
    """What it is, with its name: sweep NAME, ladder NAME."""
    runs: str
    """How many runs, and how many tokens, in words."""
    flops: float
    """FLOPs of all runs, those included that are trained already."""
    lanes: int
    """Runs at a time."""
    flops_per_token: Callable[[str], float]
    """FLOPs of the run of this name for each token."""
    trained: Callable[[], tuple[int, float]]
    """Tokens and FLOPs that are trained by now."""
    left: str = "left"
    """What the rest is called."""
    doubt: str = ""
    """Why the rest may be faster or slower than the steps that are measured first."""


class Costs:
    """Says what a bill comes to.

    Args:
        say: receives each line.
    """

    def __init__(self, bill: Bill, say: Callable[[str], None]):
        self._bill, self._say = bill, say
        self._started, self._is_told = time.monotonic(), False

    def begin(self, flops_per_second: float | None = None, why: str = "") -> None:
        """Says what is to be trained, and how long that takes if each lane has this speed, which is
        known from `why`."""
        b, (tokens, _) = self._bill, self._bill.trained()
        line = f"{b.what}: {b.runs}"
        if tokens:
            line += f", of which {tokens:,} are trained"
        self._say(f"{line}; {b.lanes} at a time ({b.flops:.2g} FLOPs)")
        if flops_per_second is not None and self._left() > 0:
            self._say(f"{self._time(flops_per_second)}, {why}")

    def hear(self, work: Work) -> None:
        """Says how long it will take, once, when some steps of a run are measured."""
        if self._is_told or (measured := work.measured()) is None:
            return
        self._is_told = True
        b, run = self._bill, work.segment.trial
        text = f"{self._time(measured * b.flops_per_token(run))}, measured in {run}: "
        text += f"{measured:,.0f} tok/s in each of {b.lanes} lane(s)"
        self._say(text + (f"; {b.doubt}" if b.doubt else ""))

    def end(self, spent: Spent) -> None:
        """Says what was spent."""
        b, seconds = self._bill, time.monotonic() - self._started
        if not spent.segments:
            self._say(f"{b.what} is finished; nothing was trained")
            return
        share = spent.step_seconds / seconds / b.lanes
        self._say(
            f"trained {spent.tokens:,} tokens in {duration(seconds)}; {share:.0%} of the lanes' "
            "time was steps"
        )

    def _left(self) -> float:
        """FLOPs that are not trained yet."""
        return max(0.0, self._bill.flops - self._bill.trained()[1])

    def _time(self, flops_per_second: float) -> str:
        """The time of the rest, in lanes of this speed."""
        seconds = self._left() / flops_per_second / self._bill.lanes
        return f"about {duration(seconds)} of steps are {self._bill.left}"
