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

import torch
import torch.distributed as dist

from manta import storage
from manta.bench.memory import peak_resident
from manta.bench.settings import BenchConfig
from manta.model.cost import flops_per_token
from manta.model.families import num_parameters
from manta.train.alone import Step, together
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
    flops = flops_per_token(step.model, c.sequence_length, c.trainable, c.lora)
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
