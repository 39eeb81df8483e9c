"""What this machine computes with: device, threads, the dtype it is fast in, its peak."""

import dataclasses
import os
import re
import time
from typing import Literal

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBE_SECONDS = 0.3
# Sides of the matrices that are tried: small ones find a moment in which no other process is at
# work, large ones are enough for many threads. On the least of them bf16 is tried, which takes
# seconds for large ones where it is emulated.
CPU_SIZES = 256, 512, 1024
GPU_SIZE = 8192
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

    def probed_again(self) -> "Device":
        """With the better of two peaks: while a worker starts, so do others beside it."""
        peak = peak_of(self.torch_device, self.dtype)
        return dataclasses.replace(self, peak=max(self.peak, peak))


def find_device(dtype: str, use_gpu: bool, threads: int) -> Device:
    """Sets the thread count and finds device, dtype (for "auto") and peak."""
    torch.set_num_threads(threads)
    device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")
    dtype = choose_dtype(device) if dtype == "auto" else dtype
    description = torch.cuda.get_device_name(device) if use_gpu else f"CPU, {threads} threads"
    return Device(device, dtype, peak_of(device, dtype), description)  # type: ignore[arg-type]


def choose_dtype(device: torch.device) -> str:
    """bf16 where it is fast; measured on a CPU: it may have the instructions and not the speed."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fp32, bf16 = (matmul_flops(dtype, device, CPU_SIZES[0]) for dtype in ("fp32", "bf16"))
    return "bf16" if bf16 > BF16_SPEEDUP * fp32 else "fp32"


def peak_of(device: torch.device, dtype: str) -> float:
    """FLOP/s of dense matrix products: a GPU's from its data sheet, if that has one, or else what
    it reaches."""
    if device.type == "cpu":
        return max(matmul_flops(dtype, device, size) for size in CPU_SIZES)
    known = gpu_peak(torch.cuda.get_device_name(device)) if dtype == "bf16" else None
    return known or matmul_flops(dtype, device, GPU_SIZE)


def gpu_peak(name: str) -> float | None:
    """FLOP/s of a GPU by the name that CUDA gives it; None for one that is not in the table."""
    known = [key for key in GPU_PEAKS if re.search(rf"(?<!\w){key}(?!\d)", name)]
    return GPU_PEAKS[max(known, key=len)] if known else None


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
