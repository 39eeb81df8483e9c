"""Jobs as a person starts them, watched from outside."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import ROOT

from manta.train import checkpoint


class Job:
    """A job as a person starts it, with a Ray of its own; its lines as they come."""

    def __init__(self, name: str, arguments: list[str], script: Path | None = None):
        script = script or ROOT / "jobs" / "pretrain.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script), f"name={name}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "platform"), "RAY_AUTH_MODE": "token"},
        )
        self.lines: list[str] = []
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._came:
                self.lines.append(line.rstrip())
                self._came.notify_all()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        with self._came:
            done = self._came.wait_for(lambda: any(text in line for line in self.lines), seconds)
        assert done, "\n".join(self.lines)

    def end(self, seconds: float = 240) -> int:
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=30)
        return code

    def first(self, start: str) -> str:
        return next((line for line in self.lines if line.startswith(start)), "")


@contextlib.contextmanager
def job(name: str, *arguments: str) -> Iterator[Job]:
    made = Job(name, list(arguments))
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()


def final(home: Path, name: str, step: int = 400) -> bytes:
    path = checkpoint.path_of(f"{home}/runs/{name}", step)
    return Path(path, checkpoint.WEIGHTS).read_bytes()


def records(home: Path, name: str) -> list[dict[str, Any]]:
    lines = (home / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "loss" in r]
