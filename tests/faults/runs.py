"""Runs with a fault, next to the same run without one."""

import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from time import time as now  # the real clock, kept at import: a fault may make time.time jump
from typing import Any

import ray

from faults import inject
from faults.jobs import is_step, last_step
from helpers.common import tiny
from manta import layout
from manta.train import supervise
from manta.train.pretrain import Outcome, pretrain
from manta.train.records.logbook import read_metrics
from manta.train.settings import PretrainConfig
from manta.train.worker import worker

STEPS, EVERY = 24, 5
KEYS = [
    "num_workers=2", "total_tokens=6144", f"checkpoint.every={EVERY}", "eval.every=100",
    "sample.prompts=[]", "log_every=1", "data.log_fingerprint=true", "schedule.warmup=0",
    "checkpoint.keep=100",
]  # fmt: skip


@dataclasses.dataclass
class Story:
    """The lines of a run, with their times."""

    config: PretrainConfig
    at: Path
    hear: Callable[[str], None] = lambda line: None
    """Told each line, in the driver."""
    started: float = dataclasses.field(default_factory=now)
    lines: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    outcome: Outcome | None = None
    error: str | None = None

    def say(self, line: str) -> None:
        self.lines.append((now(), line))
        self.hear(line)

    def said(self, text: str) -> bool:
        return any(text in line for _, line in self.lines)

    @property
    def fault_time(self) -> float:
        return (self.at / "fault").stat().st_mtime

    @property
    def lost(self) -> int | None:
        """Steps that were trained on more than once; None if the run was never started again."""
        lines = [line for _, line in self.lines]
        starts = [i for i, x in enumerate(lines) if x.startswith(("resuming at", "starting on"))]
        if len(starts) == 1:
            return None
        lost = 0
        for before, at in itertools.pairwise(starts):
            step = int(lines[at].split()[3]) if lines[at].startswith("resuming") else 0
            lost += last_step(lines[before:at]) - step
        return lost

    @property
    def seconds_to_step(self) -> float:
        """Seconds from the start to the end of the first step."""
        return next(t for t, line in self.lines if is_step(line)) - self.started

    @property
    def seconds_to_recover(self) -> float | None:
        """Seconds from the fault to the end of the first step after the restart."""
        restarted = None
        for moment, line in self.lines:
            if moment >= self.fault_time and line.startswith(("resuming at", "starting on")):
                restarted = moment
            if restarted is not None and is_step(line):
                return moment - self.fault_time
        return None

    @property
    def weights(self) -> str:
        """The sha256 of the final weights."""
        path = Path(layout.checkpoint_folder(self.config.run_folder, STEPS), layout.WEIGHTS)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def steps(self) -> list[dict[str, Any]]:
        records = read_metrics(f"{self.config.run_folder}/metrics.jsonl")
        return [r for r in records if "loss" in r]


def story(
    home: Path,
    corpus: Path,
    folder: Path,
    name: str,
    fault: str = "none",
    *keys: str,
    hear: Callable[[str], None] = lambda line: None,
) -> Story:
    """Trains a run with a fault in its workers; this process is the driver."""
    told = Story(tiny(home, corpus, *KEYS, f"name={name}", *keys), folder, hear)
    folder.mkdir(parents=True, exist_ok=True)
    ray.cloudpickle.register_pickle_by_value(sys.modules[inject.__name__])
    supervise.worker = functools.partial(inject.faulty, fault=fault, at=folder)
    try:
        told.outcome = pretrain(told.config, told.say)
    except Exception as e:
        told.error = str(e)
    finally:
        supervise.worker = worker
    return told
