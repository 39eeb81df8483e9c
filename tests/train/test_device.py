"""The device of a machine: the GPU by its name, the dtype, the peak that MFU is a share of."""

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manta.train import meter
from manta.train.objectives.next_token import NextToken
from manta.train.records.ledger import Ledger
from manta.train.records.logbook import Logbook
from manta.train.settings import TrainConfig
from manta.train.step import device
from manta.train.step.device import (
    GPU_PEAKS,
    Device,
    find_device,
    gpu_memory,
    gpu_peak,
    matmul_flops,
)

H100 = Device(torch.device("cuda", 0), "bf16", 700e12, "NVIDIA H100 80GB HBM3", 989e12)
CPU = Device(torch.device("cpu"), "fp32", 1e11, "CPU")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("A100-SXM4-40GB", 312e12),  # as drivers before 2021 spell it
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A30", 165e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181.05e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
    ],
)
def test_a_gpu_is_found_by_its_name(name: str, peak: float) -> None:
    assert gpu_peak(name) == peak


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GH200 480GB",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "Quadro RTX 6000",
        "NVIDIA A10-24Q",
        "NVIDIA GB200",
        "NVIDIA A100X",
        "Tesla T4",
        "Tesla V100-SXM2-16GB",
        "NVIDIA GeForce GTX 1080",
        "AMD Instinct MI300X",
    ],
)
def test_another_card_or_a_part_of_one_is_unknown(name: str) -> None:
    assert gpu_peak(name) is None


@given(name=st.sampled_from(sorted(GPU_PEAKS)), more=st.text(min_size=1, max_size=12))
def test_a_name_that_only_begins_as_a_known_one_is_unknown(name: str, more: str) -> None:
    assert gpu_peak(name + more) == GPU_PEAKS.get(name + more)


@pytest.fixture(autouse=True)
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is the first in its process to measure."""
    monkeypatch.setattr(device, "_probes", {})


def simulate(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """Makes PyTorch report a GPU where there is none."""
    found = SimpleNamespace(major=capability[0], minor=capability[1], name=name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    # V100 and T4 make tensors of bf16, and compute with them slowly.
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    monkeypatch.setattr(device, "matmul_flops", lambda dtype, device, size: 7e13)


@pytest.mark.parametrize(
    ("name", "capability", "wanted", "dtype", "sheet"),
    [
        ("Tesla V100-SXM2-16GB", (7, 0), "auto", "fp32", None),
        ("Tesla T4", (7, 5), "auto", "fp32", None),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "auto", "bf16", 312e12),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "fp32", "fp32", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), "auto", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), "auto", "bf16", None),
        ("NVIDIA H100 PCIe", (9, 0), "bf16", "bf16", 756e12),
    ],
)
def test_a_gpu_has_the_dtype_that_it_computes_in_and_its_data_sheets_peak(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    wanted: str,
    dtype: str,
    sheet: float | None,
) -> None:
    simulate(monkeypatch, name, capability)
    found = find_device(wanted, use_gpu=True, threads=torch.get_num_threads())
    assert (found.dtype, found.description, found.data_sheet) == (dtype, name, sheet)
    assert found.measured == 7e13 and found.peak == (sheet or 7e13)


def test_a_second_probe_never_lowers_what_was_measured() -> None:
    found = find_device("fp32", use_gpu=False, threads=1)
    assert found.data_sheet is None and found.peak == found.measured > 1e8
    assert found.probed_again().measured >= found.measured
    unreachable = dataclasses.replace(found, measured=1e18)
    assert unreachable.probed_again() == unreachable


def test_a_process_measures_twice_and_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([3e9] * 3 + [5e9] * 3)
    monkeypatch.setattr(device, "matmul_flops", lambda dtype, device, size: next(speeds))
    found = [find_device("fp32", use_gpu=False, threads=1).measured for _ in range(4)]
    assert found == [3e9, 5e9, 5e9, 5e9]


def test_a_better_second_probe_raises_what_was_measured_and_no_data_sheets_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "matmul_flops", lambda dtype, device, size: 750e12)
    again = H100.probed_again()
    assert (again.measured, again.peak) == (750e12, 989e12)
    unknown = dataclasses.replace(H100, data_sheet=None).probed_again()
    assert (unknown.measured, unknown.peak) == (750e12, 750e12)


# Memory and MFU in the records


def count_memory(monkeypatch: pytest.MonkeyPatch, **bytes_: int) -> list[torch.device]:
    """Makes PyTorch's allocator report these numbers; returns the devices whose peak was reset."""
    stats = {key.replace("__", ".all."): value for key, value in bytes_.items()}
    monkeypatch.setattr(torch.cuda.memory, "memory_stats", lambda device=None: stats)
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    return reset


