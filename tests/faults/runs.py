"""Runs that a fault befalls, beside the same run without one."""

import dataclasses
import functools
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import tiny

from faults import inject
from manta.train import checkpoint, supervise
from manta.train.logbook import read_metrics
from manta.train.pretrain import Outcome, pretrain
from manta.train.settings import PretrainConfig
from manta.train.worker import worker

ALL = os.environ.get("MANTA_TEST_FAULTS") == "1"
long = pytest.mark.skipif(not ALL, reason="takes a minute; MANTA_TEST_FAULTS=1")
STEPS, EVERY = 24, 5
KEYS = [
    "num_workers=2", "total_tokens=6144", f"checkpoint.every={EVERY}", "eval.every=100",
    "sample.prompts=[]", "log_every=1", "data.log_fingerprint=true", "schedule.warmup=0",
    "checkpoint.keep=100",
]  # fmt: skip


def last_step(lines: list[str]) -> int:
    """The number of the last step among these lines of a run."""
    steps = [line for line in lines if line.startswith("step ") and " | loss " in line]
    return int(steps[-1].split()[1].partition("/")[0])


@dataclasses.dataclass
class Story:
    """What a run said, and when."""

    config: PretrainConfig
    at: Path
    lines: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    outcome: Outcome | None = None
    error: str | None = None

    def say(self, line: str) -> None:
        self.lines.append((time.time(), line))

    def said(self, text: str) -> bool:
        return any(text in line for _, line in self.lines)

    @property
    def fault_time(self) -> float:
        return (self.at / "fault").stat().st_mtime

    @property
    def resumed(self) -> int | None:
        """The step from which the run went on after the fault."""
        for moment, line in self.lines:
            if moment >= self.fault_time and line.startswith("resuming at step "):
                return int(line.split()[3])
            if moment >= self.fault_time and line.startswith("starting on"):
                return 0
        return None

    @property
    def seconds_to_recover(self) -> float | None:
        """From the fault to the end of the first step after the restart."""
        restarted = None
        for moment, line in self.lines:
            if moment >= self.fault_time and line.startswith(("resuming at", "starting on")):
                restarted = moment
            if restarted is not None and " | loss " in line:
                return moment - self.fault_time
        return None

    @property
    def weights(self) -> str:
        """The sha256 of the final weights."""
        path = Path(checkpoint.path_of(self.config.run_folder, STEPS), checkpoint.WEIGHTS)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def steps(self) -> list[dict[str, Any]]:
        records = read_metrics(f"{self.config.run_folder}/metrics.jsonl")
        return [r for r in records if "loss" in r]


def story(
    home: Path, corpus: Path, folder: Path, name: str, fault: str = "none", *keys: str
) -> Story:
    """Trains a run, with a fault in its workers, in this process as driver."""
    told = Story(tiny(home, corpus, *KEYS, f"name={name}", *keys), folder)
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
