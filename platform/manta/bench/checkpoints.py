"""What a checkpoint costs: a save as training does it, against a bare write of as many bytes to the
same disk; and the read that resumes from it."""

import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any

from manta import storage
from manta.bench.model import Step, on_workers
from manta.bench.settings import BenchConfig
from manta.text import tokenizer
from manta.train import checkpoint
from manta.train.checkpoint import TrainState
from manta.train.device import Device


def checkpoints(c: BenchConfig) -> dict[str, Any]:
    """Seconds of saves and loads of the config's model, in one process."""
    return on_workers(dataclasses.replace(c, num_workers=1), _measure)


def _measure(c: BenchConfig, device: Device) -> dict[str, Any]:
    step = Step(c, device)
    step.run()  # the optimizer has no state before
    step.wait()
    folder = storage.join(c.home_folder, "bench-checkpoint")
    made = tokenizer.train(["a text to train a tokenizer on"], 257)
    found: dict[str, list[float]] = {"save": [], "load": [], "write": [], "step": []}
    size = 0
    try:
        for index in range(c.rounds + 1):
            started = time.perf_counter()
            path = checkpoint.save(folder, step.engine, TrainState(step=index), step.model, made)
            saved = time.perf_counter()
            checkpoint.verify(path)
            checkpoint.load_engine(path, step.engine)
            loaded = time.perf_counter()
            size = sum(info.size or 0 for info in storage.list_files(path))
            written = _write(folder, size)
            stepping = time.perf_counter()
            step.run()
            step.wait()
            ended = time.perf_counter()
            checkpoint.prune(folder, 1)
            if index:  # the first round warms up
                found["save"].append(saved - started)
                found["load"].append(loaded - saved)
                found["write"].append(written)
                found["step"].append(ended - stepping)
    finally:
        storage.delete_folder(folder)
    ratios = [a / b for a, b in zip(found["save"], found["write"], strict=True)]
    return {
        "device": device.description,
        "bytes": size,
        **{f"{key}_seconds": statistics.median(seconds) for key, seconds in found.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def _write(folder: str, size: int) -> float:
    """Seconds to write so many bytes and have them on the disk; a local folder's only."""
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
    ratios, size = result["ratios"], result["bytes"]
    return "\n".join(
        [
            f"device            {result['device']}",
            f"checkpoint        {size / 1e6:>10,.1f} MB",
            f"save              {result['save_seconds']:>10.2f} s  "
            f"{size / result['save_seconds'] / 1e6:,.0f} MB/s; training waits for it",
            f"bare write        {result['write_seconds']:>10.2f} s  "
            f"{size / result['write_seconds'] / 1e6:,.0f} MB/s, with fsync",
            f"  save / write    {result['ratio']:>10.2f}x  (median of {len(ratios)} rounds, "
            f"{min(ratios):.2f}x to {max(ratios):.2f}x)",
            f"verify and load   {result['load_seconds']:>10.2f} s",
            f"a training step   {result['step_seconds']:>10.2f} s",
        ]
    )
