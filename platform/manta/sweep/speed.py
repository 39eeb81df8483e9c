"""How fast trials train: measured in their own steps, or in those of an earlier run in the home."""

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

from manta import layout, storage
from manta.errors import MantaError
from manta.sweep.settings import SweepConfig, Trial
from manta.train.checkpoints.places import names_of_runs
from manta.train.records import history
from manta.train.records.logbook import read_metrics
from manta.train.settings import PretrainConfig, load_run_config

MEASURED_SECONDS = 1.0  # of steps, before their speed counts as known
MOST_RUNS = 200  # of the home that are looked at


@dataclasses.dataclass(frozen=True)
class Speed:
    """What an earlier run tells of a sweep's speed."""

    run: str
    tokens_per_second: float
    """Speed of each lane."""
    trial: Trial
    """A trial with the run's model: another one takes a time for its FLOPs."""


def measured(records: Iterable[dict[str, Any]]) -> float | None:
    """Tokens per second of the steps of a run but the first; None: there are too few of them."""
    found = [r for r in records if "tokens_per_second" in r][1:]
    seconds = sum(float(r["step_seconds"]) for r in found)
    if seconds < MEASURED_SECONDS:
        return None
    return sum(r["tokens_per_second"] * r["step_seconds"] for r in found) / seconds


def earlier(c: SweepConfig) -> Speed | None:
    """The speed of the newest run in the home that has the model of a trial, and was trained on a
    machine like this one in the same way; None: there is none, or the home is not on this machine.
    """
    if not storage.is_local(c.home_folder):
        return None  # each look at an object store takes a while
    wanted: dict[str, tuple[Trial, PretrainConfig]] = {}
    for trial in c.examples():
        run = c.config_of(trial)
        wanted.setdefault(_kind(run), (trial, run))
    ages = {}
    for name in names_of_runs(c.home_folder):
        info = storage.info(storage.join(layout.run_folder(c.home_folder, name), layout.METRICS))
        if info.mtime_ns is not None:
            ages[name] = info.mtime_ns
    for name in sorted(ages, key=lambda n: (-ages[n], n))[:MOST_RUNS]:
        folder = layout.run_folder(c.home_folder, name)
        try:
            had = load_run_config(folder)
            if had is None or (found := wanted.get(_kind(had))) is None or not _is_here(folder):
                continue
            speed = measured(read_metrics(storage.join(folder, layout.METRICS)))
        except MantaError:
            continue  # a damaged run tells nothing
        if speed is not None:
            return Speed(name, speed * _share(had, found[1]), found[0])
    return None


def _kind(run: PretrainConfig) -> str:
    """What the speed of a run depends on, apart from its machine."""
    keys = {
        "model": dataclasses.asdict(run.expected_model),
        "sequence": run.sequence_length,
        "workers": run.most_workers,
        "gpus": run.gpus_per_worker,
        "dtype": run.dtype,
        "optimizer": run.optimizer.kind,
        "trainable": run.trainable,
    }
    return json.dumps(keys, sort_keys=True, default=str)


def _is_here(folder: str) -> bool:
    """Whether a run was started on a machine like this one."""
    starts = [e for e in history.read(folder)[0] if e.get("event") == "command"]
    return bool(starts) and starts[-1].get("machine") == history.machine()


def _share(run: PretrainConfig, trial: PretrainConfig) -> float:
    """The speed of a trial as a share of that of a run, by the CPU threads that they compute on."""
    if run.gpus_per_worker:
        return 1.0
    cpus = os.cpu_count() or 1
    return (trial.threads_per_worker or cpus) / (run.threads_per_worker or cpus)
