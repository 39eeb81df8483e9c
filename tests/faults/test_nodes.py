"""Nodes that leave while a run trains on them: killed, ended, or called back with notice; and one
that its cloud warns of."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.jobs import Job, final, is_step, last_step, records
from manta.train.checkpoints import checkpoint

NODES = Path(__file__).with_name("nodes.py")


def ended(name: str, arguments: list[str]) -> Job:
    """A run on nodes of its own, which has ended well."""
    it = Job(name, arguments, NODES)
    try:
        assert it.end(300) == 0, "\n".join(it.lines)
    finally:
        if it.process.poll() is None:
            it.process.kill()
    return it


@pytest.mark.faults
@pytest.mark.parametrize("gone", ["kill", "term", "drain", "stop"])
def test_a_run_goes_on_on_another_node(
    arguments: list[str],
    weights: bytes,
    prepared: Path,
    note: Callable[..., None],
    gone: str,
) -> None:
    it = ended(f"node-{gone}", [*arguments, f"event={gone}"])
    at = it.lines.index(f"{gone}: the node of the worker")
    resumed, moment = it.resumed(at)
    lost = last_step(it.lines[: it.first("resuming at step ", at)]) - resumed
    announced = gone in ("drain", "stop")
    assert lost == 0 if announced else lost <= 50
    assert final(prepared, f"node-{gone}") == weights
    assert last_step(it.lines) == 400
    what = {
        "kill": "SIGKILL of the worker's node, of two on one machine",
        "term": "SIGTERM of the worker's node",
        "drain": "Ray's notice that the worker's node is to go",
        "stop": "SIGTERM of `ray start --block` on the worker's node, as Kubernetes sends it",
    }
    happened = f"{'saved, and ' if announced else ''}started again on the other"
    note(what[gone], happened, lost, moment - it.times[at], "identical")


@pytest.mark.faults
def test_a_run_saves_once_at_a_warning_and_stays(
    arguments: list[str],
    weights: bytes,
    prepared: Path,
    note: Callable[..., None],
) -> None:
    keys = ["checkpoint.every=1000", "event=warn"]
    it = ended("node-warned", [*arguments, *keys])
    said = "a recommendation to rebalance: saving a checkpoint, as this machine may go"
    assert it.lines.count(said) == 1
    assert not any(line.startswith("resuming at step ") for line in it.lines)
    paths = checkpoint.find(f"{prepared}/runs/node-warned")
    early, last = (checkpoint.load_state(path).step for path in paths)
    assert 400 == last > early >= last_step(it.lines[: it.lines.index(said)]) >= 60
    assert final(prepared, "node-warned") == weights
    what = "a cloud's warning that the worker's node may go"
    note(what, "saved, and trained on", 0, None, "identical")


@pytest.mark.faults
def test_an_elastic_run_goes_on_with_the_workers_that_are_left(
    arguments: list[str],
    weights: bytes,
    prepared: Path,
    note: Callable[..., None],
) -> None:
    """The run goes from two workers to one, with the same batches."""
    keys = ["num_workers=[1,2]", "zero_stage=2", "event=kill"]
    it = ended("node-elastic", [*arguments, *keys])
    counts = [
        checkpoint.load_state(path).world_size
        for path in checkpoint.find(f"{prepared}/runs/node-elastic")
    ]
    assert counts[0] == 2 and counts[-1] == 1
    # (Later, differences in rounding grow in a model that learns its data by heart.)
    found, whole = (records(prepared, name)[:200] for name in ("node-elastic", "driver-whole"))
    assert [r["fingerprint"] for r in found] == [r["fingerprint"] for r in whole]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in whole], rel=1e-3)
    at = it.lines.index("kill: the node of the worker")
    resumed, moment = it.resumed(at)
    lost = last_step(it.lines[: it.first("resuming at step ", at)]) - resumed
    what = "SIGKILL of a node, `num_workers=[1,2]`"
    end = "same batches, each loss within 0.1%"
    note(what, "started again on one worker", lost, moment - it.times[at], end)


@pytest.mark.faults
def test_an_elastic_run_takes_in_a_node_that_comes(
    arguments: list[str], prepared: Path, note: Callable[..., None]
) -> None:
    """Ray looks for room once a minute, and then the workers are started again."""
    keys = ["num_workers=[1,2]", "zero_stage=2", "event=come", "log_every=10"]
    longer = ["total_tokens=40960000", "checkpoint.every=200", "eval.every=100000"]
    it = Job("node-come", [*arguments, *keys, *longer], NODES)
    try:
        it.wait_for("come: another node")
        at = it.lines.index("come: another node")
        it.wait_for("resuming at step ", 240)
        resumed = it.first("resuming at step ", at)
        it.wait_for_step_after(resumed)
        it.process.send_signal(signal.SIGTERM)
        assert it.end(120) == 0, "\n".join(it.lines)
    finally:
        if it.process.poll() is None:
            it.process.kill()
    found = checkpoint.find(f"{prepared}/runs/node-come")
    counts = [checkpoint.load_state(path).world_size for path in found]
    assert counts[0] == 1 and counts[-1] == 2
    step, moment = it.resumed(at)
    lost = last_step(it.lines[:resumed]) - step
    assert lost <= 200
    assert [r["step"] for r in records(prepared, "node-come")] == list(
        range(1, last_step(it.lines) + 1)
    )
    before = max(t for t, x in zip(it.times, it.lines[:resumed], strict=False) if is_step(x))
    what = "a node comes, `num_workers=[1,2]`"
    note(what, "started again on two workers", lost, moment - before, "-")
