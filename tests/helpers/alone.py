"""Shell scripts in a network of their own, in which a Ray disturbs nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.common import ROOT

ALONE = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
NETWORK = """
ip link set lo up && ip addr add 10.98.7.6/8 dev lo && ip route add default dev lo src 10.98.7.6
"""


def is_possible() -> bool:
    """Whether this machine lets us have a network of our own."""
    try:
        command = [*ALONE, "sh", "-c", NETWORK]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


alone = pytest.mark.skipif(not is_possible(), reason="needs unshare and ip, and leave to use them")


def run(folder: Path, script: str, **programs: str) -> list[str]:
    """The lines that a shell script prints in a network of its own. The programs, in Python, are
    files in its folder: `join=` is join.py."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MANTA_"))}
    env = {
        **kept,
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT / "platform"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for name, text in programs.items():
        (folder / f"{name}.py").write_text(text)
    command = [*ALONE, "bash", "-ec", f"{NETWORK}\ncd {folder}\n{script}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout.splitlines()
