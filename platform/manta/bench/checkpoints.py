"""Measures what a checkpoint costs training, which continues while the checkpoint is written.

For comparison: the cost if training waited for the whole save, a bare write of as many bytes to the
same disk, and the read that resumes from the checkpoint.
"""

import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any

from manta import layout, ownership, storage
from manta.bench.model import on_workers
from manta.bench.settings import BenchConfig
from manta.model.families import model_of
from manta.text import tokenizer
from manta.train.alone import Step
from manta.train.checkpoints import checkpoint
from manta.train.checkpoints.checkpoint import CheckpointConfig, TrainState
from manta.train.checkpoints.saver import Saver
from manta.train.step.device import Device


def checkpoints(c: BenchConfig) -> dict[str, Any]:
    """Seconds that saves and loads of the config's model take, in one process."""
    return on_workers(dataclasses.replace(c, num_workers=1), _measure)


def _measure(c: BenchConfig, device: Device) -> dict[str, Any]:
    with ownership.scratch(c.home_folder, "bench-checkpoint") as folder:
        return _measure_in(folder, c, device)


def _measure_in(folder: str, c: BenchConfig, device: Device) -> dict[str, Any]:
    step = Step(c, device)
    _time(step)  # gives the optimizer its state
    made = tokenizer.train(["a text to train a tokenizer on"], 257)
    saver = Saver(folder, CheckpointConfig(keep=1), step.model, made, lambda _: None)
    found: dict[str, list[float]] = {}
    size = 0
    try:
        for index in range(c.rounds + 1):
            state = TrainState(step=index)
            quiet = statistics.median(_time(step) for _ in range(c.steps_per_round))
            started = time.perf_counter()
            copied = saver.save(step.engine, state)
            steps = 0
            while saver.is_writing or not steps:
                _time(step)
                steps += 1
            lost = time.perf_counter() - started - steps * quiet
            started = time.perf_counter()
            saver.save(step.engine, state)
            saver.finish()
            saved = time.perf_counter()
            path = layout.checkpoint_folder(folder, index)
            checkpoint.verify(path)
            checkpoint.load_weights(path, model_of(step.model))
            checkpoint.load_optimizer(path, step.engine)
            loaded = time.perf_counter()
            size = sum(info.size or 0 for info in storage.list_files(path))
            times = {
                "step": quiet,
                "copy": copied,
                "lost": lost,
                "save": saved - started,
                "load": loaded - saved,
                "write": _write(folder, size),
            }
            for key, seconds in times.items() if index else ():  # the first round warms up
                found.setdefault(key, []).append(seconds)
    finally:
        saver.close()
    return {
        "device": device.description,
        "bytes": size,
        "rounds": c.rounds,
        **{f"{key}_seconds": statistics.median(seconds) for key, seconds in found.items()},
        **{
            f"{key}_steps": statistics.median(
                a / b for a, b in zip(found[key], found["step"], strict=True)
            )
            for key in ("copy", "lost", "save")
        },
    }


def _time(step: Step) -> float:
    started = time.perf_counter()
    step.run()
    step.wait()
    return time.perf_counter() - started


def _write(folder: str, size: int) -> float:
    """Seconds to write `size` bytes and flush them to the disk; for local folders only."""
    path = Path(storage.filesystem(storage.join(folder, "bare"))[1])
    block = os.urandom(1 << 24)
    started = time.perf_counter()
    with path.open("wb") as file:
        for at in range(0, size, len(block)):
            file.write(block[: size - at])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def table(result: dict[str, Any]) -> str:
    def line(what: str, key: str, note: str) -> str:
        return f"{what:<22}{result[f'{key}_seconds']:>8.2f} s  {note}"

    size = result["bytes"] / 1e6
    steps = {key: f"{result[f'{key}_steps']:.2f} steps" for key in ("copy", "lost", "save")}
    return "\n".join(
        [
            f"device                {result['device']}",
            f"checkpoint            {size:>8,.1f} MB (medians of {result['rounds']} rounds)",
            line("a training step", "step", "when nothing is saved"),
            line("training waits", "copy", f"{steps['copy']}: the copy"),
            line("training loses", "lost", f"{steps['lost']}: the copy, and slower steps"),
            line("if it waited for all", "save", f"{steps['save']}"),
            line("bare write", "write", f"{size / result['write_seconds']:,.0f} MB/s, with fsync"),
            line("verify and load", "load", ""),
        ]
    )
