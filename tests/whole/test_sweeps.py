"""Sweeps as a person starts them: killed, stopped, and with trials that fail."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from faults.jobs import Job, kill_child, kill_everything
from helpers.common import ROOT, tiny_arguments
from manta import layout
from manta.train.checkpoints import checkpoint
from manta.train.records.logbook import read_metrics

pytestmark = pytest.mark.long
KILLS = int(os.environ.get("MANTA_KILLS", "10"))
EVERY = 10  # steps between checkpoints
SEED = int(os.environ.get("MANTA_SEED", "24"))
RATES = [1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 2e-2, 4e-2]


@pytest.fixture
def arguments(prepared: Path, corpus: Path) -> list[str]:
    """A sweep of 16 trials by ASHA, each of up to 160 or 320 steps."""
    return [
        *tiny_arguments(prepared, corpus), "total_tokens=40960", "eval.every=1000",
        f"checkpoint.every={EVERY}", "sample.prompts=[]", "sweep.scheduler=asha",
        f"sweep.lr={RATES}", "sweep.tokens_per_batch=[128,256]", "cpus_per_worker=1",
    ]  # fmt: skip


def started(name: str, arguments: list[str]) -> Job:
    return Job(name, arguments, ROOT / "jobs" / "sweep.py")


def lines_of(prepared: Path, name: str, file: str) -> list[str]:
    path = prepared / "runs" / name / file
    return path.read_text().replace(f"{name}/", "").splitlines() if path.exists() else []


def test_a_killed_sweep_makes_the_same_decisions(prepared: Path, arguments: list[str]) -> None:
    """The driver and Ray's head get SIGKILL at random moments, the workers with them. No trial
    loses more than the steps since its last save but one, as one may be under way."""
    whole = started("whole", arguments)
    assert whole.end(600) == 0, "\n".join(whole.lines)
    moments = random.Random(SEED)
    lost: list[int] = []
    for number in range(KILLS):
        job = started("killed", arguments)
        job.wait_for("step " if moments.random() < 0.7 else "sweep killed:", 200)
        time.sleep(moments.uniform(0, 3))
        assert job.process.poll() is None, f"ended before kill {number}: " + "\n".join(job.lines)
        kill_everything(job)
        lost += lost_steps(prepared / "runs" / "killed")
    last = started("killed", arguments)
    assert last.end(600) == 0, "\n".join(last.lines)
    for file in ("decisions.jsonl", "ranking.json"):
        found = [lines_of(prepared, name, file) for name in ("whole", "killed")]
        assert found[1] == [line.replace("whole", "killed") for line in found[0]]
    print(f"steps lost by the trials at work in {KILLS} kills: {lost}")


def lost_steps(sweep: Path) -> list[int]:
    """The steps of each trial that are logged and in no whole checkpoint. Fails if a trial lost
    more than an interval before the save that was under way, if one was."""
    found = []
    for run in (folder for folder in sweep.iterdir() if (folder / "metrics.jsonl").exists()):
        steps = [r["step"] for r in read_metrics(str(run / "metrics.jsonl")) if "loss" in r]
        saved = max(map(layout.step_of, checkpoint.find(str(run))), default=0)
        under_way = [layout.step_of(path) for path in checkpoint.unfinished(str(run))]
        lost = max(steps, default=0) - saved
        assert lost <= EVERY * (2 if under_way else 1), (run.name, lost, saved, under_way)
        found += [lost] if lost > 0 else []
    return found


def test_a_sweep_that_is_told_to_stop_saves_and_goes_on(
    prepared: Path, arguments: list[str]
) -> None:
    first = started("stopped", arguments)
    first.wait_for(" done)", 200)
    first.process.send_signal(signal.SIGTERM)
    assert first.end(100) == 128 + signal.SIGTERM, "\n".join(first.lines)
    assert "sweep stopped stopped; the same command goes on" in first.lines
    second = started("stopped", arguments)
    assert second.end(280) == 0, "\n".join(second.lines)
    assert len(json.loads("\n".join(lines_of(prepared, "stopped", "ranking.json")))) == 16


def test_a_trial_that_diverges_ranks_last_and_workers_that_die_are_started_again(
    prepared: Path, arguments: list[str]
) -> None:
    keys = [
        "sweep.lr=[100,1e-3]", "sweep.tokens_per_batch=[256]", "sweep.scheduler=none",
        "schedule.warmup=0.4", "spikes.max_rollbacks=0", "log_every=1",
    ]  # fmt: skip
    job = started("bad", [*arguments, *keys])
    job.wait_for("| step 0/160 | val loss", 200)
    assert kill_child(job.process.pid, "RayTrainWorker")
    assert job.end(280) == 0, "\n".join(job.lines)
    assert any("starting them again from" in line for line in job.lines), "\n".join(job.lines)
    rows = json.loads((prepared / "runs" / "bad" / "ranking.json").read_text())
    assert [row["lr"] for row in rows] == [1e-3, 100]
    assert rows[0]["why"] is None and "lower optimizer.lr" in rows[1]["why"]
