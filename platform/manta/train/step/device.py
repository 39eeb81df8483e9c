"""What this machine computes with: device, threads, the dtype that is fast, peak and memory."""

import ctypes
import dataclasses
import os
import time
from typing import Literal

import torch

from manta.errors import ConfigError

# Two settings of glibc's malloc (malloc.h), and their value: a block of fewer bytes is kept when it
# is freed, and so many may lie idle at the end of the heap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BLOCK = (1 << 31) - 1

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBE_SECONDS = 0.3
# Sides of the matrices that are tried: small ones find a moment in which no other process is at
# work, large ones are enough for many threads. On the least of them bf16 is tried, which takes
# seconds for large ones where it is emulated.
CPU_SIZES = 256, 512, 1024
GPU_SIZE = 8192
# A GPU's products are queued for about so long before the host waits for them: the launch of the
# first one and the wait for the last one then hardly count.
GPU_ROUND_SECONDS = 0.02
BF16_SPEEDUP = 1.5  # bf16 costs precision: it has to bring at least this much

# FLOP/s of dense bf16 matrix products with fp32 accumulation, without sparsity. The names are
# CUDA's own, whole, without "NVIDIA ": what is called otherwise is another card (a "Laptop GPU", a
# "4090 D", a "Ti", a virtual GPU, a slice of a card that MIG makes), and is not in the table. V100
# and T4 are not either: they have no bf16.
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
    # doubles it: 1,979 for the SXM cards, 1,671 for the NVL ones)
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
    # GA102, Ada and RTX Blackwell white papers: half of what there is with fp16 accumulation
    "GeForce RTX 3090": 71e12,
    "GeForce RTX 4090": 165.2e12,
    "GeForce RTX 5090": 209.5e12,
}


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a worker trains."""

    torch_device: torch.device
    dtype: Literal["fp32", "bf16"]
    measured: float
    """FLOP/s that a large matrix product in `dtype` reached here."""
    description: str
    data_sheet: float | None = None
    """FLOP/s of matrix products in `dtype` by a GPU's data sheet; None: there is no figure, as for
    a CPU, for an unknown GPU or a part of one, and for fp32."""

    @property
    def peak(self) -> float:
        """FLOP/s that MFU is a share of: the data sheet's, or else what was measured."""
        return self.data_sheet or self.measured

    def probed_again(self) -> "Device":
        """With the better of two measurements: while a worker starts, so do others on the same
        machine."""
        measured = measured_flops(self.torch_device, self.dtype)
        return dataclasses.replace(self, measured=max(self.measured, measured))


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that a key `device=` names; auto is the GPU where torch can use one.

    Raises:
        ConfigError: `cuda` where torch has no GPU to use.
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
    """Sets the thread count and, for a CPU, what becomes of freed memory; finds device, dtype (for
    "auto") and how fast products are."""
    torch.set_num_threads(threads)
    if not use_gpu:
        keep_freed_memory()
    device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")
    dtype = choose_dtype(device) if dtype == "auto" else dtype
    name = torch.cuda.get_device_name(device) if use_gpu else f"CPU, {threads} threads"
    sheet = gpu_peak(name) if dtype == "bf16" else None
    return Device(device, dtype, measured_flops(device, dtype), name, sheet)  # type: ignore[arg-type]


def keep_freed_memory() -> None:
    """Has glibc keep what this process frees, for what it takes next. By itself it returns blocks
    of more than 32 MB to the system at once, such as a batch's logits, and each next one is filled
    page by page with zeros first: a third of a step's time for GPT-2 124M on two cores.

    Beyond 64 MB, it holds for the main thread, and in a process that was started with
    MALLOC_ARENA_MAX=1 for all. (Nothing is done where there is no glibc.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK)
        mallopt(M_TRIM_THRESHOLD, KEPT_BLOCK)


def make_deterministic() -> None:
    """Has this process compute the same bits on a GPU each time. Called before its first work.

    The attention of cuDNN is left out, whose backward pass adds in any order; FlashAttention's and
    the embedding's take other, slower ways by themselves.
    """
    # cuBLAS reads it when it starts, and torch refuses its products without.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(False)


def choose_dtype(device: torch.device) -> str:
    """bf16 where it is fast: on a GPU (the current one) that computes in it, which V100 and T4 only
    emulate; measured on a CPU, which may have the instructions and not the speed."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fp32, bf16 = (matmul_flops(dtype, device, CPU_SIZES[0]) for dtype in ("fp32", "bf16"))
    return "bf16" if bf16 > BF16_SPEEDUP * fp32 else "fp32"


def gpu_peak(name: str) -> float | None:
    """FLOP/s of a GPU's bf16 products by the name that CUDA gives it; None for one that is not in
    the table."""
    return GPU_PEAKS.get(name.removeprefix("NVIDIA "))


def measured_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s that dense matrix products reach."""
    sizes = CPU_SIZES if device.type == "cpu" else (GPU_SIZE,)
    return max(matmul_flops(dtype, device, size) for size in sizes)


def matmul_flops(dtype: str, device: torch.device, size: int) -> float:
    """FLOP/s of a square matrix product, the best of several."""
    # Random numbers: a GPU draws less power for zeros, and is faster than any training is.
    a = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    product = torch.empty_like(a)

    def seconds(products: int) -> float:
        """The time that one product takes, where so many are queued in a row."""
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(a, a, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / products

    begun = time.perf_counter()
    best, tries, products = seconds(1), 1, 1  # the first one loads the library, too
    if device.type == "cuda":
        products = max(1, round(GPU_ROUND_SECONDS / seconds(1)))
    while tries < 2 or (tries < 30 and time.perf_counter() - begun < PROBE_SECONDS):
        best = min(best, seconds(products))
        tries += 1
    return 2 * size**3 / best


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Bytes on the GPU: `memory_allocated` is what tensors hold, `memory_reserved` what PyTorch has
    taken for them, `memory_peak` the most that they held since the last call. Nothing on a CPU. The
    host keeps count of these: the GPU is not waited for."""
    if device.type == "cpu":
        return {}
    found = {
        "memory_allocated": torch.cuda.memory_allocated(device),
        "memory_reserved": torch.cuda.memory_reserved(device),
        "memory_peak": torch.cuda.max_memory_allocated(device),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return found


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
