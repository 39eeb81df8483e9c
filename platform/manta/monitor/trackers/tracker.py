"""Starts the process of each tracker that a run names, and passes the run's records on to it."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import manta
from manta import foreign, layout, storage
from manta.errors import DataError
from manta.monitor.settings import Tracker
from manta.terminal import line

MOST_WAITING = 10_000  # batches of records; later ones are dropped
# What a library needs to be told before it is imported: nothing is sent that nobody asked for.
QUIET = {
    "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}  # fmt: skip


class Trackers:
    """All trackers of a run. None of them ever keeps the caller waiting before `close`."""

    def __init__(
        self,
        names: Sequence[Tracker],
        run: str,
        home: str,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        self._all: list[_Tracker] = []
        if not names:
            return
        kept = _Kept(storage.join(layout.run_folder(home, run), layout.TRACKERS), say)
        folder = layout.trackers_folder(home if storage.is_local(home) else "~/manta")
        about = {"run": run, "folder": storage.absolute(folder), "config": dict(config)}
        for name in dict.fromkeys(names):
            try:
                self._all.append(_Tracker(name, about, kept, say))
            except OSError as e:  # no memory for a process
                say(f"track={name}: {line(str(e))}; training goes on")

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes records of metrics.jsonl; their numbers are tracked."""
        for tracker in self._all:
            tracker.put([_numbers(record) for record in records])

    def end(self) -> None:
        """Tells the trackers that there will be no more records."""
        for tracker in self._all:
            tracker.put(None)

    def close(self, until: float) -> None:
        """Waits until all is tracked, until a time of time.monotonic() at most."""
        for tracker in self._all:
            tracker.close(until)


class _Kept:
    """The ids of a run in its trackers, in its folder, so that a resumed run goes on in them."""

    def __init__(self, path: str, say: Callable[[str], None]):
        self._path, self._ids, self._lock = path, {}, threading.Lock()
        with contextlib.suppress(OSError):
            if storage.exists(path):
                try:
                    self._ids = foreign.read_json(
                        path, dict[str, str], DataError, "new runs are begun in the trackers"
                    )
                except DataError as e:
                    say(str(e))

    def get(self, tracker: str) -> str | None:
        return self._ids.get(tracker)

    def put(self, tracker: str, number: str) -> None:
        with self._lock, contextlib.suppress(OSError):  # a full disk must not stop a tracker
            if self._ids.get(tracker) != number:
                self._ids[tracker] = number
                storage.write_json(self._path, self._ids)


class _Tracker:
    """One tracker: its process, a thread that writes to it, and one that hears what it says."""

    def __init__(
        self, name: Tracker, about: dict[str, Any], kept: _Kept, say: Callable[[str], None]
    ):
        self._name, self._kept, self._say, self._is_said = name, kept, say, False
        self._waiting: queue.Queue[list[dict[str, Any]] | None] = queue.Queue(MOST_WAITING)
        platform = str(Path(manta.__file__).parents[1])
        path = os.pathsep.join(filter(None, (platform, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "manta.monitor.trackers.process", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**QUIET, **os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the job, which then closes this
        )
        self._writer = threading.Thread(
            target=self._write, args=({**about, "id": kept.get(name)},), daemon=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._writer.start()
        self._reader.start()

    def put(self, records: list[dict[str, Any]] | None) -> None:
        """Takes records to track; None: there will be no more."""
        try:
            self._waiting.put_nowait(records)
        except queue.Full:
            self._complain("it takes figures too slowly; some are missing there")

    def close(self, until: float) -> None:
        """Waits for the process's end until a time of time.monotonic(), then ends it."""
        self._writer.join(max(0.0, until - time.monotonic()))
        try:
            self._process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._complain("has not taken everything in time; some figures are missing there")
        self._reader.join(1)

    def _write(self, about: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError), self._process.stdin as pipe:  # its process is gone
            pipe.write(json.dumps(about, default=str).encode() + b"\n")
            pipe.flush()
            while (records := self._waiting.get()) is not None:
                pipe.write(json.dumps(records).encode() + b"\n")
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for reply in self._process.stdout:
            found = json.loads(reply)
            if "id" in found:
                self._kept.put(self._name, found["id"])
            if "notice" in found:
                self._say(f"track={self._name}: {line(found['notice'])}")
            if "problem" in found:
                self._complain(found["problem"])
        if self._process.wait() != 0:
            self._complain("its process has ended")

    def _complain(self, problem: str) -> None:
        if not self._is_said:
            self._is_said = True
            self._say(f"track={self._name}: {line(problem)[:500]}; training goes on")


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if isinstance(value, int | float)}
