"""Jobs as a person starts them, watched from outside."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from helpers.common import ROOT
from manta import layout

RAY = str(Path(sys.executable).parent / "ray")


class Job:
    """A job as a person starts it, with a Ray of its own; its lines as they come."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        script: Path | None = None,
        *,
        before: tuple[str, ...] = (),
        **environment: str,
    ):
        """Starts the job: the command `before` and the job's own, with this environment too."""
        script = script or ROOT / "jobs" / "pretrain.py"
        self.process = subprocess.Popen(
            [*before, sys.executable, str(script), f"name={name}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "platform"),
                "RAY_AUTH_MODE": "token",
                "RAY_ADDRESS": "local",
                **environment,
            },
            start_new_session=True,  # and so a process group of its own, which may be told to end
        )
        self.started = time.monotonic()
        self.lines: list[str] = []
        self.times: list[float] = []
        """When each line came, in seconds of time.monotonic()."""
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._came:
                self.lines.append(line.rstrip())
                self.times.append(time.monotonic())
                self._came.notify_all()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        with self._came:
            done = self._came.wait_for(lambda: any(text in line for line in self.lines), seconds)
        assert done, "\n".join(self.lines)

    def wait_for_step_after(self, place: int, seconds: float = 60) -> None:
        with self._came:
            assert self._came.wait_for(lambda: any(map(is_step, self.lines[place:])), seconds)

    def end(self, seconds: float = 240) -> int:
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=30)
        return code

    def first(self, start: str, after: int = 0) -> int:
        """The place of the first line from `after` on that starts with this text."""
        return next(i for i in range(after, len(self.lines)) if self.lines[i].startswith(start))

    def resumed(self, after: int = 0) -> tuple[int, float]:
        """The step from which the job resumed, first after line `after`, and when
        (time.monotonic()) the next step had ended."""
        at = self.first("resuming at step ", after)
        step = next(i for i in range(at, len(self.lines)) if is_step(self.lines[i]))
        return int(self.lines[at].split()[3]), self.times[step]


def is_step(line: str) -> bool:
    return line.startswith("step ") and " | loss " in line


def last_step(lines: list[str]) -> int:
    """The number of the last step in these lines of a run."""
    return int([line for line in lines if is_step(line)][-1].split()[1].partition("/")[0])


@contextlib.contextmanager
def job(
    name: str, *arguments: str, before: tuple[str, ...] = (), **environment: str
) -> Iterator[Job]:
    made = Job(name, list(arguments), before=before, **environment)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()


def kill_child(pid: int, name: str) -> bool:
    """Sends SIGKILL to the process of a job that has this in its command line; returns whether
    there is one."""
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(name in part for part in process.cmdline()[:1]):
                process.kill()
                return True
    return False


def kill_everything(job: Job) -> None:
    """SIGKILL for the driver, Ray's head and all other processes of a job."""
    everyone = psutil.Process(job.process.pid).children(recursive=True)
    for process in [psutil.Process(job.process.pid), *everyone]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.end(30)


def final(home: Path, name: str, step: int = 400) -> bytes:
    path = layout.checkpoint_folder(f"{home}/runs/{name}", step)
    return Path(path, layout.WEIGHTS).read_bytes()


def records(home: Path, name: str) -> list[dict[str, Any]]:
    lines = (home / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "loss" in r]
