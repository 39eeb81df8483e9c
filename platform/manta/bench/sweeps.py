"""Replays ASHA over recorded curves of a grid: how many of the grid's tokens it trains, and whether
it finds the grid's winner. No model is trained, unless the curves are to be recorded first."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from manta import foreign, storage
from manta.bench.curves import RECORDED, Curve, Curves, record
from manta.bench.settings import BenchConfig
from manta.config import from_dict
from manta.errors import DataError
from manta.sweep.rehearsal import cost, rehearse
from manta.sweep.schedulers import Segment
from manta.sweep.settings import SweepConfig
from manta.sweep.space import label
from manta.terminal import line

REPLAYS = 100
KEPT = 2 / 3  # of the values of each key, in each replay
# By name: keys of `sweep`, and the number of lanes.
STRATEGIES: dict[str, tuple[dict[str, Any], int]] = {
    "factor 2, 4 rungs": ({"scheduler": "asha"}, 1),
    "the same on 4 devices": ({"scheduler": "asha"}, 4),
    "factor 3, 3 rungs": ({"scheduler": "asha", "reduction_factor": 3, "rungs": 3}, 1),
    "factor 2, 5 rungs": ({"scheduler": "asha", "rungs": 5}, 1),
    "factor 4, 3 rungs": ({"scheduler": "asha", "reduction_factor": 4, "rungs": 3}, 1),
}


@dataclasses.dataclass(frozen=True)
class Replays:
    """What a strategy found over many replays."""

    trials: int
    """The number of trials of each grid."""
    exact: float
    """The share of replays that found the winner itself."""
    within: float
    """The share that found a trial whose loss is within the noise of the winner's."""
    tokens: float
    """The most tokens that a replay trained, as a share of the grid's."""
    regret: float
    """Mean loss of what was found, above the winner's."""


def sweeps(c: BenchConfig) -> dict[str, Any]:
    file = c.curves or str(RECORDED)
    if c.curves and not storage.exists(storage.absolute(file)):
        threads = c.threads_per_worker or 1
        made = record(c.data.corpus, threads, lambda text: print(text, flush=True))
        storage.write_bytes(storage.absolute(file), storage.encode_json(dataclasses.asdict(made)))
    curves = read(file)
    found = {
        name: replays(curves, keys, REPLAYS, c.seed, lanes)
        for name, (keys, lanes) in STRATEGIES.items()
    }
    return {
        "trials": len({_key(curve.settings) for curve in curves.curves}),
        "seeds": len({curve.seed for curve in curves.curves}),
        "noise": noise(curves),
        "replays": REPLAYS,
        "strategies": {name: dataclasses.asdict(result) for name, result in found.items()},
    }


def read(file: str) -> Curves:
    """Recorded curves. Raises DataError if the file has none."""
    path = storage.absolute(file)
    found = foreign.read_json(path, Curves, DataError)
    if not found.curves:
        raise DataError(f"{line(path)}: no curves in it; record them again into another file")
    return found


def replays(curves: Curves, keys: dict[str, Any], count: int, seed: int, lanes: int = 1) -> Replays:
    """Replays a strategy. Each time the grid is another one: two thirds of the values of each key,
    in a random order, and for each trial the curve of one of its seeds."""
    exact, within, tokens, regrets = [], [], [], []
    by_key, limit = _by_settings(curves), noise(curves)
    for number in range(count):
        random = np.random.default_rng([seed, number])
        c = _part_of(curves, keys, random)
        names = [_key(trial.settings) for trial in c.grid[0]]
        drawn = {key: by_key[key][random.integers(len(by_key[key]))] for key in names}
        final = {key: _last(curve) for key, curve in drawn.items()}
        plan = rehearse(c, lanes, _answers(drawn))
        found = _key(plan.standings()[0].trial.settings)
        regrets.append(final[found] - min(final.values()))
        exact.append(regrets[-1] == 0.0)
        within.append(regrets[-1] <= limit)
        tokens.append(cost(plan).tokens / (c.total_tokens * len(drawn)))
    shares = statistics.mean(exact), statistics.mean(within)
    return Replays(len(drawn), *shares, max(tokens), statistics.mean(regrets))


def noise(curves: Curves) -> float:
    """The standard deviation over seeds of the loss of one run: that of the better half of the
    settings, as a median."""
    losses = [[_last(curve) for curve in found] for found in _by_settings(curves).values()]
    ordered = sorted(losses, key=statistics.mean)
    return statistics.median(statistics.stdev(found) for found in ordered[: len(ordered) // 2])


def _part_of(curves: Curves, keys: dict[str, Any], random: np.random.Generator) -> SweepConfig:
    """A sweep of a part of the grid, with another strategy."""
    space = {}
    for d in curves.sweep.dimensions:
        kept = max(2, round(KEPT * len(d.values)))
        space[d.key] = [d.values[i] for i in random.permutation(len(d.values))[:kept]]
    sweep = {**keys, "space": space, "lr": None, "tokens_per_batch": None}
    return from_dict(SweepConfig, {**curves.config, "sweep": sweep})


def _by_settings(curves: Curves) -> dict[str, list[Curve]]:
    """The curves of each settings, one for each seed."""
    found: dict[str, list[Curve]] = {}
    for curve in curves.curves:
        found.setdefault(_key(curve.settings), []).append(curve)
    return found


def _answers(drawn: dict[str, Curve]) -> Callable[[Segment], float | None]:
    def answer(segment: Segment) -> float | None:
        curve = drawn[_key(segment.settings)]
        return curve.losses[int(np.searchsorted(curve.tokens, segment.until))]

    return answer


def _key(settings: Mapping[str, Any]) -> str:
    return label(dict(sorted(settings.items())))


def _last(curve: Curve) -> float:
    return math.inf if curve.losses[-1] is None else curve.losses[-1]


def table(found: dict[str, Any]) -> str:
    head = ("asha", "trials", "tokens", "winner found", "within noise", "above the winner")
    rows = [
        (
            name,
            f"{r['trials']}",
            f"{r['tokens']:.1%}",
            f"{r['exact']:.0%}",
            f"{r['within']:.0%}",
            f"{r['regret']:.4f}",
        )
        for name, r in found["strategies"].items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in (head, *rows)
    ]
    return "\n".join(
        [
            f"{found['trials']} trials with {found['seeds']} seeds each; noise over seeds "
            f"{found['noise']:.4f}; {found['replays']} replays with parts of this grid",
            *lines,
        ]
    )
