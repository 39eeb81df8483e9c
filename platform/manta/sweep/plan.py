"""What a sweep does next: which trial trains how far, decided from the results so far.

Trials of different lengths end in another order on every machine, and after a kill. To decide the
same each time, the plan has lanes of its own, in which a trial takes as long as it has FLOPs: it
takes results in the order in which these lanes would give them, and keeps those that come earlier.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a trial: to train a run from a number of tokens to another one, then to pause."""

    trial: str
    """The name of the run."""
    start: int
    """Tokens that the run has at its start; 0: a new run."""
    until: int
    """Tokens to train to, rounded up to whole batches of the trial; the run's val loss is measured
    there, and a checkpoint saved. total_tokens: the run's end."""
    settings: Mapping[str, Any]
    """Values of the keys that the sweep varies, from here on."""
    source: str | None = None
    """The run from whose checkpoint at `start` tokens this run, a new one, begins (pbt)."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a segment."""

    trial: str
    tokens: int
    """The `until` of the segment."""
    loss: float | None
    """Val loss; None, or a number that is not finite: the trial failed or diverged."""
    why: str = ""
    """Why the trial failed or diverged, in one line."""
