"""Nodes that go while a run trains on them: killed, ended, or wanted back with notice."""

from pathlib import Path

import pytest

from faults.test_drivers import (  # noqa: F401  # fixtures
    Job,
    arguments,
    final,
    long,
    trained,
    weights,
)


@long
@pytest.mark.parametrize("gone", ["kill", "term", "drain"])
def test_a_run_goes_on_on_another_node(
    arguments: list[str],  # noqa: F811
    weights: bytes,  # noqa: F811
    prepared: Path,
    gone: str,
) -> None:
    script = Path(__file__).with_name("nodes.py")
    it = Job(f"node-{gone}", [*arguments, f"gone={gone}"], script)
    try:
        assert it.end(300) == 0, "\n".join(it.lines)
    finally:
        if it.process.poll() is None:
            it.process.kill()
    at = it.lines.index(f"{gone}: the node of the worker")
    resumed = next(line for line in it.lines[at:] if line.startswith("resuming at step "))
    before = [line for line in it.lines[: it.lines.index(resumed)] if " | loss " in line]
    reached = int(before[-1].split()[1].partition("/")[0])
    lost = reached - int(resumed.split()[3])
    assert lost == 0 if gone == "drain" else lost <= 50
    assert final(prepared, f"node-{gone}") == weights
    assert trained(it) == 400
