"""Prometheus' files: promtool accepts them, each fault fires its rule within a minute, and a
healthy hour fires none. What is missing or taken is said."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.watching import taking
from manta.config import load
from manta.errors import ClusterError
from manta.monitor import board, prometheus
from manta.monitor.command import MonitorConfig, monitor
from manta.monitor.conditions import CONDITIONS
from manta.monitor.metrics import DECLARED
from manta.monitor.prometheus import rule_name
from manta.monitor.settings import AlertsConfig

# For each condition: a healthy figure, one that is not, and what the alert then says.
SAID = {
    "no step": (0, 660, "no step for 11m 0s more than usual"),
    "loss": (0, 3, "3 steps in 10 minutes had a loss or gradient that is not finite, or were "
             "rolled back"),
    "slower than planned": (1, 0.75, "the run trains at 75% of the tokens per second of its plan"),
    "slower than before": (1, 0.5, "the run trains at 50% of its own median of tokens per second"),
    "data wait": (0.01, 0.25, "25% of the steps' time is spent waiting for data"),
    "checkpoint": (1, 2.5, "the newest checkpoint is 2.5 times as old as usual between two"),
    "goodput": (0.9, 0.25, "only 25% of the last 15 minutes went into steps"),
    "node lost": (0, 1, "1 nodes of the cluster have died"),
    "disk": (0.5, 0.05, "only 5% of the disk is free"),
}  # fmt: skip

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason=f"needs promtool: {prometheus.install_hint()}"
)


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    """The input of a unit test of rules: a metric as a run's driver publishes it."""
    every = {"run": "a/run", "rank": "all", "job": "02000000", "WorkerId": "ff", **labels}
    text = ",".join(f'{key}="{value}"' for key, value in every.items())
    return {"series": f"ray_manta_{name}{{{text}}}", "values": values}


def rule_tests() -> list[dict[str, Any]]:
    """A run that is healthy for an hour; and for each condition one that is so for ten minutes, and
    then is not."""
    limits = [
        series("alert_threshold", f"{c.threshold(AlertsConfig())}x480", alert=c.name)
        for c in CONDITIONS
    ]
    healthy = {c.figure: f"{SAID[c.name][0]}x480" for c in CONDITIONS}
    names = [rule_name(c.name) for c in CONDITIONS]
    hour = [(f"{minute}m", name, []) for minute in range(61) for name in names]
    made = [rule_test(healthy, limits, hour)]
    for c in CONDITIONS:
        good, bad, words = SAID[c.name]
        fired = {
            "exp_labels": {"severity": "warning", "run": "a/run", "job": "02000000"},
            "exp_annotations": {"summary": f"a/run: {words}", "description": c.remedy},
        }
        times = [("11m", name, [fired] if name == rule_name(c.name) else []) for name in names]
        times += [("25m", name, []) for name in names]  # it is over
        figures = {**healthy, c.figure: f"{good}x60 {bad}x30 {good}x90"}
        made.append(rule_test(figures, limits, times))
    return made


def rule_test(
    figures: dict[str, str], more: list[dict[str, str]], times: list[tuple[str, str, Any]]
) -> dict[str, Any]:
    """A unit test of promtool's: these figures of a run, and which alerts are on at which times."""
    inputs = [series(name, values) for name, values in figures.items()]
    return {
        "interval": "10s",
        "input_series": [*inputs, series("running", "1x480"), *more],
        "alert_rule_test": [
            {"eval_time": time, "alertname": name, "exp_alerts": alerts}
            for time, name, alerts in times
        ],
    }


