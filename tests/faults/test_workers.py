"""Faults inside workers: each is survived without a person, and nothing is lost.

`make test` runs a few; `make faults` (MANTA_TEST_FAULTS=1) all, and prints the table.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.inject import STEP
from faults.runs import ALL, EVERY, STEPS, Story, last_step, long, story

pytestmark = pytest.mark.usefixtures("ray_session")


@dataclasses.dataclass(frozen=True)
class Case:
    fault: str
    what: str
    lost: int | None
    """Steps that are trained again; None: no restart."""
    keys: tuple[str, ...] = ()
    same: bool = True
    """The final weights are those of the run without a fault."""
    quick: bool = False
    says: str = ""


LAST_SAVED = STEP // EVERY * EVERY
CASES = [
    Case("kill:1", "SIGKILL of a worker", STEP - LAST_SAVED, quick=True, says="workers failed"),
    Case("kill:0", "SIGKILL of the worker of rank 0", STEP - LAST_SAVED),
    Case("term:1", "SIGTERM of a worker", 0, says="machine is to go"),
    Case("term:0", "SIGTERM of the worker of rank 0", 0),
    Case("hang:1", "a worker hangs", STEP - LAST_SAVED, ("hang_seconds=4",), says="stacks are in"),
    Case("fail:0", "an error in a library, on one rank", STEP - LAST_SAVED, says="a library broke"),
    Case("memory:1", "out of memory", STEP - LAST_SAVED, same=False, says="out of memory"),
    Case("clock:0", "the clock jumps by a day", None),
    Case("kill-in-save:0", "SIGKILL of rank 0 while it saves", 15 - 10),
    Case("kill-in-save:1", "SIGKILL of rank 1 while it saves", 15 - 10),
    Case("term-in-save:1", "SIGTERM while saving", 0),
    Case("storage:0", "storage answers errors for four seconds", None),
    Case("nan:1", "a gradient that is NaN, on one rank", None, same=False, says="was not taken"),
    Case(
        "nans:1", "NaN for six steps on end", STEP + 3 - LAST_SAVED, ("spikes.max_skipped=4",),
        same=False, says="are passed over",
    ),
    Case(
        "spike:0", "a loss spike", STEP + 1 - LAST_SAVED, ("spikes.threshold=8",),
        same=False, quick=True, says="are passed over",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(prepared: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The run without a fault."""
    told = story(prepared, corpus, tmp_path_factory.mktemp("whole"), "no-fault")
    assert told.error is None
    return told


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    file = os.environ.get("MANTA_FAULTS_TABLE")
    if file and rows:
        with Path(file).open("a") as f:
            f.writelines(row + "\n" for row in rows)


@pytest.mark.parametrize("case", [c for c in CASES if ALL or c.quick], ids=lambda c: c.fault)
def test_a_fault_in_a_worker_is_survived(
    case: Case, whole: Story, prepared: Path, corpus: Path, tmp_path: Path, table: list[str]
) -> None:
    name = case.fault.replace(":", "-")
    told = story(prepared, corpus, tmp_path, name, case.fault, *case.keys)
    said = "\n".join(line for _, line in told.lines)
    assert told.error is None, said
    assert told.outcome is not None and told.outcome.state.step == STEPS
    assert (tmp_path / "fault").exists(), "it has happened"
    assert case.says in said
    passed_over = told.said("are passed over")
    if not passed_over:
        assert [r["step"] for r in told.steps] == list(range(1, STEPS + 1))
        assert [r["fingerprint"] for r in told.steps] == [r["fingerprint"] for r in whole.steps]
    if case.same:
        assert told.weights == whole.weights
        assert [r["loss"] for r in told.steps] == [r["loss"] for r in whole.steps]
    lost = None if case.lost is None else told_lost(told)
    assert lost == case.lost
    seconds = told.seconds_to_recover
    table.append(
        f"| {case.what} | {'trained on' if lost is None else 'started again'} | {lost or 0} | "
        f"{'-' if seconds is None else f'{seconds:.0f}'} | {'yes' if case.same else 'no'} |"
    )


def told_lost(told: Story) -> int:
    """Steps that were trained twice."""
    assert told.resumed is not None
    starts = [t for t, line in told.lines if line.startswith(("resuming at", "starting on"))]
    return last_step([line for t, line in told.lines if t <= starts[1]]) - told.resumed


@long
def test_after_going_back_a_run_is_the_one_that_never_saw_those_tokens(
    prepared: Path, corpus: Path, tmp_path: Path
) -> None:
    told = story(prepared, corpus, tmp_path / "a", "went-back", "spike", "spikes.threshold=8")
    clean = tmp_path / "b"
    run = Path(told.config.run_folder).parent / "never-saw"
    run.mkdir()
    noted = (Path(told.config.run_folder) / "rollbacks.json").read_bytes()
    (run / "rollbacks.json").write_bytes(noted)
    other = story(prepared, corpus, clean, "never-saw", "none", "spikes.threshold=8")
    assert other.weights == told.weights
    assert len(json.loads(noted)) == 1
