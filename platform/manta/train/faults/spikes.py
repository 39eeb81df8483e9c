"""Finds losses and gradients that are far above the run's recent past; alike on all ranks."""

import dataclasses
import math
import statistics
from typing import Any, Literal

from manta.config import Count, Natural, PositiveFloat, config

# A normal distribution's standard deviation, from the median distance to its median.
DEVIATIONS = 1.4826
FEWEST = 16  # values in the window before anything can count as a spike


@config
class SpikeConfig:
    action: Literal["off", "warn", "skip", "rollback"] = "rollback"
    """What happens at a loss spike. off: nothing is checked; warn: a line is logged; skip: a line
    is logged, and a step whose gradient norm is a spike is not taken; rollback: the run goes back
    to the last checkpoint before the spike, and passes it without training on its tokens. (A step
    whose gradient is not finite is never taken.)"""
    threshold: PositiveFloat = 10.0
    """Distance above the median of the last steps from which a loss is a spike, in standard
    deviations (a robust estimate, from the median distance to the median)."""
    window: Count = 128
    """Number of last steps that a step is compared with."""
    max_skipped: Count = 8
    """Number of steps in a row with a gradient that is not finite, after which the run goes back
    too (with action rollback) or ends."""
    margin: Natural = 2
    """Number of steps before a spike that are passed without training, like the spike's own."""
    max_rollbacks: Natural = 3
    """How often a run goes back; at the next spike after that, it ends with a report."""


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """An anomaly in steps `first` to `last`; `why` explains it to a person."""

    first: int
    last: int
    why: str
    kind: Literal["spike", "skipped", "stuck"]
    """The kind of anomaly. spike: the loss is too high; skipped: the step was not taken, as its
    gradient is not finite or too large; stuck: too many steps in a row were skipped."""


class Detector:
    """Looks at steps as they are logged. Its state is a dict that a checkpoint can store."""

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
        """Takes in a step's loss over all ranks and its gradient norm (not finite if the step was
        not taken); returns the anomaly, if any. An anomaly's values do not enter the window."""
        c = self._c
        if c.action == "off":
            return None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._skipped += 1
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            why = f"the {what} of step {step} is {loss if what == 'loss' else norm}"
            if self._skipped >= c.max_skipped:
                why += f"; {self._skipped} steps in a row were not finite"
                return Anomaly(step - self._skipped + 1, step, why, "stuck")
            return Anomaly(step, step, why, "skipped")
        self._skipped = 0
        highest = limit(self._losses, c.threshold)
        if loss > highest:
            why = (
                f"the loss of step {step} is {loss:.4f}; the median of the steps before is "
                f"{statistics.median(self._losses):.4f}, and spikes.threshold={c.threshold:g} "
                f"allows {highest:.4f}"
            )
            return Anomaly(step, step, why, "spike")
        self._losses = [*self._losses, loss][-c.window :]
        self._norms = [*self._norms, norm][-c.window :]
        return None


def limit(values: list[float], threshold: float) -> float:
    """The median of `values` plus `threshold` robust standard deviations; infinite if there are
    fewer than FEWEST values.

    A standard deviation is at least a hundredth of the median, so that after values that hardly
    vary, a small change does not count as a spike.
    """
    if len(values) < FEWEST:
        return math.inf
    median = statistics.median(values)
    distance = statistics.median(abs(value - median) for value in values)
    return median + threshold * max(DEVIATIONS * distance, 0.01 * abs(median))