STATS = {
    "allocated_bytes__current": 3 << 30,
    "reserved_bytes__current": 8 << 30,
    "allocated_bytes__peak": 7 << 30,
    "reserved_bytes__peak": 9 << 30,
}
GPU_MEMORY = {"memory_allocated": 3 << 30, "memory_reserved": 8 << 30, "memory_peak": 7 << 30}


def test_the_peak_of_a_gpus_memory_is_that_since_the_last_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reset = count_memory(monkeypatch, **STATS)
    assert gpu_memory(H100.torch_device) == GPU_MEMORY and reset == [H100.torch_device]
    assert gpu_memory(CPU.torch_device) == {} and len(reset) == 1


def logged(folder: Path, on: Device) -> tuple[list[dict[str, Any]], str]:
    """The records of two steps in metrics.jsonl, and the log line about them."""
    lines: list[str] = []
    logbook = Logbook(str(folder), lines.append, 0)
    step = {"lr": 1e-3, "grad_norm": 1.0, "data_wait_seconds": 0.0, "tokens_per_second": 1e4}
    records = [
        {
            "step": n,
            "loss": 3.0 - n,
            "tokens": 2048 * n,
            "step_seconds": 0.2,
            "mfu": mfu,
            "skipped_tokens": 0,
        }
        | {"fingerprint": 0, "mfu_of_measured": mfu * on.peak / on.measured, **step}
        for n, mfu in ((1, 0.4), (2, 0.42))
    ]
    run: Any = SimpleNamespace(
        device=on,
        config=TrainConfig(),
        objective=NextToken,
        ledger=Ledger(None, 0.0),
        log_fingerprint=False,
        may_skip=False,
    )
    meter._write(run, logbook, records, torch.zeros(2, 2, dtype=torch.int64))
    logbook.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()], lines[0]


def test_a_gpus_records_have_its_memory_and_its_line_both_mfus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    count_memory(monkeypatch, **STATS)
    records, line = logged(tmp_path, H100)
    assert all(record.items() >= GPU_MEMORY.items() for record in records)
    assert [r["loss"] for r in records] == [2.0, 1.0]
    assert " | MFU 41.0% (57.9% of the measured peak) | data wait " in line


def test_a_cpus_records_have_no_gpus_memory_and_its_line_one_mfu(tmp_path: Path) -> None:
    records, line = logged(tmp_path, CPU)
    assert not any(key.startswith("memory_") for record in records for key in record)
    assert " | MFU 41.0% | data wait " in line


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_product_and_memory_are_measured() -> None:
    found = find_device("auto", use_gpu=True, threads=1)
    assert found.measured > 1e11
    assert found.data_sheet is None or 0.2 < found.measured / found.data_sheet < 1.2
    gpu_memory(found.torch_device)
    kept = torch.zeros(1 << 20, device=found.torch_device)
    del kept
    memory = gpu_memory(found.torch_device)
    assert memory["memory_peak"] >= memory["memory_allocated"] + (4 << 20)
    assert gpu_memory(found.torch_device)["memory_peak"] == memory["memory_allocated"]
    assert matmul_flops("fp32", found.torch_device, 256) > 0


FAULTS = """
import resource, sys, threading
import torch
from manta.train.step.device import keep_freed_memory

def faults():
    for _ in range(20):  # an aligned block needs more than its size: the heap grows a few times
        torch.empty(50 << 20).fill_(1.0)  # 200 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(50 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    keep_freed_memory()
found = []
if sys.argv[2] == "thread":
    thread = threading.Thread(target=lambda: found.append(faults()))
    thread.start()
    thread.join()
else:
    found.append(faults())
print(found[0])
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="this system's malloc is not glibc's"
)
@pytest.mark.parametrize("where", ["main", "thread"])
def test_freed_memory_is_used_again_without_being_filled_by_the_system(where: str) -> None:
    """200 MB are 51,200 page faults. Also counted in a thread, as in Ray's workers."""

    def faults(kept: str) -> int:
        path = str(Path(__file__).parents[2] / "platform")
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, kept, where],
            env={**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    assert faults("as it is") > 5 * 50_000
    assert faults("kept") < 1_000
