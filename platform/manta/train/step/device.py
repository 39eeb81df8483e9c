"""What this machine computes with: device, threads, the faster dtype, peak and memory."""

import ctypes
import dataclasses
import os
import time
from pathlib import Path
from typing import Literal

import torch

from manta.errors import ConfigError

# Two parameters of glibc's malloc (malloc.h), and the value for both: smaller blocks than this many
# bytes are kept when they are freed, and up to this many bytes may lie idle at the heap's end.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BLOCK = (1 << 31) - 1

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBE_SECONDS = 0.3
# How often a process measures what it computes with: one measurement may be too low, and the next
# run in this process has the same device.
PROBES = 2
# Sides of the matrices that the probe multiplies: small ones fit into a moment in which no other
# process works, large ones occupy many threads. bf16 is compared with fp32 on the smallest only:
# where bf16 is emulated, large ones take seconds.
CPU_SIZES = 256, 512, 1024
GPU_SIZE = 8192
# The host queues products worth about this much GPU time before it waits for them: the launch of
# the first one and the wait for the last one then hardly count.
GPU_ROUND_SECONDS = 0.02
BF16_SPEEDUP = 1.5  # bf16 costs precision, so it must be at least this much faster

# FLOP/s of dense bf16 matrix products with fp32 accumulation, without sparsity. The keys are CUDA's
# full names without "NVIDIA ". A name with any difference is another card (a "Laptop GPU", a
# "4090 D", a "Ti", a virtual GPU, a MIG slice) and is not in the table. V100 and T4 are not in the
# table either: they have no bf16.
GPU_PEAKS = {
    # A10, A10G, A30 and A40 data sheets
    "A10": 125e12,
    "A10G": 70e12,
    "A30": 165e12,
    "A40": 149.7e12,
    # A100 data sheet and Ampere architecture white paper: SXM and PCIe alike
    "A100-SXM-80GB": 312e12,
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    # Hopper architecture white paper (SXM, PCIe); H100 and H200 data sheets (with sparsity, which
    # doubles the figure: 1,979 for the SXM cards, 1,671 for the NVL ones)
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H200": 989e12,
    "H200 NVL": 835.5e12,
    # HGX B200 data sheet (with sparsity: 4,500)
    "B200": 2250e12,
    # L4 (with sparsity: 242), L40 and L40S data sheets
    "L4": 121e12,
    "L40": 181.05e12,
    "L40S": 362.05e12,
    # GA102 and Ada white papers, for workstations
    "RTX A6000": 154.8e12,
    "RTX 6000 Ada Generation": 364.2e12,
    # GA102, Ada and RTX Blackwell white papers: half the rate with fp16 accumulation
    "GeForce RTX 3090": 71e12,
    "GeForce RTX 4090": 165.2e12,
    "GeForce RTX 5090": 209.5e12,
}


