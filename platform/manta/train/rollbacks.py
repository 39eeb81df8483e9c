"""Takes a run back to before a loss spike, and passes over the tokens that caused the spike.

A run's rollbacks.json says which steps are passed over: their tokens are read but not trained on.
The file is written first, so that a run that dies on its way back still goes back when it restarts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from manta import foreign, layout, storage
from manta.config import Count
from manta.errors import TrainingError
from manta.terminal import named
from manta.train.checkpoints import checkpoint
from manta.train.faults.spikes import Anomaly, SpikeConfig


class Diverged(TrainingError):
    """The run has gone back as often as it may."""


def go_back(run: str, c: SpikeConfig, anomaly: Anomaly, say: Callable[[str], None]) -> None:
    """Records the steps to pass over, and sets aside the checkpoints from the first of them on.
    Only one rank calls this.

    Raises:
        Diverged: the run has gone back as often as it may.
    """
    before = _read(run)
    if len(before) >= c.max_rollbacks:
        steps = named([f"{r['first']} to {r['last']}" for r in before]) or "none"
        raise Diverged(
            f"{anomaly.why}; the run has gone back {len(before)} times (steps passed over: "
            f"{steps}) and ends here: lower optimizer.lr or optimizer.grad_clip, look at these "
            "tokens (jobs/inspect.py), or raise spikes.max_rollbacks"
        )
    first = max(1, anomaly.first - c.margin)
    entry = {"first": first, "last": anomaly.last, "why": anomaly.why}
    storage.write_json(storage.join(run, layout.ROLLBACKS), [*before, entry])
    for path in checkpoint.find(run):
        if checkpoint.load_state(path).step >= first:
            checkpoint.set_aside_as(path, layout.ROLLED_BACK)
    left = checkpoint.find(run)
    where = f"back to {left[-1]}" if left else "back to the start"
    say(f"{anomaly.why}: {where}; the tokens of steps {first} to {anomaly.last} are passed over")


@dataclasses.dataclass(frozen=True)
class PassedOver:
    """The steps (0 is the first) whose tokens are not trained on."""

    ranges: tuple[range, ...] = ()

    def __contains__(self, step: object) -> bool:
        return any(step in steps for steps in self.ranges)


def passed_over(run: str) -> PassedOver:
    """The steps that the run passes over. Raises TrainingError if its file is damaged."""
    # The file counts steps from 1: its step n is the loop's step n - 1.
    return PassedOver(tuple(range(r["first"] - 1, r["last"]) for r in _read(run)))


@dataclasses.dataclass
class _Entry:
    first: Count
    last: Count
    why: str

    def __post_init__(self) -> None:
        if self.last < self.first:
            raise ValueError(f"last={self.last} is before first={self.first}")


def _read(run: str) -> list[dict[str, Any]]:
    path = storage.join(run, layout.ROLLBACKS)
    if not storage.exists(path):
        return []
    remedy = "restore the file, or delete it to train on all tokens"
    return [
        dataclasses.asdict(e) for e in foreign.read_json(path, list[_Entry], TrainingError, remedy)
    ]
