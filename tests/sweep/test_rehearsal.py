"""Plans without training: what they cost, and how much of their lanes' time is work."""

import heapq
from typing import Any

import numpy as np
import pytest

from helpers.sweeps import Truth, config, simulated
from manta.sweep.journal import Notes
from manta.sweep.plan import Plan, Result
from manta.sweep.rehearsal import cost, foreseen
from manta.sweep.schedulers import Segment

RATES = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
BATCHES = [512, 1024]
GRID = {"lr": RATES, "tokens_per_batch": BATCHES}
LINE = {"lr": RATES, "tokens_per_batch": None}


@pytest.mark.parametrize(
    ("keys", "trials", "lengths"),
    [
        (GRID, 16, 16.0),
        ({**GRID, "repeats": 3}, 48, 48.0),
        ({**GRID, "scheduler": "asha"}, 16, 5.0),
        ({**LINE, "scheduler": "asha", "reduction_factor": 4, "rungs": 2}, 8, 8 / 4 + 2 * 3 / 4),
        ({**LINE, "repeats": 2, "repeat": "contenders", "contenders": 3}, 11, 11.0),
        ({**LINE, "scheduler": "pbt", "exchanges": 4}, 8 + 2 * 3, 8.0),
        ({**LINE, "search": "random", "trials": 6}, 6, 6.0),
        ({"replay": {0: {"optimizer.lr": 1.0}, 4096: {"optimizer.lr": 2.0}}}, 1, 1.0),
    ],
    ids=str,
)
def test_what_a_sweep_costs_is_known_before_it_starts(
    keys: dict[str, Any], trials: int, lengths: float
) -> None:
    c = config(**keys)
    before, after = foreseen(c, 1), cost(simulated(c, Truth(), lanes=1))
    assert (before.trials, before.tokens) == (trials, lengths * c.total_tokens)
    assert (after.trials, after.tokens) == (trials, lengths * c.total_tokens)
    # 6 FLOPs for each parameter, some more for attention.
    assert before.flops > before.tokens * 6 * 20_000
    assert before.longest <= before.flops


def test_suggestions_cost_as_much_as_draws() -> None:
    c = config(**LINE, search="optuna", trials=6, scheduler="asha")
    assert foreseen(c, 1).tokens == 65_536 * (6 + 3 + 2 + 4) // 8


def share_of_work(plan: Plan, lanes: int, random: np.random.Generator | None = None) -> float:
    """The share of the lanes' time that is work, if a segment takes a time for its FLOPs; with
    `random`, up to a tenth more or less, and half as much again with small batches."""
    now = work = 0.0
    running: list[tuple[float, int, Segment]] = []
    begun: set[tuple[str, int]] = set()
    while True:
        free = [s for s in plan.ready() if (s.trial, s.until) not in begun]
        for s in free[: lanes - len(running)]:
            begun.add((s.trial, s.until))
            took = (s.until - s.start) * plan.flops_per_token(s.trial)
            if random is not None:
                slower = 1.5 if s.settings.get("tokens_per_batch") == BATCHES[0] else 1.0
                took *= slower * random.uniform(0.9, 1.1)
            heapq.heappush(running, (now + took, len(begun), s))
            work += took
        if not running:
            return work / (lanes * now)
        now, _, s = heapq.heappop(running)
        plan.tell(Result(s.trial, s.until, Truth().answer(s)))


@pytest.mark.parametrize(
    "keys",
    [
        GRID,
        {**GRID, "scheduler": "asha"},
        {**GRID, "scheduler": "asha", "repeats": 2},
        {**GRID, "search": "random", "trials": 12, "scheduler": "asha"},
        {**LINE, "scheduler": "pbt"},
    ],
    ids=str,
)
def test_two_lanes_hardly_wait_for_the_order_of_the_plan(keys: dict[str, Any]) -> None:
    """Though durations are not as planned, and results are taken in the plan's order. (Where the
    last rung has one trial, a lane has nothing to do in any case.)"""
    c = config(**keys)
    planned = share_of_work(Plan(c, Notes(), 2), 2)
    shares = [share_of_work(Plan(c, Notes(), 2), 2, np.random.default_rng(n)) for n in range(5)]
    assert np.mean(shares) > 0.95 * planned > 0.8
