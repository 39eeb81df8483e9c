"""Faults inside workers: the run survives each without a person, and loses nothing.

`make test` kills one worker; `make faults` runs all faults and prints the table.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.inject import CLOCK_JUMP, STEP
from faults.runs import EVERY, STEPS, Story, story
from manta.train.checkpoints import checkpoint

pytestmark = pytest.mark.usefixtures("ray_session")


IDENTICAL = "identical"


@dataclasses.dataclass(frozen=True)
class Case:
    fault: str
    what: str
    lost: int | None
    """Steps that are trained again; None: no restart."""
    keys: tuple[str, ...] = ()
    end: str = IDENTICAL
    """The final weights, compared with those of the run without a fault."""
    says: str = ""
    happened: str = ""


SAVED = STEP // EVERY * EVERY
LOST = STEP - SAVED
SKIPPED = "without that step"
CASES = [
    Case("kill:1", "SIGKILL of a worker", LOST, says="process is gone"),
    Case("kill:0", "SIGKILL of the worker of rank 0", LOST),
    Case("kill-twice:1", "SIGKILL, and another one in the first step after it", LOST + 1),
    Case("controller:0", "SIGKILL of Ray Train's controller", LOST),
    Case("term:1", "SIGTERM of a worker", 0, says="machine is leaving", happened="saved, and "),
    Case("term:0", "SIGTERM of the worker of rank 0", 0, happened="saved, and "),
    Case(
        "hang:1", "a worker hangs (`hang_seconds=4`)", LOST, ("hang_seconds=4",),
        says="stacks are in", happened="the stacks of all kept, ",
    ),
    Case("fail:0", "an error in a library, on one rank", LOST, says="a library broke"),
    Case(
        # max_failures does not count this failure.
        "memory:1", "out of memory (simulated)", LOST, ("max_failures=0",),
        end="same batches, smaller micro batches",
        says="(simulated)) with micro batches of 4 sequences: continuing with 2, more of them",
    ),
    Case("clock:0", "the clock of rank 0 jumps by a day", None),
    # Training continues while step 15 is written, up to the next save, which waits for it.
    Case("kill-in-save:0", "SIGKILL of rank 0 while it saves", 20 - 10),
    Case("kill-in-save:1", "SIGKILL of rank 1 while it saves", 20 - 10),
    Case("term-in-save:1", "SIGTERM while saving", 0, happened="saved, and "),
    Case(
        "hang-in-save:1", "storage hangs while a worker saves (`hang_seconds=4`)", 20 - 10,
        ("hang_seconds=4",), says="stacks are in", happened="the stacks of all kept, ",
    ),
    Case("storage:0", "storage answers errors for 4 seconds", None, happened="tried again"),
    Case(
        "storage-long:0", "storage answers errors for 40 seconds", None, says="was not saved",
        happened="a checkpoint missing, said; trained on",
    ),
    Case(
        "nan:1", "a gradient that is NaN, on one rank", None, end=SKIPPED, says="was not taken",
        happened="the step not taken, on all ranks",
    ),
    Case(
        # Two steps before it are passed over too, so the run returns to a checkpoint before them.
        "nans:1", "NaN for six steps on end", STEP + 3 - (STEP - 3) // EVERY * EVERY,
        ("spikes.max_skipped=4",),
        end="without these steps", says="are passed over", happened="back, and past these tokens",
    ),
    Case(
        "spike:0", "a loss spike", STEP + 1 - SAVED, ("spikes.threshold=8",),
        end="of a run that never saw these tokens", says="are passed over",
        happened="back, and past these tokens",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(prepared: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The run without a fault."""
    told = story(prepared, corpus, tmp_path_factory.mktemp("whole"), "no-fault")
    assert told.error is None
    return told


def test_a_killed_worker_is_started_again(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    """The pulse of what follows: all steps are taken, each once in the end. (That a resumed run has
    the weights of a whole one is shown in tests/whole/test_training.py.)"""
    told = story(prepared, corpus, tmp_path, "killed", "kill:1")
    said = "\n".join(line for _, line in told.lines)
    assert told.error is None and told.said("process is gone"), said
    assert [r["step"] for r in told.steps] == list(range(1, STEPS + 1))
    assert len({r["fingerprint"] for r in told.steps}) == STEPS and told.lost == LOST, said


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.fault)
def test_a_fault_in_a_worker_is_survived(
    case: Case,
    whole: Story,
    prepared: Path,
    corpus: Path,
    tmp_path: Path,
    note: Callable[..., None],
) -> None:
    name = case.fault.replace(":", "-")
    told = story(prepared, corpus, tmp_path, name, case.fault, *case.keys)
    said = "\n".join(line for _, line in told.lines)
    assert told.error is None, said
    assert told.outcome is not None and told.outcome.state.step == STEPS
    assert (tmp_path / "fault").exists(), "it has happened"
    assert case.says in said
    if not told.said("are passed over"):
        assert [r["step"] for r in told.steps] == list(range(1, STEPS + 1))
        assert [r["fingerprint"] for r in told.steps] == [r["fingerprint"] for r in whole.steps]
    if case.end == IDENTICAL:
        check_same(told, whole)
    assert told.lost == case.lost, said
    happened = case.happened
    if case.lost is None:
        happened = happened or "trained on"
    elif not told.said("are passed over"):
        happened += "started again"
    note(case.what, happened, told.lost or 0, told.seconds_to_recover, case.end)


def check_same(told: Story, whole: Story) -> None:
    assert told.weights == whole.weights
    assert [r["loss"] for r in told.steps] == [r["loss"] for r in whole.steps]


@pytest.mark.faults
def test_what_fails_again_and_again_ends_the_run(
    prepared: Path, corpus: Path, tmp_path: Path, note: Callable[..., None]
) -> None:
    told = story(prepared, corpus, tmp_path, "always", "kill-always:1", "max_failures=1")
    assert told.said("(failure 1 of 1 since the last checkpoint)")
    assert told.said("failed 2 times without a new checkpoint (max_failures=1); the run ends")
    assert told.error is not None and told.lost == LOST
    assert checkpoint.find(told.config.run_folder)[-1].endswith(f"{SAVED:08}")
    what = "SIGKILL of a worker whenever it comes there (`max_failures=1`)"
    note(what, "started again once; ended, saying so", LOST, None, "the last checkpoint's, whole")


@pytest.mark.faults
def test_the_drivers_clock_may_jump(
    whole: Story,
    prepared: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    note: Callable[..., None],
) -> None:
    real = time.time

    def hear(line: str) -> None:
        if line.startswith(f"step {STEP}/"):
            monkeypatch.setattr(time, "time", lambda: real() - CLOCK_JUMP)

    told = story(prepared, corpus, tmp_path, "driver-clock", "none", hear=hear)
    monkeypatch.undo()
    assert told.error is None and told.lost is None
    check_same(told, whole)
    note("the driver's clock jumps back by a day", "trained on", 0, None, IDENTICAL)


@pytest.mark.faults
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
