"""`python -m manta.cluster up` and what joins it, in a network and a list of processes of their
own, with a second address that stands for the network of an office.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from helpers.alone import alone, run
from manta.cluster import connection

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
LISTENING = """
import json, psutil
found = [c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN"]
print(json.dumps(sorted(set(found))))
"""
JOIN = """
import os
import ray
from manta.cluster import connection
connection.connect()
def mask():
    return os.umask(0)
print(connection.address(), oct(ray.get(ray.remote(mask).remote())))
"""


@alone
def test_nothing_of_the_head_listens_on_the_network_and_jobs_run_on_it(short: Path) -> None:
    up = f"{sys.executable} -m manta.cluster up"
    lines = run(
        short,
        f"{up}\n{up}\npython join.py\n"
        "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265\n"
        "ray job submit -- python join.py | grep 0o\npython listening.py",
        join=JOIN,
        listening=LISTENING,
    )
    assert lines[0] == "started Ray: http://127.0.0.1:8265 (`ray stop` ends it)"
    assert lines[1] == "Ray is running: http://127.0.0.1:8265"
    assert lines[2] == "joined Ray at 127.0.0.1:6379"
    assert lines[3] == lines[-2] == "127.0.0.1:6379 0o77"
    assert set(json.loads(lines[-1])) <= LOOPBACK


@alone
def test_a_jobs_own_ray_does_not_listen_on_the_network(short: Path) -> None:
    (short / "own.py").write_text(JOIN + LISTENING)
    lines = run(short, "python own.py")
    assert lines[0] == "started a local Ray for this job"
    assert set(json.loads(lines[-1])) <= LOOPBACK


@alone
def test_a_port_that_is_not_ours_gets_no_token(short: Path) -> None:
    (short / "taken.py").write_text(
        "import http.server, sys\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def handle(self): open('asked', 'w').write(self.rfile.readline().decode())\n"
        "http.server.HTTPServer(('127.0.0.1', 8265), H).serve_forever()\n"
    )
    lines = run(
        short,
        "python taken.py & sleep 3\n"
        f"{sys.executable} -m manta.cluster up 2>&1 || echo code $?\n"
        "cat asked 2>/dev/null || echo nothing",
    )
    assert "port 8265" in lines[0] and "RAY_ADDRESS=local" in lines[0]
    assert lines[1] == "code 2"
    assert "Authorization" not in "".join(lines[2:])  # nothing was asked, or without a token


@pytest.fixture
def raylet() -> Iterator[None]:
    """A process of ours whose command line is a raylet's."""
    words = ["raylet", "-c", "import time; time.sleep(300)", "--gcs-address=127.0.0.9:6379"]
    with subprocess.Popen(words, executable=sys.executable) as process:
        while "--gcs-address=127.0.0.9:6379" not in psutil.Process(process.pid).cmdline():
            pass
        yield
        process.kill()


def test_only_a_ray_whose_file_and_process_are_ours_is_found(
    tmp_path: Path, raylet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert connection.own_address() is None  # a process without the file: the Ray of one job alone
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    file.write_text("127.0.0.9:6379\n")
    assert connection.own_address() == "127.0.0.9:6379"
    file.write_text("127.0.0.9:6380\n")
    assert connection.own_address() is None  # a file without the process: it has ended
    file.write_text("127.0.0.9:6379\n")
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert connection.own_address() is None  # neither is this user's
    assert connection.others_run_ray()
