"""Workers that ran out of memory: this is recognised, and their micro batch is halved."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import tiny
from manta.config import from_dict, to_dict
from manta.errors import TrainingError
from manta.failures import WorkersFailed
from manta.messages import Decided, Hanging
from manta.train import supervise
from manta.train.patience import GivenUp, is_out_of_memory
from manta.train.settings import PretrainConfig
from manta.train.supervise import Supervisor, less_memory

CUDA_TEXT = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
    "capacity of 79.10 GiB of which 1.06 GiB is free. Including non-PyTorch memory, this process "
    "has 78.03 GiB memory in use."
)

# What failed


@pytest.mark.parametrize(
    "text",
    [
        CUDA_TEXT,
        "torch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be "
        "asynchronously reported at some other API call",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/"
        "NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL "
        "version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 2 'out of memory'",
        "RuntimeError: Triton Error [CUDA]: out of memory",
        "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
        "OSError: [Errno 12] Cannot allocate memory",
        "RuntimeError: std::bad_alloc",
        "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.",
        "The actor died unexpectedly. Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: 1 "
        "worker(s) were killed due to the node running low on memory.",
    ],
)
def test_what_has_run_out_of_memory_is_recognised(text: str) -> None:
    assert is_out_of_memory(text)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(1 << 55),
        lambda: np.empty(1 << 55),
        lambda: bytearray(1 << 60),
    ],
    ids=["torch", "numpy", "python"],
)
def test_a_host_that_has_no_memory_left_is_recognised(ask: Callable[[], Any]) -> None:
    try:
        ask()
    except (RuntimeError, MemoryError):
        assert is_out_of_memory(traceback.format_exc().rpartition("\n    ")[2])
    else:
        pytest.fail("this machine has it")


@pytest.mark.parametrize(
    "text",
    [
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 147456, "
        "Hardware limit: 101376. Reducing block sizes or `num_stages` may help.",
        "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "Error while creating shared memory segment /dev/shm/nccl-gs9Xz1 (size 9637888), error: "
        "No space left on device (28)",
        "ray.exceptions.ObjectStoreFullError: The local object store is full of objects that are "
        "still in scope and cannot be evicted. Tip: Use the `ray memory` command",
        "The actor died because its worker process has died. Worker exit type: SYSTEM_ERROR Worker "
        "exit detail: Worker unexpectedly exits with a connection error code 2. End of file. Some "
        "common causes include: (1) the process was killed by the OOM killer due to high memory "
        "usage, (2) ray stop --force was called",
        'if c.out_of_memory == "halve"',
    ],
)
def test_what_is_only_about_memory_is_something_else(text: str) -> None:
    assert not is_out_of_memory(text)


# What runs next


def gpt2(**keys: Any) -> PretrainConfig:
    """GPT-2 124M as it is trained: 512 sequences per batch, a number with many divisors."""
    model = {"preset": "gpt2-124m"}
    return from_dict(PretrainConfig, {"model": model, "tokens_per_batch": 524288, **keys})


@pytest.mark.parametrize(
    ("keys", "ran", "next_size"),
    [
        ({"micro_batch_size": None}, 16, 8),  # not half of 512, the largest that divides
        ({"micro_batch_size": "auto"}, 64, 32),
        ({"micro_batch_size": "auto", "memory_per_worker": 40.0}, 32, 16),
        ({"micro_batch_size": 32}, 32, 16),
        ({"micro_batch_size": None, "num_workers": 8}, 16, 8),
        ({"tokens_per_batch": 1024 * 15}, 15, 5),
    ],
)
def test_the_next_size_is_half_of_what_ran(keys: dict[str, Any], ran: int, next_size: int) -> None:
    less = less_memory(gpt2(**keys), ran, "why")
    assert less.micro_batch_size == next_size
    assert less.tokens_per_batch == gpt2(**keys).tokens_per_batch


@settings(deadline=None, max_examples=50)
@given(
    share=st.integers(1, 64),
    workers=st.lists(st.integers(1, 4), min_size=2, max_size=2).map(sorted),
    ran=st.integers(2, 64),
)
def test_the_next_size_divides_the_batch_of_any_number_of_workers(
    share: int, workers: list[int], ran: int
) -> None:
    sequences = share * np.lcm.reduce(range(workers[0], workers[1] + 1))
    c = gpt2(num_workers=tuple(workers), tokens_per_batch=1024 * int(sequences))
    less = less_memory(c, ran, "why")
    assert from_dict(PretrainConfig, to_dict(less)) == less
    shares = [int(sequences) // n for n in range(workers[0], workers[1] + 1)]
    fit = [n for n in range(1, ran // 2 + 1) if all(s % n == 0 for s in shares)]
    assert less.micro_batch_size == fit[-1]


@pytest.mark.parametrize(
    ("keys", "ran", "words"),
    [
        ({"gpus_per_worker": 1}, 1, "first: num_workers=4 zero_stage="),
        (
            {"out_of_memory": "stop"},
            16,
            "clearly less, the cheapest first: micro_batch_size=",
        ),
        ({"out_of_memory": "stop"}, 16, "; or set out_of_memory=halve"),
    ],
)
def test_where_nothing_smaller_may_run_it_is_said_what_needs_less(
    keys: dict[str, Any], ran: int, words: str
) -> None:
    with pytest.raises(TrainingError) as caught:
        less_memory(gpt2(**keys), ran, "CUDA out of memory")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert f"by the cost model micro_batch_size={ran} needs" in str(caught.value)


# How often

Attempt = tuple[int | None, Exception]


def supervised(
    c: PretrainConfig, monkeypatch: pytest.MonkeyPatch, failures: list[Callable[[], Attempt]]
) -> tuple[list[Any], list[str], str]:
    """Runs workers that report the size they decide on and then fail; returns the sizes they were
    started with, the lines, and the error at the end."""
    sizes: list[Any] = []
    lines: list[str] = []

    def fail(worker: Any, arguments: Any, c: PretrainConfig, say: Any, callbacks: Any) -> None:
        decided, error = failures[len(sizes)]()
        sizes.append(c.micro_batch_size)
        say("starting")
        if decided is not None:
            say(Decided(c.micro_batch if isinstance(c.micro_batch_size, int) else decided))
        raise error

    monkeypatch.setattr(supervise, "fit", fail)
    with pytest.raises((TrainingError, GivenUp)) as caught:
        Supervisor(c, (), lines.append, list).run()
    return sizes, lines, str(caught.value)


@pytest.mark.usefixtures("ray_session")
def test_halving_is_no_failure_that_counts_and_ends_with_single_sequences(
    monkeypatch: pytest.MonkeyPatch, prepared: Path, corpus: Path
) -> None:
    keys = ["name=halved", "tokens_per_batch=2048", "max_failures=0", "micro_batch_size=auto"]
    c = tiny(prepared, corpus, *keys)
    failing = [lambda: (16, WorkersFailed(CUDA_TEXT))] * 5
    sizes, lines, end = supervised(c, monkeypatch, failing)
    assert sizes == ["auto", 8, 4, 2, 1] and "model micro_batch_size=1 needs" in end
    said = "with micro batches of 16 sequences: continuing with 8, more of them per step"
    assert any(said in line for line in lines)
    assert lines.count("starting") == 5 and all(isinstance(line, str) for line in lines)


@pytest.mark.usefixtures("ray_session")
def test_without_memory_for_a_start_a_run_ends_as_with_other_failures(
    monkeypatch: pytest.MonkeyPatch, prepared: Path, corpus: Path
) -> None:
    """Workers that fail before they decide on a size would not need less memory with another
    one."""
    c = tiny(prepared, corpus, "name=start", "tokens_per_batch=2048", "max_failures=1")
    failing = [
        lambda: (16, WorkersFailed(CUDA_TEXT)),
        *[lambda: (None, WorkersFailed(CUDA_TEXT))] * 2,
    ]
    sizes, _, end = supervised(c, monkeypatch, failing)
    assert sizes == [None, 8, 8] and "CUDA out of memory" in end


@pytest.mark.parametrize("ranks", [1, 3, 4, 4096])
def test_of_many_ranks_that_hang_a_few_are_named_and_all_are_counted(
    tmp_path: Path, ranks: int
) -> None:
    said: list[str] = []
    it = Supervisor(tiny(tmp_path, tmp_path), (), said.append, list)
    for rank in range(ranks):
        it.hear(Hanging(rank, 600.0, f"stacks/rank-{rank}.txt"))
    it.hear("the workers failed")
    assert said[0] == "rank 0 has made no progress for 600 s: its stacks are in stacks/rank-0.txt"
    assert len(said) == min(ranks, 3) + (ranks > 3) + 1
    if ranks > 3:
        assert f"{ranks - 3:,} more ranks have made no progress" in said[-2]
    it.hear(Hanging(5, 600.0, "stacks/rank-5.txt"))
    assert said[-1].startswith("rank 5 has made no progress")