@needs_promtool
def test_each_fault_fires_its_rule_within_a_minute_and_a_healthy_hour_none(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(prometheus.rules())
    tests = {"rule_files": ["rules.yml"], "evaluation_interval": "10s", "tests": rule_tests()}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        ["promtool", "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_files(tmp_path: Path) -> None:
    home = tmp_path / 'a "home"'
    monitor(load(MonitorConfig, [f"home={home}", "start=false"]), lambda _: None)
    for kind, file in (("config", "prometheus.yml"), ("rules", "rules.yml")):
        command = ["promtool", "check", kind, str(home / "monitor" / file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CONDITIONS)} rules found" in done.stdout


def test_a_job_that_has_ended_fires_nothing() -> None:
    for condition in CONDITIONS:
        assert condition.expression.endswith("(ray_manta_running) == 1")


def test_the_board_is_what_grafana_takes(tmp_path: Path) -> None:
    made = json.loads(board.board())
    ids = [panel["id"] for panel in made["panels"]]
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in made["panels"]}
    assert len(set(ids)) == len(places) == len(ids) == len(board.PANELS)
    shown = " ".join(t["expr"] for panel in made["panels"] for t in panel["targets"])
    left_out = {name for name in DECLARED if f"ray_manta_{name}{{" not in shown}
    # These are in other panels in another form, or only for some runs.
    assert left_out == {
        "step", "mfu_of_measured", "data_wait_seconds", "val_bpb", "running", "checkpoint_step",
        "alert_threshold",
    }  # fmt: skip
    files = board.provisioning("/home/me/manta/monitor/grafana", "http://127.0.0.1:9090", "/r")
    source = yaml.safe_load(files["provisioning/datasources/manta.yml"])["datasources"][0]
    assert {source["uid"]} == {t["datasource"]["uid"] for p in made["panels"] for t in p["targets"]}


def test_a_machine_without_prometheus_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "program", lambda: None)
    said: list[str] = []
    monitor(load(MonitorConfig, [f"home={tmp_path}"]), said.append)
    assert "not installed" in said[1] and "prometheus" in said[1] and "alerts.webhook" in said[2]
    assert (tmp_path / "monitor" / "rules.yml").exists()


def test_a_port_that_is_taken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "program", lambda: "prometheus")
    with taking() as (address, _):
        port = address.split(":")[2].partition("/")[0]
        with pytest.raises(ClusterError, match=f"port {port} .* is another program's.*port=9091"):
            monitor(load(MonitorConfig, [f"home={tmp_path}", f"port={port}"]), lambda _: None)


def test_a_file_that_was_changed_by_hand_stays(tmp_path: Path) -> None:
    c = load(MonitorConfig, [f"home={tmp_path}", "start=false"])
    rules, board_file = (tmp_path / "monitor" / n for n in ("rules.yml", "grafana/grafana.ini"))
    for content in ("mine", "mine too"):
        monitor(c, lambda _: None)
        rules.write_text(content)
        board_file.unlink(missing_ok=True)
        said: list[str] = []
        monitor(c, said.append)
        assert [str(rules) in line for line in said] == [True, False] and "by hand" in said[0]
        assert rules.read_text() == content and board_file.exists()
    rules.unlink()
    monitor(c, said.append)
    assert rules.read_text() == prometheus.rules()
    other = load(MonitorConfig, [f"home={tmp_path}", "start=false", "port=9999"])
    monitor(other, said.append)  # Manta's own files follow the settings
    assert "9999" in (tmp_path / "monitor/grafana/provisioning/datasources/manta.yml").read_text()


def test_an_object_store_gets_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    said: list[str] = []
    monitor(load(MonitorConfig, ["home=s3://bucket/manta", "start=false"]), said.append)
    assert said[0] == (
        f"Prometheus cannot write to s3://bucket/manta: its files are in {tmp_path}/manta/monitor"
    )
    assert (tmp_path / "manta" / "monitor" / "prometheus.yml").exists()


@pytest.mark.skipif(prometheus.program() is None, reason=f"needs {prometheus.install_hint()}")
def test_prometheus_is_started_once(tmp_path: Path) -> None:
    import os
    import signal

    from manta.cluster.head import _free_port

    c = load(MonitorConfig, [f"home={tmp_path}", f"port={_free_port()}"])
    said: list[str] = []
    monitor(c, said.append)
    number = int((tmp_path / "monitor" / "prometheus.pid").read_text())
    try:
        monitor(c, said.append)
        assert "started Prometheus" in said[1] and "no run trains at the moment" in said
        assert any("Prometheus is running" in line for line in said[5:])
        assert int((tmp_path / "monitor" / "prometheus.pid").read_text()) == number
    finally:
        os.kill(number, signal.SIGTERM)
        os.waitpid(number, 0)
