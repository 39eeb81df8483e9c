"""Faults of the process that a person started, and of the disk, from outside.

They take minutes: `make faults` (MANTA_TEST_FAULTS=1).
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from faults.jobs import final, job, records
from faults.runs import last_step, long


@long
@pytest.mark.parametrize(
    ("number", "code", "lost"),
    [(signal.SIGTERM, 128 + signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL, None)],
    ids=["SIGTERM", "SIGKILL"],
)
def test_a_driver_that_is_ended_goes_on_when_it_is_started_again(
    arguments: list[str], weights: bytes, prepared: Path, number: int, code: int, lost: int | None
) -> None:
    name = f"driver-{number}"
    with job(name, *arguments) as first:
        first.wait_for("step 60/400")
        first.process.send_signal(number)
        assert first.end(60) == code, "\n".join(first.lines)
    reached = last_step(first.lines)
    with job(name, *arguments) as second:
        assert second.end() == 0, "\n".join(second.lines)
    resumed = int(second.first("resuming at step ").split()[3])
    if lost is None:
        assert resumed >= 50 and reached - resumed <= 50
    else:
        assert resumed == reached + lost
        assert any("the same command goes on" in line for line in first.lines)
    assert final(prepared, name) == weights


@long
def test_a_full_disk_is_said_and_survived(
    arguments: list[str], weights: bytes, prepared: Path
) -> None:
    """A small disk of its own for the checkpoints, which is full for a while."""
    folder = prepared / "runs" / "full-disk" / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("a disk of its own needs the right to mount one")
    try:
        filler = folder / "filler"
        with job("full-disk", *arguments, "checkpoint.keep=1", "checkpoint.keep_best=false") as it:
            it.wait_for("step 50 saved")
            filler.write_bytes(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize))
            it.wait_for("the disk is full")
            filler.unlink()
            assert it.end() == 0, "\n".join(it.lines)
        assert any("training goes on" in line and "step-00000050" in line for line in it.lines)
        assert final(prepared, "full-disk") == weights
    finally:
        subprocess.run(["umount", str(folder)], check=False)


@long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_workers_change_from_two_to_one_to_two(
    arguments: list[str], prepared: Path, stage: int, tmp_path: Path
) -> None:
    """Same batches, and the same losses within rounding, as two workers all along."""
    keys = [*arguments, "total_tokens=38400", f"zero_stage={stage}"]
    if stage == 3:  # without the quickstart's recipe: Muon is for the others
        (tmp_path / "plain.yaml").write_text("seed: 1337\n")
        keys = [str(tmp_path / "plain.yaml"), *keys]
    for workers, until in ((2, 20), (1, 70), (2, None)):
        with job(f"count-{stage}", *keys, f"num_workers={workers}") as part:
            if until is not None:
                part.wait_for(f"step {until}/150")
                part.process.send_signal(signal.SIGTERM)
            expected = 0 if until is None else 128 + signal.SIGTERM
            assert part.end() == expected, "\n".join(part.lines)
    with job(f"two-{stage}", *keys, "num_workers=2") as whole:
        assert whole.end() == 0, "\n".join(whole.lines)
    found = [records(prepared, f"{stem}-{stage}") for stem in ("count", "two")]
    assert len(found[0]) == 150
    assert [r["fingerprint"] for r in found[0]] == [r["fingerprint"] for r in found[1]]
    assert [r["loss"] for r in found[0]] == pytest.approx([r["loss"] for r in found[1]], rel=1e-3)
