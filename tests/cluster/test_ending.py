"""A signal to a process that waits for nodes ends the wait, and takes its request back."""

import os
import signal
import threading
import time

import pytest
import ray

from manta.cluster import capacity, ending

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
