"""A sweep that was submitted to a Ray is stopped there, and goes on."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from faults.jobs import RAY, Job
from helpers.common import ROOT, tiny_arguments
from manta.train.checkpoints import checkpoint
from manta.train.records.logbook import read_metrics

pytestmark = pytest.mark.faults
STEPS = 320


@pytest.mark.parametrize("scheduler", ["asha", "pbt"])
def test_ray_job_stop_of_a_sweep_loses_no_trial_and_no_step(
    prepared: Path, corpus: Path, head: dict[str, str], scheduler: str
) -> None:
    given = [
        *tiny_arguments(prepared, corpus), f"total_tokens={256 * STEPS}", "eval.every=1000",
        "checkpoint.every=1000", "sample.prompts=[]", "sweep.lr=[3e-4,1e-3,2e-3,4e-3]",
        "sweep.tokens_per_batch=null", f"sweep.scheduler={scheduler}", "cpus_per_worker=1",
        "sweep.exchanges=2" if scheduler == "pbt" else "sweep.rungs=2",
    ]  # fmt: skip
    script, name = ROOT / "jobs" / "sweep.py", f"submitted-{scheduler}"

    def submitted(submission: str) -> Job:
        before = (RAY, "job", "submit", "--submission-id", submission, "--")
        return Job(name, given, script, before=before, **head)

    first = submitted("first")
    first.wait_for("(1 done)", 200)
    subprocess.run([RAY, "job", "stop", "first"], env=os.environ | head, check=True, timeout=120)
    first.end(60)
    assert "`ray job stop` gives this run 600 s to save" in first.lines, "\n".join(first.lines)
    assert f"sweep {name} stopped; the same command goes on" in first.lines
    begun = saved(prepared, name)
    second = submitted("second")
    assert second.end(280) == 0, "\n".join(second.lines)
    ranking = json.loads((prepared / "runs" / name / "ranking.json").read_text())
    assert not any(row["why"] for row in ranking)
    assert any(row["tokens"] == 256 * STEPS for row in ranking)
    # What a trial had when it was stopped was not trained again: each step is in its log once, and
    # the second start took no checkpoint before the newest.
    for trial, step in begun.items():
        starts = starts_of(prepared, trial)
        assert step in starts or step == last_step(prepared, trial), (trial, step, starts)
    for row in ranking:
        steps = [r["step"] for r in read_metrics(f"{prepared}/runs/{row['run']}/metrics.jsonl")
                 if "loss" in r]  # fmt: skip
        assert steps == sorted(set(steps)) and steps[-1] * 256 == row["tokens"]


def saved(home: Path, sweep: str) -> dict[str, int]:
    """The step of the newest checkpoint of each trial, by name."""
    folders = [f for f in (home / "runs" / sweep).iterdir() if f.is_dir()]
    found = {f"{sweep}/{f.name}": checkpoint.find(str(f)) for f in folders}
    return {name: int(paths[-1][-8:]) for name, paths in found.items() if paths}


def last_step(home: Path, trial: str) -> int:
    return int(checkpoint.newest(f"{home}/runs/{trial}")[-8:])


def starts_of(home: Path, trial: str) -> list[int]:
    """The steps at which a trial's training began or went on."""
    text = (home / "runs" / trial / "history.jsonl").read_text()
    return [int(n) for n in re.findall(r'"event": "started".*?"step": (\d+)', text)]
