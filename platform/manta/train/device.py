"""What this machine computes with: device, threads, the dtype it is fast in, its peak."""

import dataclasses
import functools
import os
import re
import time
from typing import Literal

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBE_SECONDS = 1.0
SMALL, LARGE = 128, 1024  # sides of the matrices that are tried
BF16_SPEEDUP = 1.5  # bf16 costs precision: it has to bring at least this much

# Dense bf16 matrix peaks without sparsity, FLOP/s, from NVIDIA's data sheets and architecture white
# papers (GeForce: with fp32 accumulation).
GPU_PEAKS = {
    "A10": 125e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "B200": 2250e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
    "RTX A6000": 154.8e12,
}


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a worker trains. peak: FLOP/s of dense matrix products in `dtype`."""

    torch_device: torch.device
    dtype: Literal["fp32", "bf16"]
    peak: float
    description: str


def find_device(dtype: str, use_gpu: bool, threads: int) -> Device:
    """Sets the thread count and finds device, dtype (for "auto", by a probe) and peak."""
    torch.set_num_threads(threads)
    if use_gpu:
        device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
        peak = gpu_peak(name)
        chosen = (
            ("bf16" if torch.cuda.is_bf16_supported() else "fp32") if dtype == "auto" else dtype
        )
        if peak is None or chosen == "fp32":
            peak = matmul_flops(chosen, device, 8192)
        return Device(device, chosen, peak, name)  # type: ignore[arg-type]
    device = torch.device("cpu")
    if dtype == "auto":
        dtype = "bf16" if cpu_is_fast_in_bf16() else "fp32"
    return Device(device, dtype, cpu_peak(dtype), f"CPU, {threads} threads")  # type: ignore[arg-type]


def gpu_peak(name: str) -> float | None:
    """FLOP/s of a GPU by the name that CUDA gives it; None for one that is not in the table."""
    known = [key for key in GPU_PEAKS if re.search(rf"(?<!\w){key}(?!\d)", name)]
    return GPU_PEAKS[max(known, key=len)] if known else None


def cpu_is_fast_in_bf16() -> bool:
    """Measured, not looked up: a processor may have the instructions and not the speed."""
    cpu = torch.device("cpu")
    # One that only emulates it, forty times slower, would take seconds for large matrices.
    small = {dtype: matmul_flops(dtype, cpu, SMALL) for dtype in DTYPES}
    return small["bf16"] > small["fp32"] and cpu_peak("bf16") > BF16_SPEEDUP * cpu_peak("fp32")


@functools.cache
def cpu_peak(dtype: str) -> float:
    return matmul_flops(dtype, torch.device("cpu"), LARGE)


def matmul_flops(dtype: str, device: torch.device, size: int) -> float:
    """FLOP/s of a square matrix product, the best of several."""
    a = torch.randn(size, size, device=device).to(DTYPES[dtype])
    best, tries, begun = float("inf"), 0, time.perf_counter()
    while tries < 2 or (tries < 30 and time.perf_counter() - begun < PROBE_SECONDS):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for a GPU
        best = min(best, time.perf_counter() - started)
        tries += 1
    return 2 * size**3 / best


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
