"""Losses and gradients that are out of line, found from the run's own past; alike on all ranks."""

import dataclasses
import math
import statistics
from typing import Any, Literal

from manta.config import Count, Natural, PositiveFloat, config

# A normal distribution's standard deviation, from the median distance to its median.
DEVIATIONS = 1.4826
FEWEST = 16  # values, before anything is out of line


@config
class SpikeConfig:
    action: Literal["off", "warn", "skip", "rollback"] = "rollback"
    """What happens at a loss spike. off: nothing is looked at; warn: a line; skip: a line, and a
    step whose gradient norm is a spike is not taken; rollback: back to the last checkpoint before
    it, and past it without training on its tokens. (A step whose gradient is not finite is never
    taken.)"""
    threshold: PositiveFloat = 10.0
    """How far above the median of the last steps a spike is, in standard deviations (robust: from
    the median distance)."""
    window: Count = 128
    """Steps that are looked back on."""
    max_skipped: Count = 8
    """Steps in a row whose gradient is not finite, after which the run goes back too (action
    rollback), or ends."""
    margin: Natural = 2
    """Steps before a spike that are passed over with it."""
    max_rollbacks: Natural = 3
    """How often a run goes back; at the next spike it ends, with a report."""


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """Steps `first` to `last` are out of line; why, for a person."""

    first: int
    last: int
    why: str
    kind: Literal["spike", "skipped", "stuck"]
    """spike: the loss is too high; skipped: the step was not taken, as its gradient is not finite
    or too large; stuck: as were too many before it."""


class Detector:
    """Looks at steps as they are logged. Its state is a dict that a checkpoint can hold."""

    def __init__(self, c: SpikeConfig, state: dict[str, Any]):
        self._c = c
        self._losses: list[float] = list(state.get("losses", []))
        self._norms: list[float] = list(state.get("norms", []))
        self._skipped: int = state.get("skipped", 0)

    @property
    def state(self) -> dict[str, Any]:
        return {"losses": self._losses, "norms": self._norms, "skipped": self._skipped}

    @property
    def norm_limit(self) -> float:
        """The gradient norm beyond which a step is not taken, for action=skip."""
        return limit(self._norms, self._c.threshold) if self._c.action == "skip" else math.inf

    def look(self, step: int, loss: float, norm: float) -> Anomaly | None:
        """Takes a step into account: its loss over all ranks and its gradient's norm (not finite
        where the step was not taken). Values that are out of line do not enter the window."""
        c = self._c
        if c.action == "off":
            return None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._skipped += 1
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            why = f"the {what} of step {step} is {loss if what == 'loss' else norm}"
            if self._skipped >= c.max_skipped:
                why += f", as for {self._skipped} steps in a row"
                return Anomaly(step - self._skipped + 1, step, why, "stuck")
            return Anomaly(step, step, why, "skipped")
        self._skipped = 0
        highest = limit(self._losses, c.threshold)
        if loss > highest:
            why = (
                f"the loss of step {step} is {loss:.4f}, where the steps before have a median of "
                f"{statistics.median(self._losses):.4f} and spikes.threshold={c.threshold:g} "
                f"allows {highest:.4f}"
            )
            return Anomaly(step, step, why, "spike")
        self._losses = [*self._losses, loss][-c.window :]
        self._norms = [*self._norms, norm][-c.window :]
        return None


def limit(values: list[float], threshold: float) -> float:
    """The median of these values plus so many robust standard deviations (of at least a hundredth
    of the median: a loss that hardly moves is no reason to stop at the next one); infinite where
    they are few."""
    if len(values) < FEWEST:
        return math.inf
    median = statistics.median(values)
    distance = statistics.median(abs(value - median) for value in values)
    return median + threshold * max(DEVIATIONS * distance, 0.01 * abs(median))
