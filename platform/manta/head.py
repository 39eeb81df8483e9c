"""Ray's head node on this machine, for those who have no cluster yet.

`python -m manta.head up` starts it if none runs (token auth, loopback only) and checks that its
job server accepts our token.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from manta.cluster import AUTH_HINT, LOCAL_OBJECT_STORE_BYTES, is_refusal, protect_token
from manta.errors import ClusterError, MantaError

DASHBOARD = "http://127.0.0.1:8265"
JOB_STOP_SECONDS = "60"


def up() -> None:
    """Starts a head node here unless one runs, and checks that its job server accepts our token.

    Raises:
        ClusterError: Ray does not start, or refuses our token.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    ray_command = str(Path(sys.executable).parent / "ray")
    token = subprocess.run(
        [ray_command, "get-auth-token", "--generate"], capture_output=True, text=True, check=False
    )
    if token.returncode:
        raise ClusterError(f"Ray's token cannot be made: {token.stderr.strip()[-300:]}")
    protect_token()
    try:
        _check_job_server()
        print(f"Ray is running: {DASHBOARD}")
        return
    except ConnectionError:
        pass
    # `ray job stop` has a job save first; by default Ray would kill it after three seconds.
    os.environ.setdefault("RAY_JOB_STOP_WAIT_TIME_S", JOB_STOP_SECONDS)
    started = subprocess.run(
        [
            ray_command,
            "start",
            "--head",
            "--dashboard-host=127.0.0.1",
            f"--object-store-memory={LOCAL_OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if started.returncode:
        raise ClusterError(f"`ray start --head` failed: {started.stderr.strip()[-400:]}")
    deadline = time.monotonic() + 60
    while True:
        try:
            _check_job_server()
            break
        except ConnectionError:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Ray started, but its job server at {DASHBOARD} does not answer "
                    "within 60 s; see /tmp/ray/session_latest/logs/dashboard.log"
                ) from None
            time.sleep(0.5)
    print(f"started Ray: {DASHBOARD} (`ray stop` ends it)")


def _check_job_server() -> None:
    """Raises ConnectionError if no job server answers, ClusterError if it refuses our token."""
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(os.environ.get("RAY_API_SERVER_ADDRESS", DASHBOARD)).list_jobs()
    except Exception as e:
        if is_refusal(e):
            raise ClusterError(AUTH_HINT) from None
        if isinstance(e, ConnectionError):
            raise
        raise ConnectionError(str(e)) from e


if __name__ == "__main__":
    try:
        if sys.argv[1:] != ["up"]:
            raise ClusterError("usage: python -m manta.head up")
        up()
    except MantaError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
