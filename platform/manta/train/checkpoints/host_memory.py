"""CPU memory for copies of tensors: just as much as they need, and locked for copies from GPUs.

While the CPU continues, a GPU can copy only to memory that is locked in place (pinned). torch's own
pinned memory comes in powers of two, one piece for each tensor, and stays with the process: that is
half as much again for a GPT of 1.5 billion parameters. Here one block has room for all copies, and
goes back to the system at the end.
"""

import contextlib
import math
import mmap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch aligns what it allocates
PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU of the process


class Spec(NamedTuple):
    """The shape, dtype and source device of a tensor to copy."""

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
    """Copies of tensors on the CPU, by name. A new copy overwrites the last one of its name."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[Spec, Tensor]] = {}
        self._blocks: list[Tensor] = []
        self._locked: list[Tensor] = []
        self._copying: set[torch.device] = set()
        self.problem: str | None = None
        """The reason why some memory could not be locked (copies from a GPU to it are slower), or
        None."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(block.nbytes for block in self._blocks)

    def reserve(self, specs: Mapping[str, Spec]) -> None:
        """Makes room for copies of such tensors: a block for those on GPUs, one for the others."""
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
        """Copies `values` and returns the copy, which a GPU may still be making until `wait`
        returns."""
        spec = Spec.of(values)
        if name not in self._places or self._places[name][0] != spec:
            self.reserve({name: spec})
        if values.is_cuda:
            self._copying.add(values.device)
        return self._places[name][1].copy_(values.detach(), non_blocking=True)

    def wait(self) -> None:
        """Waits until the copies are made. The thread that asked for the copies must call this, as
        GPUs make them in that thread's stream."""
        for device in self._copying:
            torch.cuda.current_stream(device).synchronize()
        self._copying.clear()

    def release(self) -> str | None:
        """Gives the memory back; call this when nobody uses the copies any more. Returns CUDA's
        error, or None."""
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
    """Lays out pieces of these sizes in a block, each at a multiple of ALIGNMENT. Returns their
    starts, and the size of the block; all in bytes."""
    starts, end = [], 0
    for size in sizes:
        starts.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = starts[-1] + size
    return starts, end


def allocate(size: int) -> Tensor:
    """A block of `size` bytes (at least one) in whole pages of its own. Locking it locks nothing
    else, and it goes back to the system as soon as it is freed, whatever malloc keeps."""
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_DONTFORK"):  # Linux would copy locked pages for each forked process
        pages.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(pages, dtype=torch.uint8)


def lock(block: Tensor) -> str | None:
    """Locks a block for the GPU of this thread. Returns None, or the reason why that failed."""
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(block.data_ptr(), block.nbytes, PORTABLE)
    if int(error) == 0:
        return None
    # CUDA keeps the error, and the next kernel fails with it: this kernel takes that failure.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return str(cudart.cudaGetErrorString(error))


def unlock(block: Tensor) -> str | None:
    """Unlocks a block that `lock` has locked. Returns None, or CUDA's error."""
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostUnregister(block.data_ptr())
    return None if int(error) == 0 else str(cudart.cudaGetErrorString(error))
