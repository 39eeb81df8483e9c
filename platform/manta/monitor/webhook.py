"""Sends alerts to a webhook (Slack's, Discord's, or one that takes JSON), without ever keeping the
caller waiting."""

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlsplit

from manta.monitor.alerts import Alert
from manta.terminal import line

TIMEOUT = 10.0
PAUSES = (2.0, 10.0)  # seconds before the second and the third try
MOST_WAITING = 100
MOST_CHARACTERS = 1900  # Discord takes 2,000
Form = Literal["slack", "discord", "json"]


class Webhook:
    """A thread that sends alerts, one after the other. What does not arrive is said once."""

    def __init__(self, address: str, form: Form, say: Callable[[str], None]):
        self._address, self._form, self._say = address, form, say
        self._waiting: queue.Queue[Alert | None] = queue.Queue(MOST_WAITING)
        self._is_said, self._is_closing = False, threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="manta-webhook", daemon=True)
        self._thread.start()

    def send(self, alert: Alert) -> None:
        """Takes an alert to send. It is dropped if many wait already."""
        try:
            self._waiting.put_nowait(alert)
        except queue.Full:
            self._complain("too many alerts wait to be sent")

    def close(self, until: float) -> None:
        """Waits for what is to be sent, until a time of time.monotonic() at most."""
        self._is_closing.set()
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(max(0.0, until - time.monotonic()))

    def _send_all(self) -> None:
        while (alert := self._waiting.get()) is not None:
            data = json.dumps(body(alert, self._form)).encode()
            for pause in (*PAUSES, None):
                problem = post(self._address, data)
                if problem is None or pause is None or self._is_closing.wait(pause):
                    break
            if problem is not None:
                self._complain(problem)

    def _complain(self, problem: str) -> None:
        if not self._is_said:
            self._is_said = True
            host = urlsplit(self._address).hostname
            self._say(f"the webhook at {host} does not take alerts ({problem}); training goes on")


def post(address: str, data: bytes) -> str | None:
    """Posts JSON. Returns None, or why it was not taken, in one line without the address."""
    request = urllib.request.Request(
        address, data, {"Content-Type": "application/json", "User-Agent": "manta"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT):
            return None
    except urllib.error.HTTPError as e:
        return f"HTTP {e.code}"
    except (OSError, ValueError) as e:  # (ValueError: an address that no request can have)
        reason = getattr(e, "reason", None) or e
        return line(str(reason) or type(e).__name__).replace(address, "...")[:200]


def body(alert: Alert, form: Form) -> dict[str, Any]:
    """The message in the form that the receiver expects."""
    if form == "slack":
        return {"text": text(alert)}
    if form == "discord":
        return {"content": text(alert)[:MOST_CHARACTERS], "allowed_mentions": {"parse": []}}
    return {
        "run": alert.run,
        "host": alert.host,
        "alert": alert.name,
        "state": "over" if alert.is_over else "on",
        "what": alert.what,
        "since": _utc(alert.since),
        "remedy": alert.remedy,
    }


def text(alert: Alert) -> str:
    """The message for people."""
    if alert.is_over:
        return f"{alert.run} on {alert.host}: over: {alert.name} (since {_utc(alert.since)})"
    return (
        f"{alert.run} on {alert.host}: {alert.what}, since {_utc(alert.since)}.\n"
        f"What to do: {alert.remedy}"
    )


def _utc(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))
