"""A job whose own Ray dies says so, and ends; one that shuts its Ray down does neither."""

import os
import subprocess
import sys

import pytest

from helpers.common import ROOT

JOB = """
import os, signal, sys, time, psutil
from manta.cluster import connection
connection.connect(own=True, num_cpus=1)
if sys.argv[1] == "shutdown":
    connection.disconnect()
    time.sleep(2)
    sys.exit(0)
for process in psutil.Process().children():
    if process.name() == sys.argv[1]:
        process.send_signal(signal.SIGKILL)
time.sleep(60)
"""


@pytest.mark.parametrize("dies", ["raylet", "gcs_server", "shutdown"])
def test_a_job_whose_own_ray_dies_says_so_and_ends(dies: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "platform"), "RAY_AUTH_MODE": "token", "RAY_ADDRESS": "local",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", JOB, dies],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    said = f"error: the Ray that this job had started is gone: its {dies} was ended by signal 9"
    if dies == "shutdown":
        assert (done.returncode, done.stderr.count("error:")) == (0, 0), done.stderr
    else:
        assert done.returncode == 1 and said in done.stderr, done.stderr
