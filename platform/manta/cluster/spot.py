"""Tells Ray when the cloud takes this machine back; jobs then save and move.

    python spot.py HEAD:6379 [ADDRESS_OF_THE_METADATA_SERVICE]

Ray 2.60 asks no cloud for its notices itself. A cluster file copies this file to its machines and
starts it there, next to Ray. Manta is not installed there, so nothing of it is imported. It asks
the metadata service, finds out which cloud's it is, and acts on

    EC2             the notice to a spot machine, two minutes ahead
    Google Cloud    `preempted`, 30 s ahead, and maintenance that ends the machine, up to an hour
    Azure           events that end the machine (Preempt: 30 s ahead)

by draining the node. EC2 also recommends to rebalance, at times long before a notice, at times for
nothing: such a warning is left with Ray, and jobs that train on this node save once and go on.
"""

import dataclasses
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

SERVICE = "http://169.254.169.254"  # of every cloud
TOKEN_SECONDS = 21600  # the longest that EC2 gives
MAINTENANCE_SECONDS = 3600.0  # machines with GPUs; others have a minute, and leave as soon
PREEMPTED_SECONDS = 30.0
AHEAD_SECONDS = 900.0  # Azure announces some events days ahead
ANSWER_SECONDS = 2.0
RAY_SECONDS = 60.0
NO_ANSWER = (OSError, HTTPException, TypeError, ValueError)
WARNINGS = "manta-warnings"  # where they are in Ray's key-value store, by node
# The metadata service is on this machine: a proxy of the environment is not for it.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclasses.dataclass(frozen=True)
class Notice:
    """What a cloud has announced to this machine."""

    what: str
    moment: float | None
    """When the machine goes, in seconds since 1970; None: perhaps never."""


class Cloud:
    """A cloud's metadata service."""

    name = ""
    pause = 1.0
    """Seconds between two questions."""

    def __init__(self, address: str = SERVICE):
        self._address = address.rstrip("/")

    def notice(self) -> Notice | None:
        """What is announced to this machine; None: nothing.

        Raises one of NO_ANSWER: the service does not answer, or refuses (another cloud's does), or
        what it answers is no notice.
        """
        raise NotImplementedError

    def _ask(self, path: str, headers: dict[str, str], method: str = "GET") -> str:
        url = f"{self._address}/{path}"
        request = urllib.request.Request(url, headers=headers, method=method)
        with _OPENER.open(request, timeout=ANSWER_SECONDS) as answer:
            text: str = answer.read(1 << 20).decode(errors="replace")
            return text.strip()


