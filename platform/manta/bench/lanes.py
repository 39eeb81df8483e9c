"""How much of a sweep's time is steps, and what each trial costs besides: real trials in lanes."""

import dataclasses
import statistics
import time
from typing import Any

import psutil

from manta import config as configs
from manta import layout, ownership
from manta.bench.settings import BenchConfig
from manta.data import mixture
from manta.errors import ConfigError
from manta.sweep.settings import SweepConfig
from manta.sweep.sweep import sweep
from manta.train.checkpoints import checkpoint
from manta.train.records import ledger
from manta.train.settings import PretrainConfig

RATES = (2e-4, 3e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3)
PARTS: tuple[ledger.Cause, ...] = ("start", "checkpoint", "other")


def lanes(c: BenchConfig) -> dict[str, Any]:
    """Sweeps twelve learning rates, each over total_tokens, in a folder that is deleted."""
    names = {f.name for f in dataclasses.fields(PretrainConfig)}
    tree = {key: value for key, value in configs.to_dict(c).items() if key in names}
    mixture.open_datasets(c.data, c.home_folder, print)  # which a sweep would find prepared
    with ownership.scratch(layout.runs_folder(c.home_folder), "bench-lanes") as folder:
        tree |= {"name": folder.rpartition("/")[2]}
        search = {"lr": RATES, "tokens_per_batch": None}
        own = configs.from_dict(SweepConfig, {**tree, "home": c.home_folder, "sweep": search})
        started = time.time()
        done = sweep(own)
        seconds = time.time() - started
        if done.ranking is None:
            raise ConfigError("the bench was stopped; run the same command again")
        found = [_trial(layout.run_folder(c.home_folder, t.name)) for t in own.grid[0]]
    cores = psutil.cpu_count() or 1
    at_once = max(1, int(cores // (c.cpus_per_worker * c.most_workers)))
    threads = (c.threads_per_worker or max(1, int(c.cpus_per_worker))) * c.most_workers
    later = sorted(found, key=lambda t: t["began"])[at_once:]
    steps = sum(t["steps"] for t in found)
    return {
        "trials": found,
        "cores": cores,
        "lanes": at_once,
        "seconds": seconds,
        "step_seconds": steps,
        "share": steps * threads / (cores * seconds),
        "median_trial": statistics.median(t["steps"] for t in found),
        "overhead": statistics.median(t["overhead"] for t in later) if later else None,
        "most_overhead": max((t["overhead"] for t in later), default=None),
        "evaluation": statistics.median(t["evaluation"] for t in found),
        "parts": {part: statistics.median(t[part] for t in later) for part in PARTS if later},
        "between": statistics.median(gaps(found, later)) if later else None,
    }


def gaps(found: list[dict[str, float]], later: list[dict[str, float]]) -> list[float]:
    """Seconds from the end of a trial to the begin of the next one in its lane: a trial follows the
    one that ended last before it and has none after it yet."""
    between, free = [], sorted(t["ended"] for t in found)
    for trial in later:
        before = [end for end in free if end <= trial["began"]]
        if before:
            free.remove(before[-1])
            between.append(trial["began"] - before[-1])
    return between or [0.0]


def _trial(run: str) -> dict[str, float]:
    seconds = ledger.causes_of(run)
    state = checkpoint.load_state(checkpoint.newest(run))
    ended = ledger.updated(run)
    return {
        "steps": state.train_seconds,
        "overhead": sum(seconds[part] for part in PARTS),
        **{part: seconds[part] for part in PARTS},
        "evaluation": seconds["evaluation"],
        "began": ended - sum(seconds.values()),
        "ended": ended,
    }


def table(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"trials              {len(result['trials']):>10}, in {result['lanes']} lanes on "
            f"{result['cores']} cores",
            f"steps of a trial    {result['median_trial']:>10.1f} s (median)",
            f"the whole sweep     {result['seconds']:>10.1f} s, from its checks to its ranking",
            f"share of steps      {result['share']:>10.1%} (steps x threads / cores x all seconds)",
            f"overhead of a trial {result['overhead']:>10.2f} s (median once lanes run; most "
            f"{result['most_overhead']:.2f} s)",
            *(f"    {part:<15} {value:>10.2f} s" for part, value in result["parts"].items()),
            f"between two trials  {result['between']:>10.2f} s, in which the driver takes a result "
            "and begins the next one (median)",
            f"evaluation          {result['evaluation']:>10.2f} s of a trial (median)",
        ]
    )
