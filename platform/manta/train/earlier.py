"""What the runs of a home tell of runs to come: the speed of steps, the seconds of a start."""

import dataclasses
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from manta import layout, storage
from manta.errors import MantaError
from manta.model.cost import flops_per_token
from manta.train.checkpoints.places import names_of_runs
from manta.train.records import history, ledger
from manta.train.records.logbook import read_metrics
from manta.train.settings import PretrainConfig, load_run_config

MEASURED_SECONDS = 1.0  # of steps, before their speed counts as known
MOST_RUNS = 200  # of the home that are looked at

# Keys on which the speed of steps depends, apart from the machine and its threads. The batch is
# among them: the optimizer's work is the same for a batch of any size, so a step of half the tokens
# takes more than half the time.
OF_SPEED = (
    "sequence_length", "tokens_per_batch", "batch_ramp", "micro_batch_size", "most_workers",
    "gpus_per_worker", "zero_stage", "dtype", "activation_checkpointing", "compile",
    "deterministic", "document_mask", "trainable", "lora", "engine",
)  # fmt: skip


Kind = tuple[str, str]
"""What the speed of a run depends on, apart from its machine: its model, and all else."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast runs to come will be, by earlier ones."""

    runs: tuple[str, ...]
    """The earlier runs that tell it."""
    flops_per_second: float
    """Model FLOPs a second of each run, the mean over the time that all of them take."""


def measured(records: Iterable[dict[str, Any]]) -> float | None:
    """Tokens per second of the steps of a run but the first; None: there are too few of them."""
    found = [r for r in records if "tokens_per_second" in r][1:]
    seconds = sum(float(r["step_seconds"]) for r in found)
    if seconds < MEASURED_SECONDS:
        return None
    return sum(r["tokens_per_second"] * r["step_seconds"] for r in found) / seconds


def pace(home: str, runs: Sequence[PretrainConfig]) -> Pace | None:
    """How fast these runs will be on a machine like this one, by the newest run of each kind in the
    home. A model that was not trained before takes a time for its FLOPs, by another one of `runs`
    that was, in the same batches. None: there is no earlier run for some of the batches, or the
    home is not on this machine."""
    if not runs or not storage.is_local(home):
        return None  # each look at an object store takes a while
    kinds = [_kind(run) for run in runs]
    wanted = dict(zip(reversed(kinds), reversed(runs), strict=True))
    known = _speeds(home, wanted)
    rates = {kind: (speed * _flops(wanted[kind]), name) for kind, (name, speed) in known.items()}
    in_batches: dict[str, tuple[float, str]] = {}
    for kind, rate in rates.items():
        in_batches.setdefault(kind[1], rate)
    seconds = flops = 0.0
    names = []
    for kind, run in zip(kinds, runs, strict=True):
        found = rates.get(kind) or in_batches.get(kind[1])
        if found is None:
            return None
        spent = run.tokens_before(run.total_steps) * _flops(run)
        seconds, flops = seconds + spent / found[0], flops + spent
        names.append(found[1])
    return Pace(tuple(dict.fromkeys(names)), flops / seconds)


def start_seconds(home: str) -> tuple[float | None, int]:
    """Median seconds from a run's start until its first step, over the runs of this home, and how
    many these are; None if there is none."""
    folder = layout.runs_folder(home)
    found = []
    for item in storage.list_files(folder, recursive=False):
        run = storage.join(folder, item.base_name)
        if not item.is_file and storage.exists(storage.join(run, layout.GOODPUT)):
            started = ledger.causes_of(run)["start"]
            if started > 0:
                found.append(started / max(1, ledger.starts_of(run)))
    return (statistics.median(found), len(found)) if found else (None, 0)


def _speeds(home: str, wanted: dict[Kind, PretrainConfig]) -> dict[Kind, tuple[str, float]]:
    """The newest run of each kind in the home that was trained on a machine like this one: its
    name, and the tokens per second of `wanted`. Kinds of which there is none are left out."""
    ages = {}
    for name in names_of_runs(home):
        info = storage.info(storage.join(layout.run_folder(home, name), layout.METRICS))
        if info.mtime_ns is not None:
            ages[name] = info.mtime_ns
    found: dict[Kind, tuple[str, float]] = {}
    for name in sorted(ages, key=lambda n: (-ages[n], n))[:MOST_RUNS]:
        if len(found) == len(wanted):
            break
        folder = layout.run_folder(home, name)
        try:
            had = load_run_config(folder)
            kind = _kind(had) if had is not None else None
            if had is None or kind not in wanted or kind in found or not _is_here(folder, had):
                continue
            speed = measured(read_metrics(storage.join(folder, layout.METRICS)))
        except MantaError:
            continue  # a damaged run tells nothing
        if speed is not None:
            found[kind] = name, speed * _share(had, wanted[kind])
    return found


def _kind(run: PretrainConfig) -> Kind:
    keys = {key: getattr(run, key) for key in OF_SPEED}
    if run.micro_batch_size is None:
        keys["micro_batch_size"] = run.micro_batch
    keys |= {"optimizer": run.optimizer.kind, "kind": run.data.kind}
    return repr(run.expected_model), repr(keys)


def _flops(run: PretrainConfig) -> float:
    return flops_per_token(run.expected_model, run.sequence_length, run.trainable, run.lora)


def _is_here(folder: str, run: PretrainConfig) -> bool:
    """Whether a run was started on a machine like this one, and had memory for its micro batches
    to the end."""
    events = history.read(folder)[0]
    commands = [e for e in events if e.get("event") == "command"]
    if not commands or commands[-1].get("machine") != history.machine():
        return False
    sizes = [e.get("micro_batch") for e in events if e.get("event") == "started"]
    return run.micro_batch_size == "auto" or set(sizes) <= {run.micro_batch}


def _share(run: PretrainConfig, wanted: PretrainConfig) -> float:
    """The speed of a run that is wanted as a share of that of `run`, by the CPU threads that they
    compute on."""
    if run.gpus_per_worker:
        return 1.0
    cpus = os.cpu_count() or 1
    return (wanted.threads_per_worker or cpus) / (run.threads_per_worker or cpus)
