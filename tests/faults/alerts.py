"""Seconds from a fault in a run to its alert, by the webhook and by Prometheus.

    python tests/faults/alerts.py folder=FOLDER [faults=hang,slow,disk,loss] [key=value ...]

Starts a Ray head, the Prometheus of `python -m manta.monitor` and a small run, all in FOLDER (a new
one), and causes one fault after the other: a worker that is stopped, one that is stopped half of
the time, a disk that fills up, a learning rate at which the loss diverges.
Prints a table: a fault's seconds are from its cause; for `hang` the first 15 s are the setting
alerts.no_step_minutes=0.25. Needs Prometheus; `disk` needs the right to mount. Other keys are those
of jobs/pretrain.py.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "tests")]

from helpers.watching import taking
from manta.cluster.head import _free_port
from manta.monitor.prometheus import rule_name

LONGEST = 150.0  # seconds to wait for an alert
SETTLING = 40.0  # seconds of steps before the first fault, for a median of them
KEYS = [
    "name=watched", "model.n_layer=2", "model.n_head=2", "model.n_embd=64", "log_every=10",
    "model.context_length=128", "tokens_per_batch=2048", "total_tokens=50000000", "eval.every=5000",
    "eval.tokens=5000", "checkpoint.every=300", "threads_per_worker=1", "dtype=fp32",
    "data.document_bytes=2000", "data.vocab_size=512", "alerts.no_step_minutes=0.25",
]  # fmt: skip


class Scene:
    """A Ray head, a Prometheus and a run, in one folder."""

    def __init__(self, folder: Path, keys: list[str], come: list[dict[str, Any]]):
        self.folder, self.keys, self.come, self.seen = folder, keys, come, 0
        self.home, self.port, dashboard = folder / "home", _free_port(), _free_port()
        self.environment = {
            **os.environ, "PYTHONPATH": str(ROOT / "platform"), "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }  # fmt: skip
        self.log = folder / "log"
        self.run("-m", "manta.cluster", "up")
        self.run("-m", "manta.monitor", f"home={self.home}", f"port={self.port}",
                 f"ray_folder={folder}/ray")  # fmt: skip

    def run(self, *arguments: str) -> None:
        command = [sys.executable, *arguments]
        subprocess.run(command, env=self.environment, cwd=ROOT, check=True)

    def train(self, *more: str) -> None:
        """Starts the run, and returns when it has trained for a while."""
        command = [sys.executable, "jobs/pretrain.py", f"home={self.home}", *self.keys, *more]
        with self.log.open("wb") as log:
            self.job = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, cwd=ROOT
            )
        self.lines("step 1/", 150)

    def lines(self, words: str, seconds: float) -> None:
        """Waits for a line of the run with these words."""
        until = time.monotonic() + seconds
        while words not in self.log.read_text():
            if time.monotonic() > until or self.job.poll() is not None:
                raise SystemExit(f"no line with {words!r}:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def processes(self, word: str) -> list[psutil.Process]:
        """The processes of this scene that have a word in their command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get("RAY_TMPDIR") == str(self.folder)
                if is_ours and any(word in part for part in process.cmdline()):
                    found.append(process)
        return [process for process in found if process.pid != os.getpid()]

    def worker(self) -> psutil.Process:
        return self.processes("RayTrainWorker")[0]

    def firing(self, name: str) -> bool:
        address = f"http://127.0.0.1:{self.port}/api/v1/alerts"
        with urllib.request.urlopen(address, timeout=5) as page:
            alerts = json.load(page)["data"]["alerts"]
        named = [a for a in alerts if a["labels"]["alertname"] == rule_name(name)]
        return any(a["state"] == "firing" for a in named)

    def seconds(self, name: str, since: float) -> dict[str, float | None]:
        """Seconds until the webhook and Prometheus have the alert."""
        found: dict[str, float | None] = {"webhook": None, "Prometheus": None}
        while None in found.values() and time.monotonic() - since < LONGEST:
            now = time.monotonic() - since
            if any(a["alert"] == name and a["state"] == "on" for a in self.come[self.seen :]):
                found["webhook"] = found["webhook"] or now
            if self.firing(name):
                found["Prometheus"] = found["Prometheus"] or now
            time.sleep(0.25)
        return found

    def calm(self) -> None:
        """Waits until each alert that was told is over."""
        until = time.monotonic() + LONGEST
        while time.monotonic() < until:
            states = {alert["alert"]: alert["state"] for alert in self.come}
            if "on" not in states.values():
                return
            time.sleep(0.5)

    def end(self) -> None:
        """Ends what was started here."""
        for process in self.processes(""):
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextlib.contextmanager
def hang(scene: Scene) -> Iterator[str]:
    worker = scene.worker()
    worker.suspend()
    yield "no step"
    worker.resume()


@contextlib.contextmanager
def slow(scene: Scene) -> Iterator[str]:
    script = (
        "import os,sys,time,signal\n"
        "while True:\n"
        "    for s in (signal.SIGSTOP, signal.SIGCONT):\n"
        "        os.kill(int(sys.argv[1]), s); time.sleep(0.2)"
    )
    pid = scene.worker().pid
    pauses = subprocess.Popen([sys.executable, "-c", script, str(pid)])
    yield "slower than before"
    pauses.kill()
    pauses.wait()
    os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def disk(scene: Scene) -> Iterator[str]:
    free = shutil.disk_usage(scene.home).free
    file = scene.home / "large"
    file.write_bytes(bytes(int(free * 0.95)))
    yield "disk"
    file.unlink()


@contextlib.contextmanager
def loss(scene: Scene) -> Iterator[str]:
    scene.job.send_signal(signal.SIGTERM)
    scene.job.wait()
    scene.train("optimizer.lr=1e4", "optimizer.grad_clip=1e9", "schedule.warmup=0")
    scene.lines("are passed over", 120)
    yield "loss"


FAULTS: dict[str, Callable[[Scene], Any]] = {
    "hang": hang, "slow": slow, "disk": disk, "loss": loss,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    folder = Path(given.pop("folder")).absolute()
    faults = given.pop("faults", ",".join(FAULTS)).split(",")
    (folder / "home").mkdir(parents=True, exist_ok=True)
    if "disk" in faults:
        size = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(folder / "home")]
        subprocess.run(size, check=True)
    rows = []
    with taking() as (address, come):
        keys = [*KEYS, f"alerts.webhook={address}", *(f"{k}={v}" for k, v in given.items())]
        scene = Scene(folder, keys, come)
        try:
            scene.train()
            time.sleep(SETTLING)
            for name in faults:
                scene.calm()
                scene.seen = len(come)
                with FAULTS[name](scene) as alert:
                    found = scene.seconds(alert, time.monotonic())
                rows.append((name, alert, *found.values()))
                print(rows[-1], flush=True)
        finally:
            scene.end()
            if "disk" in faults:
                subprocess.run(["umount", "-l", str(folder / "home")], check=False)
    print("| fault | alert | webhook, s | Prometheus, s |\n|---|---|---|---|")
    for name, alert, *found in rows:
        shown = ("-" if seconds is None else f"{seconds:.0f}" for seconds in found)
        print(f"| {name} | {alert} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
