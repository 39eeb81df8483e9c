"""Prometheus' configuration and alert rules, and a Prometheus on this machine that has them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from manta.errors import ClusterError
from manta.monitor.conditions import CONDITIONS

HOST = "127.0.0.1"
PORT = 9090
SECONDS = 10  # between two scrapes: Ray's workers tell its agents so often
START_SECONDS = 20.0
KEPT = "30d"
INSTALL = {
    "linux": "apt-get install prometheus (Debian, Ubuntu), or its archive from prometheus.io",
    "darwin": "brew install prometheus",
}


def configuration(discovery: str, rules: str) -> str:
    """The configuration, in YAML, of a Prometheus that scrapes what Ray's file `discovery` names
    and evaluates the rules in the file `rules`."""
    return dump(
        {
            "global": {
                "scrape_interval": f"{SECONDS}s",
                "evaluation_interval": f"{SECONDS}s",
            },
            "rule_files": [rules],
            "scrape_configs": [
                {
                    "job_name": "ray",
                    "honor_labels": True,  # the label job is Ray's job, not Prometheus'
                    "file_sd_configs": [{"files": [discovery], "refresh_interval": "10s"}],
                }
            ],
        }
    )


def rules() -> str:
    """The alert rules, in YAML: the conditions of the webhook's alerts."""
    made = [
        {
            "alert": rule_name(condition.name),
            "expr": condition.expression,
            "labels": {"severity": "warning"},
            "annotations": {
                "summary": f"{{{{ $labels.run }}}}: {condition.template}",
                "description": condition.remedy,
            },
        }
        for condition in CONDITIONS
    ]
    return dump({"groups": [{"name": "manta", "rules": made}]})


def rule_name(condition: str) -> str:
    """A condition's name as Prometheus' alerts have theirs: MantaNoStep."""
    return "Manta" + condition.title().replace(" ", "")


def dump(tree: Any) -> str:
    """Plain values as YAML."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)


def install_hint() -> str:
    """How to install Prometheus on this machine."""
    return INSTALL.get(sys.platform, "https://prometheus.io/download")


def program() -> str | None:
    """The path of Prometheus; None if it is not installed."""
    return shutil.which("prometheus")


def start(folder: Path, file: Path, port: int) -> int:
    """Starts Prometheus on loopback, with its data in `folder`, for as long as this machine runs.
    Returns the number of its process.

    Raises:
        ClusterError: it does not start; the message has its own last line.
    """
    found = program()
    assert found is not None, "looked for before"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "prometheus.log"
    command = [
        found,
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--storage.tsdb.retention.time={KEPT}",
        f"--web.listen-address={HOST}:{port}",
    ]
    with log.open("ab") as f:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=f, stderr=f, start_new_session=True
        )
    until = time.monotonic() + START_SECONDS
    while not is_ready(port):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            last = (log.read_text(errors="replace").splitlines() or ["it said nothing"])[-1]
            raise ClusterError(f"Prometheus did not start ({last[-300:]}); its log is {log}")
        time.sleep(0.1)
    return process.pid


def is_ready(port: int) -> bool:
    """Whether a Prometheus on this machine answers at the port."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/-/ready", timeout=2) as reply:
            return b"Prometheus" in reply.read(200)
    except OSError:
        return False


def reload(number: int) -> None:
    """Has a running Prometheus read its files again."""
    os.kill(number, signal.SIGHUP)


def is_of(number: int, folder: Path) -> bool:
    """Whether the process is a Prometheus whose data are in this folder."""
    import psutil  # here, as only a second start needs it

    try:
        words = psutil.Process(number).cmdline()
    except psutil.Error:
        return False
    return f"--storage.tsdb.path={folder / 'data'}" in words


def is_taken(port: int) -> bool:
    """Whether something listens at the port on this machine."""
    with socket.socket() as s:
        s.settimeout(2)
        return s.connect_ex((HOST, port)) == 0
