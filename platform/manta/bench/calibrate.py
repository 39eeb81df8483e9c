"""Measures how fast this machine does each kind of work in a training step, and keeps it.

Whole steps of small models of many shapes are timed with Manta's own engine, and so are their
forward passes. `plan/calibration.py` fits seconds to them and keeps them in the home, where
`jobs/plan.py` finds them. The rounds go through all shapes in turn, so that a busy moment does not
fall on one shape alone. The figures are those of a machine that does nothing else: with one worker
of one thread, the median of that thread's CPU time; else the time that a tenth of the steps did not
take.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from manta import config as configs
from manta import ownership, storage
from manta.bench.settings import BenchConfig
from manta.model.activations import DeviceType
from manta.plan import calibration
from manta.plan.work import Shape, of_micro_batch, of_step
from manta.train.alone import Step, together
from manta.train.settings import PretrainConfig
from manta.train.step.device import Device, available_cpus, find_device

SHAPES = (
    Shape(1, 64, 64, 512, 4),
    Shape(4, 64, 128, 512, 8),
    Shape(2, 128, 256, 1024, 4),
    Shape(8, 128, 64, 512, 4),
    Shape(2, 256, 64, 4096, 4),
    Shape(2, 256, 256, 4096, 8, optimizer="muon"),
    Shape(4, 256, 256, 512, 4, 2),
    Shape(2, 128, 1024, 512, 2),
    Shape(6, 256, 512, 2048, 1, 2),
    Shape(1, 256, 128, 16384, 4),
    Shape(1, 512, 128, 8192, 2, 2),
    Shape(3, 384, 256, 4096, 2, optimizer="muon"),
    Shape(4, 384, 128, 1024, 4, family="gpt2"),
    Shape(6, 512, 64, 512, 1),
    Shape(2, 512, 256, 1024, 2, optimizer="muon"),
    Shape(4, 512, 256, 2048, 2, family="gpt2"),
)
SECONDS_OF_A_SHAPE = 0.4  # in a round
DISK_BYTES = 256 << 20


def calibrate(c: BenchConfig) -> dict[str, Any]:
    """Measures, and keeps the calibration in the config's home."""
    workers = c.most_workers
    backend = "nccl" if c.gpus_per_worker else "gloo"
    threads = c.threads_per_worker or max(1, available_cpus() // workers)
    settings = (workers, bool(c.gpus_per_worker), threads, c.dtype, c.rounds)
    found = together(workers, backend, _measure, *settings)
    works, times = found["works"], found["times"]
    errors = calibration.left_out(works, times)
    entry = calibration.Layout(
        workers=workers,
        device=found["device"],
        dtype=found["dtype"],
        measured=calibration.now(),
        step=calibration.fit(works, times),
        forward=calibration.fit(found["forward_works"], found["forward_times"]),
        median_error=statistics.median(errors),
        worst_error=max(errors),
        busy=found["busy"],
    )
    speed = _write_speed(c.home_folder)
    path = calibration.keep(c.home_folder, entry, speed)
    return {
        "layout": dataclasses.asdict(entry), "kept": path, "errors": errors,
        "write_bytes_per_second": speed, "step_seconds": times,
        "shapes": [dataclasses.asdict(shape) for shape in SHAPES],
    }  # fmt: skip


def _measure(workers: int, on_gpu: bool, threads: int, dtype: str, rounds: int) -> dict[str, Any]:
    device = find_device(dtype, on_gpu, threads)
    kind: DeviceType = "cuda" if on_gpu else "cpu"
    times: list[list[float]] = [[] for _ in SHAPES]
    forwards: list[list[float]] = [[] for _ in SHAPES]
    wall = cpu = 0.0
    works, forward_works, steps = [], [], []
    for shape in SHAPES:
        tree = {**shape.keys(workers), "gpus_per_worker": int(on_gpu)}
        c = configs.from_dict(PretrainConfig, tree)
        step = Step(c, device)
        step.run()
        steps.append(step)
        made = (c, step.model, shape.micro_batch, device.dtype, kind)
        works.append(of_step(*made))
        once = of_micro_batch(c, step.model, shape.micro_batch, device.dtype, kind)
        forward_works.append(once)
    clock, share = time.perf_counter, 0.1
    if kind == "cpu" and threads == workers == 1:
        clock, share = time.thread_time, 0.5
    for _ in range(rounds):
        for i, step in enumerate(steps):
            begun, used = time.perf_counter(), time.process_time()
            times[i] += _timed(step, device, step.run, clock)
            forwards[i] += _timed(step, device, lambda step=step: _forward(step), clock, 0.25)
            wall += time.perf_counter() - begun
            cpu += time.process_time() - used
    return {
        "device": device.description,
        "dtype": device.dtype,
        "works": works,
        "times": [float(np.quantile(t, share)) for t in times],
        "forward_works": forward_works,
        "forward_times": [float(np.quantile(t, share)) for t in forwards],
        "busy": wall * threads / cpu if kind == "cpu" else 1.0,
    }


def _timed(
    step: Step, device: Device, run: Any, clock: Callable[[], float], share: float = 1.0
) -> list[float]:
    """Seconds by `clock` of each call in about SECONDS_OF_A_SHAPE, as many on all workers."""
    found: list[float] = []
    left = torch.tensor(1.0, device=device.torch_device)
    begun = time.perf_counter()
    while float(left):
        started = clock()
        run()
        step.wait()
        found.append(clock() - started)
        left.fill_(float(time.perf_counter() - begun < share * SECONDS_OF_A_SHAPE))
        if dist.get_world_size() > 1:
            dist.broadcast(left, 0)
    return found


def _forward(step: Step) -> None:
    """A forward pass of one micro batch, as an evaluation has it."""
    tokens, targets = step.batch.to(step.device.torch_device)
    with step.engine.evaluating():
        step.engine(tokens, targets, reduction="none")


def _write_speed(home: str) -> float:
    """Bytes a second of a large file that is written to the home, until it is on the disk."""
    data = np.random.default_rng(0).integers(256, size=DISK_BYTES, dtype=np.uint8).tobytes()
    with ownership.scratch(home, "bench-calibrate") as folder:
        started = time.perf_counter()
        storage.write_bytes(storage.join(folder, "data"), data)
        if storage.is_local(folder):
            os.sync()
        return DISK_BYTES / (time.perf_counter() - started)


def table(result: dict[str, Any]) -> str:
    entry = result["layout"]
    return "\n".join(
        [
            f"{entry['workers']} worker(s), each {entry['device']}, {entry['dtype']}; wall time "
            f"{entry['busy']:.2f} times the threads' CPU time (1: nothing else ran)",
            *calibration.table(entry),
            f"{len(SHAPES)} shapes, each predicted from the others: median error "
            f"{entry['median_error']:.1%}, worst {entry['worst_error']:.1%}",
            f"disk of the home  {result['write_bytes_per_second'] / 1e6:,.0f} MB/s",
            f"kept in {result['kept']}",
        ]
    )
