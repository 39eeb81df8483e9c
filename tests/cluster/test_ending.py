"""A signal to a process that waits for nodes ends the wait, and takes its request back."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from helpers.checkpoints import MODELS, model_of, save
from helpers.common import TEXT, tiny
from manta.cluster import capacity, ending
from manta.failures import WorkersFailed
from manta.text import tokenizer as tokenizers
from manta.train import supervise

pytestmark = pytest.mark.usefixtures("ray_session")


def wanted() -> dict[str, object]:
    """What Ray's coordinator has of the requests for nodes, by requester."""
    name = "AutoscalingCoordinator"
    told = ray.get_actor(name, namespace=name).__ray_call__.remote(
        lambda it: dict(it._ongoing_reqs)
    )
    return {key: request for key, request in ray.get(told).items() if key.startswith("manta-")}


def send(number: signal.Signals, once: list[str]) -> None:
    """Signals this process when the wait has said its first line, so that its request is made."""
    while not once:
        time.sleep(0.01)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ending.ENDING, ids=lambda number: number.name)
def test_a_signal_ends_a_wait_for_nodes_with_its_exit_code(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "FIRST_LINE", 0.0)
    lines: list[str] = []
    thread = threading.Thread(target=send, args=(number, lines))
    thread.start()
    try:
        with pytest.raises(SystemExit):  # (its code is 1 if a call of Ray's was interrupted)
            capacity.require(1000, 1.0, 0, 3600, lines.append)
        assert ending.settle() == number
    finally:
        thread.join()
        ending.obey()
    assert lines[0].startswith("waiting for nodes (")
    assert wanted() == {}


def test_a_wait_ends_when_the_run_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "FIRST_LINE", 0.0)
    lines: list[str] = []
    capacity.require(1000, 1.0, 0, 3600, lines.append, told=lambda: bool(lines))
    assert len(lines) == 1
    assert wanted() == {}


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_run_that_waits_for_a_lost_node_is_ended_by_a_signal(
    has_checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*arguments: Any) -> None:
        raise WorkersFailed("the node has died")

    monkeypatch.setattr(capacity, "FIRST_LINE", 0.0)
    monkeypatch.setattr(supervise, "fit", lose)
    keys = ["name=lost", "cpus_per_worker=1000", "wait_seconds=3600"]
    run = supervise.Supervisor(tiny(tmp_path, tmp_path, *keys), (), print, list)
    Path(run.c.run_folder).mkdir(parents=True)
    (Path(run.c.run_folder) / "config.yaml").touch()
    if has_checkpoint:
        save(model_of(MODELS["llama"], 300), tokenizers.train([TEXT], 300), tmp_path, "lost")
    lines: list[str] = []

    def say(line: str) -> None:
        if line.startswith("waiting for nodes"):
            lines.append(line)

    run.say = say
    thread = threading.Thread(target=send, args=(signal.SIGTERM, lines))
    thread.start()
    try:
        if has_checkpoint:
            assert run.run() == signal.SIGTERM
        else:
            with pytest.raises(SystemExit) as caught:
                run.run()
            assert caught.value.code == 128 + signal.SIGTERM
            assert ending.settle() == signal.SIGTERM
    finally:
        thread.join()
        ending.obey()
    assert len(lines) == 1 and wanted() == {}
