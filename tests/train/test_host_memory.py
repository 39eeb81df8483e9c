"""Memory for copies: exactly as much as they need, in one block, kept for the next copy, and locked
for GPUs."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.train.checkpoints.host_memory import ALIGNMENT, HostMemory, Spec, layout

GPU = torch.device("cuda", 0)
few = settings(deadline=None, max_examples=50)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])


@given(st.lists(st.integers(0, 10_000)))
def test_pieces_are_apart_aligned_and_close_together(sizes: list[int]) -> None:
    starts, end = layout(sizes)
    assert len(starts) == len(sizes)
    assert all(start % ALIGNMENT == 0 for start in starts)
    stops = [start + size for start, size in zip(starts, sizes, strict=True)]
    assert all(stop <= start for stop, start in zip(stops, [*starts[1:], end], strict=False))
    assert end <= sum(sizes) + (ALIGNMENT - 1) * max(0, len(sizes) - 1)


def tensors(specs: list[tuple[tuple[int, ...], torch.dtype]], offset: int) -> dict[str, Any]:
    return {
        f"tensor {index}": (torch.arange(torch.Size(shape).numel()) + offset).view(shape).to(dtype)
        for index, (shape, dtype) in enumerate(specs)
    }


@few
@given(st.lists(st.tuples(shapes, dtypes), max_size=6))
def test_copies_are_equal_and_stay_in_their_places(
    specs: list[tuple[tuple[int, ...], torch.dtype]],
) -> None:
    memory, first = HostMemory(), tensors(specs, 0)
    memory.reserve({name: Spec.of(values) for name, values in first.items()})
    size = memory.size
    copies = {name: memory.copy(name, values) for name, values in first.items()}
    memory.wait()
    assert all(torch.equal(copies[name], first[name]) for name in first)
    assert all(copies[name].dtype == first[name].dtype for name in first)
    second = tensors(specs, 7)
    again = {name: memory.copy(name, values) for name, values in second.items()}
    assert all(torch.equal(copies[name], second[name]) for name in second)
    assert all(again[name].data_ptr() == copies[name].data_ptr() for name in second)
    assert memory.size == size and memory.problem is None


def test_what_was_not_reserved_has_a_place_of_its_own() -> None:
    memory = HostMemory()
    memory.reserve({"a": Spec.of(torch.zeros(8))})
    assert torch.equal(memory.copy("b", torch.ones(3)), torch.ones(3))
    grown = memory.copy("a", torch.ones(16))
    assert grown.shape == (16,) and memory.size == 4 * (8 + 3 + 16)


def test_a_copy_is_one_of_its_own_time() -> None:
    memory, values = HostMemory(), torch.zeros(4, requires_grad=True)
    copy = memory.copy("a", values)
    with torch.no_grad():
        values += 1
    assert torch.equal(copy, torch.zeros(4)) and not copy.requires_grad


class Cudart:
    """Stands for CUDA's runtime, which is missing here: locks memory with the system's own call."""

    def __init__(self, error: int = 0):
        self.error = error
        self.calls: list[tuple[str, int]] = []
        self._libc = ctypes.CDLL(None, use_errno=True)

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.calls.append(("register", size))
        if self.error:
            return self.error
        failed = self._libc.mlock(ctypes.c_void_p(pointer), ctypes.c_size_t(size))
        assert not failed, os.strerror(ctypes.get_errno())
        self._size = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        self.calls.append(("unregister", self._size))
        return int(self._libc.munlock(ctypes.c_void_p(pointer), ctypes.c_size_t(self._size)))

    def cudaGetErrorString(self, error: int) -> str:
        return {2: "out of memory"}[error]


SPECS = {
    "weight": Spec(torch.Size([1000, 300]), torch.float32, GPU),
    "its state": Spec(torch.Size([300_000]), torch.float32, GPU),
    "offloaded": Spec(torch.Size([5]), torch.float32, torch.device("cpu")),
}
LOCKED = 2 * 1_200_000


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cudart]:
    stand_in = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: stand_in)
    return stand_in


def locked_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmLck:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_what_gpus_copy_to_is_one_locked_block_of_its_size_until_it_is_given_back(
    cudart: Cudart,
) -> None:
    before, memory = locked_kilobytes(), HostMemory()
    memory.reserve(SPECS)
    assert memory.size == LOCKED + 20
    assert cudart.calls == [("register", LOCKED)]
    locked = locked_kilobytes() - before
    assert LOCKED <= 1024 * locked < LOCKED + 2 * os.sysconf("SC_PAGE_SIZE")
    assert memory.release() is None
    assert cudart.calls[1:] == [("unregister", LOCKED)]
    assert (locked_kilobytes(), memory.size) == (before, 0)
    assert memory.release() is None and len(cudart.calls) == 2


def test_memory_that_cannot_be_locked_serves_all_the_same_and_the_reason_is_kept(
    cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart.error = 2
    kernels: list[str] = []

    def ones(size: int, device: str) -> None:
        """CUDA gives an error that it has kept to the next kernel."""
        kernels.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", ones)
    memory = HostMemory()
    memory.reserve(SPECS)
    assert memory.problem == "out of memory" and kernels == ["cuda"]
    assert memory.size == LOCKED + 20
    assert memory.release() is None and cudart.calls == [("register", LOCKED)]
