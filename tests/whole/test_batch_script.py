"""What clusters/slurm/pretrain.sbatch does with Slurm's signals. Short programs stand for Slurm's
commands here; test_lab.py has a real Slurm.
"""

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.common import ROOT

# The step of the job: its driver takes a moment to save, then the nodes take theirs to end.
SRUN = """#!/bin/bash
trap 'echo saved; until [ -e end ]; do sleep 0.02; done; exit 143' TERM
if [ "$1" = --ntasks-per-node=1 ] && [ "$2" = rm ]; then exit 0; fi
echo $$ > "$RAY_TMPDIR/driver"
until [ -e finish ]; do sleep 0.02; done
"""
SCONTROL = '#!/bin/bash\necho "scontrol $*"\n'
PYTHON = "#!/bin/bash\necho 127.0.0.1\n"


@pytest.fixture
def job(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """The script, at the point where its driver runs; its folder is the current one."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f"PATH={tmp_path}:$PATH\n")
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "MANTA_HOME": str(tmp_path),
        "MANTA_VENV": str(tmp_path),
        "SLURM_JOB_ID": (name := uuid.uuid4().hex),
        "SLURM_JOB_NUM_NODES": "1",
    }
    command = ["bash", str(ROOT / "clusters" / "slurm" / "pretrain.sbatch"), "name=a"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        driver = Path(f"/tmp/manta-{name}/driver")
        deadline = time.monotonic() + 30
        while not (driver.exists() and driver.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield process
        (tmp_path / "end").touch()
        (tmp_path / "finish").touch()
    shutil.rmtree(driver.parent)


def line(process: subprocess.Popen) -> str:
    assert process.stdout
    return process.stdout.readline()


def rest(process: subprocess.Popen, folder: Path) -> str:
    """What the script still prints, once the nodes of its step have ended."""
    (folder / "end").touch()
    (folder / "finish").touch()
    assert process.stdout
    return process.stdout.read()


def test_usr1_saves_and_requeues(job: subprocess.Popen, tmp_path: Path) -> None:
    job.send_signal(signal.SIGUSR1)
    assert "USR1: the run saves" in line(job) and line(job) == "saved\n"
    assert "scontrol requeue " in rest(job, tmp_path)
    assert job.wait(30) == 0


@pytest.mark.parametrize("_again", range(8))
def test_term_saves_and_ends_even_if_usr1_comes_after_it(
    job: subprocess.Popen, tmp_path: Path, _again: int
) -> None:
    """The later signal may come in the moment in which the step ends: hence several times."""
    job.send_signal(signal.SIGTERM)
    assert "TERM: the run saves" in line(job) and line(job) == "saved\n"
    job.send_signal(signal.SIGUSR1)
    assert "scontrol" not in rest(job, tmp_path)
    assert job.wait(30) == 143


def test_a_run_that_has_finished_is_not_requeued(job: subprocess.Popen, tmp_path: Path) -> None:
    assert "scontrol" not in rest(job, tmp_path)
    assert job.wait(30) == 0
