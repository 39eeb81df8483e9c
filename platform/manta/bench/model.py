"""Measures the training step alone: engine and model, without Ray and without a stream of data.

It needs only torch and DeepSpeed. Whole steps are timed as they run. The parts of a step are timed
in separate steps, which wait for the device after each part. Communication, which is part of the
backward pass and of the optimizer, is taken from a profile of one more step.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from manta import storage
from manta.bench.memory import peak_resident
from manta.bench.settings import BenchConfig
from manta.bench.workers import together
from manta.model.cost import flops_per_token
from manta.model.gpt import num_parameters
from manta.train.build import build, compiles, micro_batch
from manta.train.objectives.next_token import Batch
from manta.train.step.device import Device, available_cpus, find_device, make_deterministic

PARTS = ("data", "forward", "backward", "optimizer")
TRACE = "trace.json"


def model(c: BenchConfig) -> dict[str, Any]:
    """Times steps of the config's model on this machine, in `num_workers` processes."""
    return on_workers(c, _measure)


def on_workers(
    c: BenchConfig, measure: Callable[[BenchConfig, Device], dict[str, Any]]
) -> dict[str, Any]:
    """Runs `measure` in `num_workers` processes on this machine; returns the first one's result."""
    backend = "nccl" if c.gpus_per_worker else "gloo"
    c = dataclasses.replace(c, num_workers=c.most_workers)
    return together(c.workers, backend, in_worker, c, measure)


