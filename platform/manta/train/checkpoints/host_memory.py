"""Memory of the CPU for copies of tensors: as much as they need, and locked where a GPU copies.

A GPU copies while the CPU goes on only to memory that is locked in its place (pinned). torch's own
comes in powers of two, a piece for each tensor, and stays with the process: half as much again for
a GPT of 1.5 billion parameters. Here one block has room for all, and is given back at the end.
"""

import contextlib
import math
import mmap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch aligns what it allocates
PORTABLE = 1  # cudaHostRegisterPortable: locked to whichever GPU of the process copies there


class Spec(NamedTuple):
    """What a copy of a tensor takes."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(values: Tensor) -> "Spec":
        return Spec(values.shape, values.dtype, values.device)


class HostMemory:
    """Copies of tensors, by name, on the CPU; each is in the place of the last one of its name."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[Spec, Tensor]] = {}
        self._blocks: list[Tensor] = []
        self._locked: list[Tensor] = []
        self._copying: set[torch.device] = set()
        self.problem: str | None = None
        """Why some of it could not be locked: a GPU's copies to that are slower."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(block.nbytes for block in self._blocks)

    def reserve(self, specs: Mapping[str, Spec]) -> None:
        """Makes room for copies of such tensors: a block for those of GPUs, one for the others."""
        for on_gpu in (False, True):
            mine = {n: s for n, s in specs.items() if (s.device.type == "cuda") == on_gpu}
            if not mine:
                continue
            starts, size = layout(spec.size for spec in mine.values())
            block = allocate(size)
            self._blocks.append(block)
            if on_gpu:
                self._lock(block)
            for (name, spec), start in zip(mine.items(), starts, strict=True):
                view = block[start : start + spec.size].view(spec.dtype).view(spec.shape)
                self._places[name] = spec, view

    def copy(self, name: str, values: Tensor) -> Tensor:
        """The copy of `values`, which a GPU may still be making until `wait` returns."""
        spec = Spec.of(values)
        if name not in self._places or self._places[name][0] != spec:
            self.reserve({name: spec})
        if values.is_cuda:
            self._copying.add(values.device)
        return self._places[name][1].copy_(values.detach(), non_blocking=True)

    def wait(self) -> None:
        """Until the copies are made; to be called by the thread that has asked for them, as GPUs
        make them in its stream."""
        for device in self._copying:
            torch.cuda.current_stream(device).synchronize()
        self._copying.clear()

    def release(self) -> str | None:
        """Gives the memory back, once nobody holds the copies; what CUDA had against it."""
        problem = None
        for block in self._locked:
            problem = unlock(block) or problem
        self._locked.clear()
        self._blocks.clear()
        self._places.clear()
        return problem

    def _lock(self, block: Tensor) -> None:
        problem = lock(block)
        if problem is None:
            self._locked.append(block)
        self.problem = problem or self.problem


def layout(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where pieces of so many bytes begin in a block, each at a multiple of ALIGNMENT; and the
    bytes of the block."""
    starts, end = [], 0
    for size in sizes:
        starts.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = starts[-1] + size
    return starts, end


def allocate(size: int) -> Tensor:
    """A block of so many bytes (at least one), in whole pages of its own: what is locked is nothing
    else's, and it goes back to the system at once, whatever malloc keeps."""
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_DONTFORK"):  # Linux copies locked pages for each process that forks off
        pages.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(pages, dtype=torch.uint8)


def lock(block: Tensor) -> str | None:
    """Locks a block for the GPU of this thread; why it cannot be, or None: it is."""
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(block.data_ptr(), block.nbytes, PORTABLE)
    if int(error) == 0:
        return None
    # CUDA keeps the error for the next kernel to fail with; this one has it instead.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return str(cudart.cudaGetErrorString(error))


def unlock(block: Tensor) -> str | None:
    """Unlocks a block that `lock` has locked; what CUDA had against it."""
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostUnregister(block.data_ptr())
    return None if int(error) == 0 else str(cudart.cudaGetErrorString(error))
