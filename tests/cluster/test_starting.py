"""A Ray that does not come up in time is started again, and nothing of the first try is left. What
a Ray for one job consists of."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from helpers.common import ROOT
from manta.cluster import starting
from manta.cluster.connection import PACKAGE
from manta.errors import ClusterError

# The first tries wait for no time at all for Ray's control server, which so is never up in time.
SLOW = """
import sys
import psutil
from manta.cluster import connection, starting
from manta.errors import ClusterError
starting.TRIES = tuple(int(n) for n in sys.argv[1:])
try:
    connection.connect(own=True, num_cpus=1)
except ClusterError as e:
    print(e)
names = [process.name() for process in psutil.Process().children()]
print("control servers:", names.count("gcs_server"))
"""


def started(folder: Path, *seconds: str) -> list[str]:
    """The lines of a program whose Ray is waited for so long in each try."""
    program = folder / "slow.py"
    program.write_text(SLOW)
    env = {**os.environ, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, str(program), *seconds]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_ray_that_is_never_up_in_time_is_one_line_with_a_remedy(short: Path) -> None:
    said, left = started(short, "0", "0", "0")
    assert said.startswith("Ray did not start on this machine in 3 tries (Timed out")
    assert "try again when less runs" in said
    assert f"{short}/ray/session_latest/logs" in said
    assert left == "control servers: 0"


@pytest.mark.long
def test_a_ray_that_was_not_up_in_time_is_started_again(short: Path) -> None:
    assert started(short, "0", "60") == ["started a local Ray for this job", "control servers: 1"]


def test_what_a_failed_try_started_is_ended_and_the_environment_is_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(starting.WAIT, "7")
    tries: list[subprocess.Popen[bytes]] = []
    waits = []

    def begin() -> None:
        waits.append(int(os.environ[starting.WAIT]))
        tries.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]))
        while not psutil.Process(tries[-1].pid).environ().get(starting.MARK):
            pass
        if len(tries) < 3:
            raise RuntimeError("The current node timed out during startup.")

    starting.start(begin)
    assert waits == list(starting.TRIES)
    assert not any(psutil.pid_exists(process.pid) for process in tries[:2])
    assert tries[2].poll() is None
    tries[2].kill()
    tries[2].wait()
    assert os.environ[starting.WAIT] == "7" and starting.MARK not in os.environ


def test_what_more_time_does_not_mend_is_tried_once() -> None:
    tries = []

    def begin() -> None:
        tries.append(1)
        raise ValueError("AF_UNIX path length\ncannot exceed 107 bytes")

    with pytest.raises(ClusterError) as caught:
        starting.start(begin)
    assert len(tries) == 1
    assert "(AF_UNIX path length cannot exceed 107 bytes); see Ray's logs" in str(caught.value)


def test_a_ray_for_one_job_has_no_spare_processes_and_a_copy_of_this_code(
    ray_session: None,
) -> None:
    import ray

    def where() -> str:
        import manta

        return manta.__file__

    copy = Path(ray.get(ray.remote(num_cpus=0)(where).remote())).parent
    assert copy != PACKAGE
    files = {file.relative_to(PACKAGE): file.read_bytes() for file in PACKAGE.rglob("*.py")}
    assert {file: (copy / file).read_bytes() for file in files} == files
    lines = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            lines.append(" ".join(process.cmdline()))
    assert any("gcs_server" in line for line in lines)
    for spare in ("monitor.py", "dashboard.py"):  # also log_monitor.py
        assert not any(spare in line for line in lines)
