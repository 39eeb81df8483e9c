"""A run's records: metrics.jsonl, samples.jsonl, TensorBoard, the loss curve, and log lines."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from manta import layout, plot, storage
from manta.job import hint_once
from manta.train.records import lines

MOST_PENDING = 10_000  # numbers for TensorBoard, before logging waits until they are written


class Logbook:
    """Writes a run's records, on rank 0.

    In a local run folder the files grow in place. An object store cannot append, so for one they
    grow in a local folder, and each `sync` uploads them.
    """

    def __init__(
        self,
        run: str,
        say: Callable[[str], None],
        resumed_step: int,
        publish: Callable[[Sequence[dict[str, Any]]], None] = lambda _: None,
    ):
        """Opens the records, and drops those after `resumed_step`. Each `log_metrics` calls
        `publish(records)`."""
        self.say, self._publish = say, publish
        self._run = run
        self._is_local = storage.is_local(run)
        if self._is_local:
            self._folder = Path(storage.filesystem(run)[1])
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            self._folder = Path(tempfile.mkdtemp(prefix="manta-logbook-"))
            for name in (layout.METRICS, layout.SAMPLES):
                if storage.exists(storage.join(run, name)):
                    storage.download(storage.join(run, name), self._folder / name)
        # Records after the checkpoint that the run resumes from will be logged again.
        gone = _keep_until(self._folder / layout.METRICS, resumed_step, lines.Metrics, say)
        self.lost_seconds = sum(float(r.get("step_seconds") or 0) for r in gone)
        """The time of the steps whose records were dropped."""
        _keep_until(self._folder / layout.SAMPLES, resumed_step, lines.Sample, say)
        self._board = SummaryWriter(
            str(self._folder / layout.TENSORBOARD),
            purge_step=resumed_step + 1 if resumed_step else None,
            max_queue=MOST_PENDING,
        )
        self._pencil = ThreadPoolExecutor(1, thread_name_prefix="manta-curve")
        self._drawn: Future[None] | None = None

    def log_metrics(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes one line of metrics.jsonl for each record; each record has a `step`."""
        with (self._folder / layout.METRICS).open("a") as f:
            for record in records:
                f.write(json.dumps(_plain(record)) + "\n")
                for key, value in record.items():
                    if key != "step" and isinstance(value, int | float):
                        self._board.add_scalar(key, value, record["step"])
        self._publish(records)

    def log_sample(self, step: int, prompt: str, completion: str) -> None:
        with (self._folder / layout.SAMPLES).open("a") as f:
            row = {"step": step, "prompt": prompt, "completion": completion}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._board.add_text("samples", f"**{prompt}**{completion}", step)

    def sync(self, *, curve: str | None = None) -> None:
        """Makes the logged records visible. With `curve`, a title, also draws the loss curve: in
        another thread, as the picture of a long run would keep training waiting."""
        self._board.flush()
        is_waiting = self._drawn is not None and not (self._drawn.running() or self._drawn.done())
        if curve is not None and not is_waiting:  # (a waiting one will draw this too)
            self._drawn = self._pencil.submit(self._draw, curve)
        self._send()

    def _draw(self, title: str) -> None:
        records = read_metrics(str(self._folder / layout.METRICS))
        with suppress(OSError):  # a full disk must not stop training
            (self._folder / layout.LOSS_CURVE).write_bytes(plot.loss_curve(records, title))

    def _send(self) -> None:
        if not self._is_local:
            for file in sorted(p for p in self._folder.rglob("*") if p.is_file()):
                storage.upload(file, storage.join(self._run, str(file.relative_to(self._folder))))

    def close(self) -> None:
        self._board.close()
        self._pencil.shutdown()
        self._send()
        if not self._is_local:
            shutil.rmtree(self._folder, ignore_errors=True)


def write_scalars(run: str, name: str, scalars: Mapping[str, float], at: int) -> None:
    """Adds scalars at place `at` of the axis to TensorBoard's folder `name` of a run, in a new file
    each time."""
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        with SummaryWriter(folder) as board:
            for key, value in scalars.items():
                board.add_scalar(key, value, at)
        for file in Path(folder).iterdir():
            storage.upload(file, storage.join(run, layout.TENSORBOARD, name, file.name))


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The whole records of a metrics.jsonl. Says once if there are others."""
    records, problem = lines.read(path, lines.Metrics)
    if problem is not None:
        hint_once(f"{problem}; what is damaged there is left out")
    return records


def evaluations(records: Iterable[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The records of evaluations up to this step: those that have a val loss."""
    return [
        r for r in records if r["step"] <= step and None not in (r.get("val_loss"), r.get("tokens"))
    ]


def _keep_until(
    file: Path, step: int, kind: type, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Drops the records after `step` from the file; returns those dropped. A damaged file is kept
    under another name."""
    if not file.exists():
        return []
    path = str(file.absolute())
    records, problem = lines.read(path, kind)
    if problem is not None:
        aside = storage.set_aside(path, layout.DAMAGED)
        say(f"{problem}; the file is kept as {aside}, and the run goes on with its whole records")
    kept = [json.dumps(r, ensure_ascii=False) for r in records if r["step"] <= step]
    storage.write_bytes(path, "".join(line + "\n" for line in kept).encode(errors="replace"))
    return [r for r in records if r["step"] > step]


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """The record with values that are not finite as strings, as JSON has no NaN."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def duration(seconds: float) -> str:
    """Seconds in a form for people: 42s, 3m05s, 2h10m."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
