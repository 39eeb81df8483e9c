"""A sweep without training: its plan with losses that a function gives. It tells what a sweep will
cost before it starts, and lets a plan be tried on recorded curves or on a known truth."""

import dataclasses
from collections.abc import Callable

from manta.sweep.journal import Notes
from manta.sweep.plan import Plan, Result
from manta.sweep.schedulers import Segment
from manta.sweep.settings import SweepConfig

Answer = Callable[[Segment], float | None]
"""The val loss at the end of a segment; None: the trial failed."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a sweep trains, over all its trials."""

    trials: int
    """Runs, repeats with other seeds included."""
    tokens: int
    flops: float
    longest: float
    """The FLOPs of the trial with the most of them."""


def rehearse(
    c: SweepConfig,
    lanes: int,
    answer: Answer,
    pick: Callable[[list[Segment]], Segment] = lambda ready: ready[0],
    notes: Notes | None = None,
) -> Plan:
    """The plan of a sweep at its end, if `answer` gives the losses. `pick` says which of the
    segments that lanes work on ends first."""
    plan = Plan(c, notes or Notes(), lanes)
    while ready := plan.ready():
        segment = pick(ready)
        plan.tell(Result(segment.trial, segment.until, answer(segment), "failed"))
    return plan


def foreseen(c: SweepConfig, lanes: int) -> Cost:
    """What a sweep will cost at most, if no trial fails: schedulers choose by losses, but how much
    they train hardly depends on them. Suggestions of Optuna count as random draws, which cost as
    much unless the space has sizes of models in it."""
    if c.sweep.search == "optuna":
        c = dataclasses.replace(c, sweep=dataclasses.replace(c.sweep, search="random"))
    places: dict[str, int] = {}
    plan = rehearse(c, lanes, lambda segment: float(places.setdefault(segment.trial, len(places))))
    return cost(plan)


def cost(plan: Plan) -> Cost:
    """What a plan's segments so far cost."""
    flops: dict[str, float] = {}
    for segment in plan.segments:
        spent = (segment.until - segment.start) * plan.flops_per_token(segment.trial)
        flops[segment.trial] = flops.get(segment.trial, 0.0) + spent
    tokens = sum(segment.until - segment.start for segment in plan.segments)
    return Cost(len(flops), tokens, sum(flops.values()), max(flops.values(), default=0.0))
