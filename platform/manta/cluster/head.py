"""Ray's head node on this machine, for those who have no cluster yet.

`python -m manta.cluster up` starts it if none runs (token auth, loopback only) and checks that its
job server accepts our token.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from manta.cluster import starting
from manta.cluster.authentication import AUTH_HINT, is_refusal, protect_token
from manta.cluster.connection import (
    LOCAL_OBJECT_STORE_BYTES,
    TRAIN_RECORDS,
    others_run_ray,
    stay_on_loopback,
)
from manta.errors import ClusterError
from manta.terminal import keep_private

DASHBOARD = "http://127.0.0.1:8265"
# Where Ray's dashboard looks for the Prometheus of `make monitor`, and for a Grafana.
MONITORING = {
    "RAY_PROMETHEUS_HOST": "http://127.0.0.1:9090",
    "RAY_GRAFANA_HOST": "http://127.0.0.1:3000",
}
PORT = 6379
JOB_STOP_SECONDS = "60"


def up() -> None:
    """Starts a head node here unless one runs, and checks that its job server accepts our token.

    The job server is at RAY_API_SERVER_ADDRESS, by default at DASHBOARD. Nothing listens on another
    address than 127.0.0.1.

    Raises:
        ClusterError: Ray does not start, or refuses our token, or the job server's port is taken.
    """
    keep_private()  # also for the workers, which write datasets and runs
    stay_on_loopback()
    server = os.environ.get("RAY_API_SERVER_ADDRESS", DASHBOARD)
    port = urlsplit(server).port or 8265
    is_named = "RAY_API_SERVER_ADDRESS" in os.environ
    if not is_named and _is_taken(port) and not _is_ours(port):  # before our token goes there
        raise ClusterError(
            f"port {port} is another user's or another program's, so Ray's job server cannot be "
            f"there: run `export RAY_API_SERVER_ADDRESS=http://127.0.0.1:{_free_port()}` and the "
            "command again, or `export RAY_ADDRESS=local`, which gives each job a Ray of its own"
        )
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    ray_command = str(Path(sys.executable).parent / "ray")
    token = subprocess.run(
        [ray_command, "get-auth-token", "--generate"], capture_output=True, text=True, check=False
    )
    if token.returncode:
        raise ClusterError(f"Ray's token cannot be made: {token.stderr.strip()[-300:]}")
    protect_token()
    try:
        _check_job_server(server)
        print(f"Ray is running: {server}")
        return
    except ConnectionError as e:
        if urlsplit(server).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ClusterError(
                f"RAY_API_SERVER_ADDRESS={server}: no job server answers there ({str(e)[:160]}); "
                "unset it to start a Ray on this machine"
            ) from None
    # `ray job stop` has a job save first; by default Ray would kill it after three seconds.
    os.environ.setdefault("RAY_JOB_STOP_WAIT_TIME_S", JOB_STOP_SECONDS)
    os.environ.setdefault(*TRAIN_RECORDS)
    for name, address in MONITORING.items():
        os.environ.setdefault(name, address)
    command = [
        ray_command,
        "start",
        "--head",
        "--node-ip-address=127.0.0.1",
        f"--port={_free_port() if _is_taken(PORT) else PORT}",
        f"--ray-client-server-port={_free_port()}",  # nothing of Manta uses it
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        "--dashboard-agent-listen-port=0",  # any
        f"--object-store-memory={LOCAL_OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
    ]
    starting.start(lambda: _start(command))
    deadline = time.monotonic() + 60
    while True:
        try:
            _check_job_server(server)
            break
        except ConnectionError:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Ray started, but its job server at {server} does not answer "
                    f"within 60 s; see {starting.logs() / 'dashboard.log'}"
                ) from None
            time.sleep(0.5)
    print(f"started Ray: {server} (`ray stop` ends it)")


def _start(command: list[str]) -> None:
    """Runs `ray start`. Raises RuntimeError with what it says if it fails."""
    started = subprocess.run(command, capture_output=True, text=True, check=False)
    if started.returncode:
        said = " ".join((started.stderr.strip() or started.stdout.strip())[-300:].split())
        hint = (
            ". The Ray of another user runs on this machine, and both may not share a folder: run "
            "`export RAY_TMPDIR=~/.ray-tmp` and the command again, or `export RAY_ADDRESS=local`"
        )
        raise RuntimeError(f"`ray start` failed: {said}{hint if others_run_ray() else ''}")


def _is_taken(port: int) -> bool:
    """Whether something listens on this port of 127.0.0.1."""
    with socket.socket() as s:
        s.settimeout(2)
        return s.connect_ex(("127.0.0.1", port)) == 0


def _is_ours(port: int) -> bool:
    """Whether a process of this user's that belongs to Ray listens on this port."""
    import psutil  # here, as in connection.py

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().real != os.getuid() or "ray" not in " ".join(process.cmdline()):
                continue
            for it in process.net_connections("tcp"):
                if it.status == psutil.CONN_LISTEN and it.laddr.port == port:
                    return True
    return False


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        found: int = s.getsockname()[1]
        return found


def _check_job_server(server: str) -> None:
    """Raises ConnectionError if no job server answers, ClusterError if it refuses our token."""
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(server).list_jobs()
    except Exception as e:
        if is_refusal(e):
            raise ClusterError(AUTH_HINT) from None
        if isinstance(e, ConnectionError):
            raise
        raise ConnectionError(str(e)) from e