def in_worker(c: BenchConfig, measure: Callable[[BenchConfig, Device], Any]) -> Any:
    """Calls `measure(c, device)` with this worker's device, which it sets up."""
    threads = c.threads_per_worker or max(1, available_cpus() // c.workers)
    if c.deterministic:
        make_deterministic()
    return measure(c, find_device(c.dtype, bool(c.gpus_per_worker), threads))


class Step:
    """One optimizer step over random tokens, made of the same parts as in the training loop."""

    def __init__(self, c: BenchConfig, device: Device):
        self.model, self.device = c.expected_model, device
        self.compiled = compiles(c, self.model, device)
        self.size = micro_batch(c, self.model, device, c.workers, self.compiled)
        c = dataclasses.replace(c, micro_batch_size=self.size)
        self.accum = c.grad_accum_steps(c.total_steps)
        self.grad_clip = c.optimizer.grad_clip
        self.engine = build(
            c, self.model, device, size=self.size, steps=self.accum, compiled=self.compiled
        )
        assert self.model.vocab_size is not None
        shape = (self.size, c.sequence_length + 1)
        ids = np.random.default_rng(c.seed).integers(self.model.vocab_size, size=shape)
        self.batch = Batch(ids)

    def run(self, timed: Callable[[str], None] = lambda _: None) -> Tensor:
        """Runs the step. Returns the loss of the last micro batch, still on the device."""
        with self.engine.casting_once():
            for index in range(self.accum):
                tokens, targets = self.batch.to(self.device.torch_device)
                timed("data")
                loss = self.engine(tokens, targets)
                timed("forward")
                self.engine.backward(loss, is_last=index == self.accum - 1)
                timed("backward")
        self.engine.step(self.grad_clip)
        timed("optimizer")
        return loss.detach()

    def wait(self) -> None:
        if self.device.torch_device.type == "cuda":
            torch.cuda.synchronize()


def _measure(c: BenchConfig, device: Device) -> dict[str, Any]:
    step = Step(c, device)
    started = time.perf_counter()
    step.run()
    step.wait()
    first = time.perf_counter() - started
    step.run()
    seconds, parts, communication = [], [], []
    for _ in range(c.rounds):
        step.wait()
        started = time.perf_counter()
        for _ in range(c.steps_per_round):
            loss = step.run()
        step.wait()
        seconds.append((time.perf_counter() - started) / c.steps_per_round)
        parts.append(_parts(step))
        communication.append(communication_seconds(step))
    typical = statistics.median(seconds)
    flops = flops_per_token(step.model, c.sequence_length)
    tokens = step.accum * step.size * c.sequence_length * c.workers
    found = {
        "device": device.description,
        "dtype": device.dtype,
        "parameters": num_parameters(step.model),
        "compiled": step.compiled,
        "workers": c.workers,
        "tokens_per_step": tokens,
        "micro_batch_size": step.size,
        "seq_len": c.sequence_length,
        "loss": float(loss),
        "first_step_seconds": first,
        "step_seconds": typical,
        "step_seconds_of_rounds": seconds,
        "part_seconds": {k: statistics.median(p[k] for p in parts) for k in PARTS},
        "communication_seconds": statistics.median(communication),
        "tokens_per_second": tokens / typical,
        "mfu": tokens / typical * flops / device.peak / c.workers,
        "mfu_of_measured": tokens / typical * flops / device.measured / c.workers,
        "peak_flops": device.peak * c.workers,
        "measured_flops": device.measured * c.workers,
        "peak_memory_bytes": _peak_memory(device),
    }
    if c.profile:
        found["trace"] = _trace(c, step)
    return found


def _parts(step: Step) -> dict[str, float]:
    """Seconds of each part of one step."""
    found = dict.fromkeys(PARTS, 0.0)
    step.wait()
    last = time.perf_counter()

    def timed(part: str) -> None:
        nonlocal last
        step.wait()
        now = time.perf_counter()
        found[part] += now - last
        last = now

    step.run(timed)
    return found


def _profiled(step: Step) -> torch.profiler.profile:
    """A profile of one step."""
    with torch.profiler.profile() as profile:
        step.run()
        step.wait()
    return profile


def communication_seconds(step: Step) -> float:
    """Seconds of one step that this worker spent reducing, gathering, or waiting for others."""
    if dist.get_world_size() == 1:
        return 0.0
    found = _profiled(step).key_averages()
    if step.device.torch_device.type == "cuda":
        return sum(e.device_time_total for e in found if e.key.startswith("nccl")) / 1e6
    return sum(e.cpu_time_total for e in found if e.key.startswith("gloo:")) / 1e6


def _peak_memory(device: Device) -> int:
    """Peak bytes of the GPU's tensors; on a CPU, of the process with all its libraries."""
    if device.torch_device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident()


def _trace(c: BenchConfig, step: Step) -> str:
    """Writes a trace of one step of the first worker, which Perfetto (ui.perfetto.dev) opens.
    Returns its path."""
    profile = _profiled(step)
    path = storage.join(c.home_folder, "bench-model", TRACE)
    if dist.get_rank():
        return path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / TRACE
        profile.export_chrome_trace(str(file))
        storage.write_bytes(path, file.read_bytes())
    return path


def table(result: dict[str, Any]) -> str:
    shares = result["part_seconds"]
    whole = sum(shares.values())
    how = ", compiled" if result["compiled"] else ""
    lines = [
        f"device            {result['device']}, {result['dtype']}{how}",
        f"model             {result['parameters'] / 1e6:,.1f}M parameters, sequences of "
        f"{result['seq_len']}, micro batches of {result['micro_batch_size']}, "
        f"{result['workers']} worker(s)",
        f"step              {result['step_seconds'] * 1e3:>10,.1f} ms for "
        f"{result['tokens_per_step']:,} tokens",
        *(
            f"  {part:<14}  {seconds * 1e3:>10,.1f} ms  {seconds / whole:>6.1%}"
            for part, seconds in shares.items()
        ),
        f"  communication   {result['communication_seconds'] * 1e3:>10,.1f} ms  in these, with "
        "the wait for the slowest worker",
        f"speed             {result['tokens_per_second']:>10,.0f} tok/s",
        f"MFU               {result['mfu']:>10.1%}  of {result['peak_flops'] / 1e12:,.2f} TFLOP/s, "
        "the peak (a GPU's by its data sheet, if it is a known one)",
        f"MFU of measured   {result['mfu_of_measured']:>10.1%}  of "
        f"{result['measured_flops'] / 1e12:,.2f} TFLOP/s, which a matrix product reached here",
        f"peak memory       {result['peak_memory_bytes'] / 2**30:>10.2f} GiB",
        f"first step        {result['first_step_seconds']:>10.1f} s",
    ]
    if "trace" in result:
        lines.append(f"trace             {result['trace']}  (open it at ui.perfetto.dev)")
    return "\n".join(lines)
