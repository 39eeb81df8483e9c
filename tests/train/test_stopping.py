"""Stopping a run: which signals do, and how long Ray lets a submitted job save."""

import contextlib
import json
import queue
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.dashboard.modules.job.common import (
    JOB_ACTOR_NAME_TEMPLATE,
    SUPERVISOR_ACTOR_RAY_NAMESPACE,
)
from ray.dashboard.modules.job.job_supervisor import JobSupervisor
from ray.train.torch import TorchTrainer

from manta.train.faults.signals import Asked
from manta.train.faults.stopping import STOPPING, WAIT, Told, ask_for_time, told_to_stop

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_asks_the_workers_to_save_and_end(number: signal.Signals) -> None:
    requests: queue.SimpleQueue[Asked] = queue.SimpleQueue()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    before = [signal.getsignal(each) for each in STOPPING]
    with told_to_stop(requests, lines.put) as told:
        signal.raise_signal(number)
        assert requests.get(timeout=30) == Asked.STOP
        assert told.by == number
    assert lines.get().startswith(f"{number.name}: saving, then stopping")
    assert [signal.getsignal(each) for each in STOPPING] == before


def test_nothing_is_asked_where_no_signal_came() -> None:
    requests: queue.SimpleQueue[Asked] = queue.SimpleQueue()
    with told_to_stop(requests, print) as told:
        assert told.by is None
    assert requests.empty() and told.by is None


@given(numbers=st.lists(st.sampled_from(STOPPING), min_size=1))
def test_only_ctrl_c_after_another_signal_ends_at_once(numbers: list[signal.Signals]) -> None:
    """A batch system may send its signals again and again; a person who presses Ctrl-C twice does
    not want to wait."""
    told = Told()
    for place, number in enumerate(numbers):
        if place and number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                told.hear(number)
        else:
            told.hear(number)
    assert told.by == numbers[0]


def test_what_is_replaced_of_rays_trainer_is_there() -> None:
    """Ray Train takes Ctrl-C to abort the run, and starts processes that a run does not use. If Ray
    names these methods otherwise, `_Trainer` has to."""
    assert hasattr(TorchTrainer, "_register_sigint_handler")
    assert hasattr(TorchTrainer, "_create_default_callbacks")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process ignores")
def test_the_processes_of_a_jobs_own_ray_ignore_a_signal_that_is_for_the_job(
    ray_session: None,
) -> None:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # another one that has just ended
            words = process.cmdline()
            if words and Path(words[0]).name in ("raylet", "gcs_server"):
                found.append(process)
    assert len(found) == 2
    for process in found:
        status = Path(f"/proc/{process.pid}/status").read_text()
        (ignored,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
        assert int(ignored, 16) >> (signal.SIGUSR1 - 1) & 1


@pytest.fixture
def supervisor(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The actor that Ray makes for a submitted job; this process is that job."""
    import ray

    name = uuid.uuid4().hex
    actor: Any = (
        ray.remote(JobSupervisor)
        .options(
            name=JOB_ACTOR_NAME_TEMPLATE.format(job_id=name),
            namespace=SUPERVISOR_ACTOR_RAY_NAMESPACE,
            num_cpus=0,
        )
        .remote(name, "true", {})
    )
    be_job(monkeypatch, name)
    yield actor
    ray.kill(actor)


def be_job(monkeypatch: pytest.MonkeyPatch, name: str, **own: str) -> None:
    config = {"runtime_env": {"env_vars": own}, "metadata": {"job_submission_id": name}}
    monkeypatch.setenv(JOB, json.dumps(config))


@pytest.mark.parametrize(("was", "becomes"), [(None, 600), ("60", 600), ("900", 900), ("5s", 600)])
def test_a_submitted_job_has_its_supervisor_wait_until_it_is_saved(
    supervisor: Any, was: str | None, becomes: int
) -> None:
    import ray

    def environment(_actor: Any, name: str, value: str | None = None) -> str | None:
        import os

        if value is not None:
            os.environ[name] = value
        return os.environ.get(name)

    assert ray.get(supervisor.__ray_call__.remote(environment, WAIT, was)) == was
    assert ask_for_time(100) == f"`ray job stop` gives this run {becomes} s to save"
    assert ray.get(supervisor.__ray_call__.remote(environment, WAIT)) == str(becomes)


def test_a_time_that_the_job_sets_itself_is_kept_and_its_cost_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    be_job(monkeypatch, "any", **{WAIT: "5"})
    assert ask_for_time(100) == (
        f"`ray job stop` gives this run 5 s to save ({WAIT} in its runtime_env): if that is too "
        "short, up to 100 steps will be trained again"
    )
    be_job(monkeypatch, "any", **{WAIT: "3600"})
    assert ask_for_time(None) == "`ray job stop` gives this run 3600 s to save"


def test_a_job_whose_supervisor_cannot_be_asked_says_what_a_stop_costs(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WAIT, raising=False)
    be_job(monkeypatch, "nobody")
    line = ask_for_time(None)
    assert line is not None and line.startswith("`ray job stop` gives this run 3 s to save (Ray ")
    assert f"set {WAIT} at `ray start`" in line
    assert line.endswith("the steps since the last checkpoint will be trained again")


def test_a_process_that_was_not_submitted_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB, raising=False)
    assert ask_for_time(100) is None
