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
# By name: keys of `sweep`, and the number of lanes.
STRATEGIES: dict[str, tuple[dict[str, Any], int]] = {
    "factor 2, 4 rungs": ({"scheduler": "asha"}, 1),
    "the same on 4 devices": ({"scheduler": "asha"}, 4),
    "factor 3, 3 rungs": ({"scheduler": "asha", "reduction_factor": 3, "rungs": 3}, 1),
    "factor 4, 3 rungs": ({"scheduler": "asha", "reduction_factor": 4, "rungs": 3}, 1),
}


@dataclasses.dataclass(frozen=True)
class Replays:
    """What a strategy found over many replays."""

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
    """Replays a strategy. Each time the grid is another one: each of its trials has the curve of
    one of its seeds, and its values are in another order."""
    exact, within, tokens, regrets = [], [], [], []
    by_key = _by_settings(curves)
    for number in range(count):
        random = np.random.default_rng([seed, number])
        drawn = {key: found[random.integers(len(found))] for key, found in by_key.items()}
        final = {key: _last(curve) for key, curve in drawn.items()}
        plan = rehearse(_shuffled(curves, keys, random), lanes, _answers(drawn))
        found = _key(plan.standings()[0].trial.settings)
        regrets.append(final[found] - min(final.values()))
        exact.append(regrets[-1] == 0.0)
        within.append(regrets[-1] <= noise(curves))
        tokens.append(cost(plan).tokens / (plan.c.total_tokens * len(drawn)))
    shares = statistics.mean(exact), statistics.mean(within)
    return Replays(*shares, max(tokens), statistics.mean(regrets))


def noise(curves: Curves) -> float:
    """The standard deviation over seeds of the loss of one run: that of the better half of the
    settings, as a median."""
    losses = [[_last(curve) for curve in found] for found in _by_settings(curves).values()]
    ordered = sorted(losses, key=statistics.mean)
    return statistics.median(statistics.stdev(found) for found in ordered[: len(ordered) // 2])


def _shuffled(curves: Curves, keys: dict[str, Any], order: np.random.Generator) -> SweepConfig:
    """The sweep of the curves, with another strategy, and its values in another order."""
    base = curves.sweep
    space = {
        d.key: [d.values[i] for i in order.permutation(len(d.values))] for d in base.dimensions
    }
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
    lines = [
        f"{found['trials']} trials with {found['seeds']} seeds each; noise over seeds "
        f"{found['noise']:.4f}; {found['replays']} replays of each",
        "asha                    tokens   winner found   within noise   loss above the winner's",
    ]
    for name, r in found["strategies"].items():
        lines.append(
            f"{name:<22}  {r['tokens']:>6.1%}   {r['exact']:>12.0%}   {r['within']:>12.0%}   "
            f"{r['regret']:>23.4f}"
        )
    return "\n".join(lines)
