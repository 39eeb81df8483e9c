"""Tells Ray when EC2 takes this machine back, two minutes ahead; jobs then save and move.

    python spot.py HEAD:6379

Ray 2.60 does not ask EC2 for that notice itself. A cluster file copies this file to its spot
machines and starts it there, next to Ray. Manta is not installed there, so nothing of it is
imported.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

SERVICE = "http://169.254.169.254"
SERVICE_KEY = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # as AWS's own programs name it
TOKEN, ACTION = "latest/api/token", "latest/meta-data/spot/instance-action"
TOKEN_SECONDS = 21600
PAUSE = 5.0  # between two questions, as AWS advises
ANSWER_SECONDS = 2.0
# The metadata service is on this machine: a proxy of the environment is not for it.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Metadata:
    """EC2's metadata service, in its version 2, which wants a token that it gave before."""

    def __init__(self, address: str):
        self._address = address.rstrip("/")
        self._token: str | None = None

    def notice(self) -> tuple[str, float] | None:
        """What is to happen to this machine (terminate, stop, hibernate) and when (seconds since
        1970), or None while nothing is announced.

        Raises:
            OSError: the service does not answer, or refuses.
            ValueError: its answer is no notice.
        """
        try:
            text = self._read()
        except urllib.error.HTTPError as e:
            if e.code == 404:
                return None
            raise
        try:
            told = json.loads(text)
            moment = datetime.strptime(told["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
            return str(told["action"]), moment.timestamp()
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"no notice: {text[:200]!r}") from None

    def _read(self) -> str:
        if self._token is not None:
            try:
                return self._ask(ACTION, {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as e:
                if e.code != 401:  # the token has expired
                    raise
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        self._token = self._ask(TOKEN, lifetime, "PUT")
        return self._ask(ACTION, {"X-aws-ec2-metadata-token": self._token})

    def _ask(self, path: str, headers: dict[str, str], method: str = "GET") -> str:
        url = f"{self._address}/{path}"
        request = urllib.request.Request(url, headers=headers, method=method)
        with _OPENER.open(request, timeout=ANSWER_SECONDS) as answer:
            text: str = answer.read().decode(errors="replace")
            return text


def wait(service: Metadata, say: Callable[[str], None], pause: float = PAUSE) -> tuple[str, float]:
    """Asks the service until it announces something; returns that. `say` gets a line when it begins
    or ceases to answer."""
    problem: str | None = ""
    while True:
        try:
            found = service.notice()
        except (OSError, ValueError) as e:
            now: str | None = str(e)
        else:
            if found is not None:
                return found
            now = None
        if now != problem:
            say("asking EC2 for its notice" if now is None else f"EC2 is asked in vain: {now}")
            problem = now
        time.sleep(pause)


def drain(address: str, action: str, moment: float) -> bool:
    """Tells the Ray at this address that its node on this machine goes at that moment. Returns
    whether it took that in."""
    command = [
        str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", f"EC2's notice: {action}",
        "--deadline-remaining-seconds", str(max(1, int(moment - time.time()))),
    ]  # fmt: skip
    # The command finds this machine's node through the cluster that RAY_ADDRESS names.
    return subprocess.run(command, env={**os.environ, "RAY_ADDRESS": address}).returncode == 0


def main(arguments: list[str]) -> int:
    """Waits for the notice, and tells Ray. Returns the exit code: 0 once Ray knows, 1 if it could
    not be told in time, 2 if the arguments are wrong."""

    def say(line: str) -> None:
        print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}", flush=True)

    if len(arguments) != 1:
        print("usage: python spot.py HEAD:6379", file=sys.stderr)
        return 2
    action, moment = wait(Metadata(os.environ.get(SERVICE_KEY) or SERVICE), say)
    say(f"EC2's notice: {action} in {moment - time.time():.0f} s")
    while not drain(arguments[0], action, moment):
        if time.time() > moment:
            say("Ray could not be told")
            return 1
        time.sleep(1)
    say("Ray moves the work elsewhere")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
