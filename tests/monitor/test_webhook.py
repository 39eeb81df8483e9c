"""A webhook gets alerts in its form, and one that does not answer keeps nobody waiting."""

import socket
import sys
import time
from pathlib import Path

import pytest

from helpers.watching import record, taking, watched
from manta.messages import Logged, Saved, WentBack
from manta.monitor import watch as watches
from manta.monitor import webhook as webhooks
from manta.monitor.alerts import Alert
from manta.monitor.settings import AlertsConfig
from manta.monitor.watch import watching
from manta.monitor.webhook import Webhook, body
from manta.train.records import history

ALERT = Alert("a/run", "a-host", "disk", "only 5% of the disk is free", 0.0, "free some space")


def wait_for(condition: object, seconds: float = 20.0) -> None:
    """Waits until `condition()` is true."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:  # type: ignore[operator]
        time.sleep(0.01)
    assert condition()  # type: ignore[operator]


def test_a_message_has_all_that_a_person_needs() -> None:
    assert body(ALERT, "json") == {
        "run": "a/run", "host": "a-host", "alert": "disk", "state": "on",
        "what": "only 5% of the disk is free", "since": "1970-01-01 00:00:00 UTC",
        "remedy": "free some space",
    }  # fmt: skip
    for form, key in (("slack", "text"), ("discord", "content")):
        text = body(ALERT, form)[key]  # type: ignore[arg-type]
        for word in ("a/run", "a-host", ALERT.what, "1970-01-01", ALERT.remedy):
            assert word in text


@pytest.mark.parametrize(
    ("address", "form"),
    [
        ("https://hooks.slack.com/services/T/B/x", "slack"),
        ("https://discord.com/api/webhooks/1/x", "discord"),
        ("https://notslack.com/x", "json"),
        ("http://127.0.0.1:1/slack.com", "json"),
    ],
)
def test_the_form_follows_from_the_address(address: str, form: str) -> None:
    assert AlertsConfig(webhook=address).form == form
    assert AlertsConfig(webhook=address, kind="json").form == "json"
    kept = AlertsConfig(webhook=address, kind="json", speed=0.5).without_webhook()
    assert kept == AlertsConfig(speed=0.5) and not kept.problems()


def test_the_address_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_ALERTS_WEBHOOK", "https://discord.com/api/webhooks/1/x")
    assert AlertsConfig().form == "discord" and not AlertsConfig(kind="json").problems()
    assert AlertsConfig(webhook="https://a.example/x").form == "json"
    monkeypatch.setenv("MANTA_ALERTS_WEBHOOK", "secret")
    (problem,) = AlertsConfig().problems()
    assert "MANTA_ALERTS_WEBHOOK" in problem and "secret" not in problem


def test_the_address_is_in_no_file_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    argument = "alerts.webhook=https://hooks.slack.com/services/T/B/secret"
    monkeypatch.setattr(sys, "argv", ["jobs/pretrain.py", "name=a", argument])
    command = history.command()["command"]
    assert "secret" not in command.replace("(hidden: it has a secret)", "") and "name=a" in command


def test_faults_of_a_run_arrive_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "TICK", 0.02)
    said: list[str] = []
    with taking() as (address, come):
        run = watched(tmp_path, alerts=AlertsConfig(webhook=address, disk=0.0))
        with pytest.raises(RuntimeError), watching(run, said.append) as watch:
            steps = [record(n, data_wait_seconds=0.09) for n in range(1, 30)]
            watch.hear(Logged(steps, {"productive": 1.0}, 1))
            watch.hear(Saved(29, 0.1, 0.0))
            wait_for(lambda: len(come) == 1)
            for _ in range(3):
                watch.hear(WentBack("a spike"))
            wait_for(lambda: len(come) == 2)
            time.sleep(0.2)
            raise RuntimeError("the workers failed")
    assert [found["alert"] for found in come] == ["data wait", "loss", "failed"]
    assert "the workers failed" in come[-1]["what"] and come[0]["run"] == "a/run"
    assert [line.partition(":")[0] for line in said] == ["alert"] * 3


@pytest.mark.parametrize("answer", ["refuses", "hangs", "error"])
def test_a_webhook_that_does_not_answer_is_said_once_and_keeps_nobody_waiting(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(webhooks, "TIMEOUT", 0.1)
    said: list[str] = []
    with socket.socket() as s, taking(500) as (failing, _):
        s.bind(("127.0.0.1", 0))
        if answer == "hangs":
            s.listen(100)
        address = f"http://127.0.0.1:{s.getsockname()[1]}/services/secret"
        hook = Webhook(failing if answer == "error" else address, "json", said.append)
        started = time.monotonic()
        for _ in range(3):
            hook.send(ALERT)
        assert time.monotonic() - started < 5  # it would wait much longer for three answers
        wait_for(lambda: said)
        hook.close(time.monotonic() + 10)
    assert len(said) == 1 and "training goes on" in said[0] and "secret" not in said[0]
    assert ("HTTP 500" in said[0]) == (answer == "error")