class Amazon(Cloud):
    """EC2's service in its version 2, which wants a token that it gave before."""

    name = "EC2"
    pause = 5.0  # as AWS advises

    def __init__(self, address: str = SERVICE):
        super().__init__(address)
        self._token: str | None = None

    def notice(self) -> Notice | None:
        """The notice to a spot machine; before there is one, the recommendation to rebalance."""
        if (text := self._read("spot/instance-action")) is not None:
            action, moment = _values(text, "action", "time")
            at = datetime.strptime(moment, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
            return Notice(f"EC2's notice: {action}", at.timestamp())
        if (text := self._read("events/recommendations/rebalance")) is not None:
            (since,) = _values(text, "noticeTime")
            return Notice(f"EC2 recommends to rebalance since {since}", None)
        return None

    def _read(self, item: str) -> str | None:
        """An item of the metadata; None: it is not there."""
        path = f"latest/meta-data/{item}"
        for is_new in (False, True):
            if is_new or self._token is None:
                lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
                self._token = self._ask("latest/api/token", lifetime, "PUT")
            try:
                return self._ask(path, {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as e:
                if e.code == 404:
                    return None
                if e.code != 401 or is_new:  # 401: the token has expired
                    raise
        raise AssertionError


class Google(Cloud):
    """Compute Engine's service."""

    name = "Google Cloud"

    def notice(self) -> Notice | None:
        """That this machine is preempted, or ends for maintenance. A migration is no notice: the
        machine goes on."""
        preempted = self._read("preempted")
        if preempted not in ("TRUE", "FALSE"):
            raise ValueError(f"no notice: {preempted[:200]!r}")
        if preempted == "TRUE":
            return Notice("Google Cloud's notice: preempted", time.time() + PREEMPTED_SECONDS)
        if self._read("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE":
            at = time.time() + MAINTENANCE_SECONDS
            return Notice("Google Cloud's notice: maintenance of the host", at)
        return None

    def _read(self, key: str) -> str:
        return self._ask(f"computeMetadata/v1/instance/{key}", {"Metadata-Flavor": "Google"})


class Azure(Cloud):
    """Azure's service, whose first answer may take two minutes: its first question turns it on."""

    name = "Azure"
    _ENDS = ("Preempt", "Terminate", "Reboot", "Redeploy")

    def __init__(self, address: str = SERVICE):
        super().__init__(address)
        self._own: str | None = None

    def notice(self) -> Notice | None:
        """The first event that ends this machine within a quarter of an hour. (Each machine hears
        of the events of its whole group.)"""
        if self._own is None:
            self._own = self._read("instance/compute/name?api-version=2021-02-01&format=text")
        text = self._read("scheduledevents?api-version=2020-07-01")
        (events,) = _values(text, "Events")
        found = []
        for event in events:
            kind, machines, moment = _values(event, "EventType", "Resources", "NotBefore")
            if kind in self._ENDS and self._own in machines:
                # An event that has begun has no moment.
                at = parsedate_to_datetime(moment).timestamp() if moment else time.time()
                found.append(Notice(f"Azure's notice: {kind}", at))
        first = min(found, key=lambda it: it.moment or 0, default=None)
        ahead = (first.moment or 0) - time.time() if first else 0
        return first if ahead < AHEAD_SECONDS else None

    def _read(self, path: str) -> str:
        return self._ask(f"metadata/{path}", {"Metadata": "true"})


CLOUDS: tuple[type[Cloud], ...] = (Amazon, Google, Azure)


def _values(found: Any, *names: str) -> list[Any]:
    """The values of these names in an object, or in the JSON of one."""
    try:
        it = json.loads(found) if isinstance(found, str) else found
        return [it[name] for name in names]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"no notice: {str(found)[:200]!r}") from None


def notices(
    clouds: list[Cloud], say: Callable[[str], None], pause: float | None = None
) -> Iterator[Notice]:
    """Each notice that comes, once. `say` gets a line when a service begins or ceases to answer;
    the first one that answers is this machine's cloud."""
    problem, told = "", set()
    while True:
        found, failed = None, []
        for cloud in clouds:
            try:
                found = cloud.notice()
            except NO_ANSWER as e:
                failed.append(f"{cloud.name} is asked in vain: {e}")
            else:
                clouds, failed = [cloud], []
                break
        now = "; ".join(failed) or f"asking {clouds[0].name} for its notices"
        if now != problem:
            say(now)
            problem = now
        if found is not None and found.what not in told:
            told.add(found.what)
            yield found
        time.sleep(clouds[0].pause if pause is None else pause)


def drain(address: str, what: str, moment: float) -> bool:
    """Tells the Ray at this address that its node on this machine goes at that moment. Returns
    whether it took that in."""
    command = [
        str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", what,
        "--deadline-remaining-seconds", str(max(1, int(moment - time.time()))),
    ]  # fmt: skip
    # The command finds this machine's node through the cluster that RAY_ADDRESS names.
    return subprocess.run(command, env={**os.environ, "RAY_ADDRESS": address}).returncode == 0


def warn(address: str, what: str) -> bool:
    """Leaves a warning for this machine's node with the Ray at this address. Returns whether it
    took that in."""
    # A process of its own, as Ray ends a process that cannot join it.
    process = multiprocessing.get_context("spawn").Process(target=_leave, args=(address, what))
    process.start()
    process.join(RAY_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode == 0


def _leave(address: str, what: str) -> None:
    import ray
    from ray.experimental import internal_kv

    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    text = f"{what} ({ray.util.get_node_ip_address()})"
    internal_kv._internal_kv_put(_node(), text, namespace=WARNINGS)
    ray.shutdown()


def warning() -> str | None:
    """The last warning that was left for the node of this process, which has joined Ray; None:
    there is none."""
    from ray.experimental import internal_kv

    found = internal_kv._internal_kv_get(_node(), namespace=WARNINGS)
    return None if found is None else found.decode(errors="replace")


def _node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def main(arguments: list[str]) -> int:
    """Waits for notices, and tells Ray. Returns the exit code: 0 once Ray knows that this machine
    goes, 1 if it could not be told in time, 2 if the arguments are wrong."""

    def say(line: str) -> None:
        print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}", flush=True)

    if len(arguments) not in (1, 2):
        print("usage: python spot.py HEAD:6379 [METADATA_SERVICE]", file=sys.stderr)
        return 2
    for notice in notices([cloud(*arguments[1:]) for cloud in CLOUDS], say):
        if notice.moment is None:
            told = warn(arguments[0], notice.what)
            say(f"{notice.what}: " + ("jobs save" if told else "Ray could not be told"))
            continue
        say(f"{notice.what} in {notice.moment - time.time():.0f} s")
        while not drain(arguments[0], notice.what, notice.moment):
            if time.time() > notice.moment:
                say("Ray could not be told")
                return 1
            time.sleep(1)
        say("Ray moves the work elsewhere")
        return 0
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
