"""Fixtures for faults from outside: the run that they hit, its weights without a fault, and the
table."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from faults.inject import SEED
from faults.jobs import RAY, final, job
from faults.runs import KEYS
from helpers.common import tiny_arguments

# 400 steps are long enough to act from outside in the middle of them, also on a fast machine.
LONGER = ["total_tokens=409600", "tokens_per_batch=1024", "eval.tokens=64", "checkpoint.every=50"]
HEAD = """| fault | what happened | steps lost | seconds to the next step | final weights |
|---|---|---|---|---|
"""


@pytest.fixture(scope="session")
def note(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`note(fault, happened, lost, seconds, end)` writes a row of the table of `make faults` at
    once, to the file that --faults-table names."""
    file, rows = request.config.getoption("faults_table"), 0

    def write(fault: str, happened: str, lost: int, seconds: float | None, end: str) -> None:
        nonlocal rows
        rows += 1
        took = "-" if seconds is None else f"{seconds:.0f}"
        if file:
            with Path(file).open("a") as f:
                f.write(HEAD if rows == 1 else "")
                f.write(f"| {fault} | {happened} | {lost} | {took} | {end} |\n")

    yield write
    if file and rows:
        with Path(file).open("a") as f:
            f.write(f"\n{rows} faults, seed {SEED}\n")


@pytest.fixture(scope="session")
def arguments(prepared: Path, corpus: Path) -> list[str]:
    return [*tiny_arguments(prepared, corpus), *KEYS, "num_workers=1", *LONGER]


@pytest.fixture(scope="session")
def weights(arguments: list[str], prepared: Path) -> bytes:
    """The final weights of the run without a fault."""
    with job("driver-whole", *arguments) as whole:
        assert whole.end() == 0, "\n".join(whole.lines)
    return final(prepared, "driver-whole")


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """A Ray as plain `ray start` makes it, in a temporary folder of its own. Gives the environment
    in which jobs are submitted to it."""
    folder = tempfile.mkdtemp(prefix="m", dir="/tmp")  # as the paths of sockets may not be long
    ports = {key: _free_port() for key in ("port", "dashboard-port", "ray-client-server-port")}
    command = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}",
        "--dashboard-host=127.0.0.1", "--disable-usage-stats", "--dashboard-agent-listen-port=0",
        *(f"--{key}={port}" for key, port in ports.items()),
    ]  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MANTA_"))}
    server = f"http://127.0.0.1:{ports['dashboard-port']}"
    with subprocess.Popen(command, env=kept | {"RAY_AUTH_MODE": "disabled"}) as process:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{server}/api/version"):
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield {"RAY_API_SERVER_ADDRESS": server, "RAY_AUTH_MODE": "disabled"}
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        found: int = s.getsockname()[1]
        return found