@dataclasses.dataclass(frozen=True)
class Device:
    """The device that a worker trains on, with its dtype and speed."""

    torch_device: torch.device
    dtype: Literal["fp32", "bf16"]
    measured: float
    """FLOP/s that a large matrix product in `dtype` reached on this device."""
    description: str
    data_sheet: float | None = None
    """FLOP/s of matrix products in `dtype` according to the GPU's data sheet. None: no figure is
    known, as for a CPU, an unknown GPU, a part of a GPU, and fp32."""

    @property
    def peak(self) -> float:
        """FLOP/s that count as an MFU of 1: the data sheet's figure, else the measured one."""
        return self.data_sheet or self.measured

    def probed_again(self) -> "Device":
        """Measures again, and returns this device with the better figure: the first measurement
        may be too low, as other workers start on the same machine at the same time."""
        measured = measured_flops(self.torch_device, self.dtype)
        return dataclasses.replace(self, measured=max(self.measured, measured))


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that the key `device=` names; auto is the GPU if torch can use one, else the CPU.

    Raises:
        ConfigError: `wanted` is "cuda" and torch can use no GPU.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device=cuda: torch {torch.__version__} finds no GPU on this machine (nvidia-smi "
            "shows whether the driver does; a CPU build of torch never will): set device=cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def find_device(dtype: str, use_gpu: bool, threads: int) -> Device:
    """Sets up this process for training, and returns its device.

    Sets the thread count and, on a CPU, keeps freed memory. Chooses the dtype if it is "auto", and
    measures the speed of matrix products.
    """
    torch.set_num_threads(threads)
    if not use_gpu:
        keep_freed_memory()
    device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")
    dtype = choose_dtype(device) if dtype == "auto" else dtype
    name = torch.cuda.get_device_name(device) if use_gpu else f"CPU, {threads} threads"
    sheet = gpu_peak(name) if dtype == "bf16" else None
    return Device(device, dtype, measured_flops(device, dtype), name, sheet)  # type: ignore[arg-type]


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that this process frees, and use it for the next allocations.

    By default, glibc returns freed blocks of more than 32 MB, such as a batch's logits, to the
    system at once, and the system fills each new block with zeros page by page. That took a third
    of a step's time for GPT-2 124M on two cores.

    Blocks of more than 64 MB are kept in the main thread only, or in all threads if the process was
    started with MALLOC_ARENA_MAX=1. (Without glibc, this does nothing.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK)
        mallopt(M_TRIM_THRESHOLD, KEPT_BLOCK)


def make_deterministic() -> None:
    """Makes this process compute the same bits on a GPU each time; call it before any GPU work.

    cuDNN's attention is disabled, as its backward pass adds in no fixed order. FlashAttention's and
    the embedding's backward passes switch to slower, deterministic algorithms by themselves.
    """
    # cuBLAS reads this variable when it starts; without it, torch refuses to use cuBLAS.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(False)


def choose_dtype(device: torch.device) -> str:
    """Returns "bf16" where bf16 is fast, else "fp32".

    The current GPU must support bf16 in hardware (V100 and T4 only emulate it). On a CPU the speed
    is measured, as a CPU may have the instructions without being fast.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fp32, bf16 = (matmul_flops(dtype, device, CPU_SIZES[0]) for dtype in ("fp32", "bf16"))
    return "bf16" if bf16 > BF16_SPEEDUP * fp32 else "fp32"


def gpu_peak(name: str) -> float | None:
    """FLOP/s of bf16 products of the GPU with this CUDA name; None if it is not in the table."""
    return GPU_PEAKS.get(name.removeprefix("NVIDIA "))


_probes: dict[tuple[str, str, int], list[float]] = {}
"""FLOP/s that `measured_flops` has measured, by device, dtype and number of threads."""


def measured_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s that dense matrix products reach on this device with this number of threads: the best
    of the first PROBES measurements of this process."""
    sizes = CPU_SIZES if device.type == "cpu" else (GPU_SIZE,)
    found = _probes.setdefault((str(device), dtype, torch.get_num_threads()), [])
    if len(found) < PROBES:
        found.append(max(matmul_flops(dtype, device, size) for size in sizes))
    return max(found)


def matmul_flops(dtype: str, device: torch.device, size: int) -> float:
    """FLOP/s of a square matrix product: the best of several measurements."""
    # Random numbers, not zeros: a GPU draws less power for zeros and runs faster than in training.
    a = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    product = torch.empty_like(a)

    def seconds(products: int) -> float:
        """Seconds for one product when this many are queued in a row."""
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(a, a, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / products

    begun = time.perf_counter()
    best, tries, products = seconds(1), 1, 1  # the first call also loads the library
    if device.type == "cuda":
        products = max(1, round(GPU_ROUND_SECONDS / seconds(1)))
    while tries < 2 or (tries < 30 and time.perf_counter() - begun < PROBE_SECONDS):
        best = min(best, seconds(products))
        tries += 1
    return 2 * size**3 / best


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes in use on the GPU; {} on a CPU.

    `memory_allocated` is what tensors occupy, `memory_reserved` what PyTorch has taken for them,
    and `memory_peak` the most that tensors occupied since the last call. The host keeps these
    counts, so this does not wait for the GPU.
    """
    if device.type == "cpu":
        return {}
    found = {
        "memory_allocated": torch.cuda.memory_allocated(device),
        "memory_reserved": torch.cuda.memory_reserved(device),
        "memory_peak": torch.cuda.max_memory_allocated(device),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return found


def reserved_memory(device: torch.device) -> int:
    """Bytes that PyTorch has taken on the GPU; 0 on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def host_memory() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # (not on Linux)
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(local_workers: int) -> int:
    """Compute threads of each of so many workers on this machine."""
    return max(1, available_cpus() // local_workers)
