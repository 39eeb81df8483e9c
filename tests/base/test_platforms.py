"""Platforms other than Linux: what a Mac or an odd filesystem lacks is taken away here.

Nothing here has run on a Mac: what differs there is simulated, one thing at a time.
"""

import ctypes
import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.common import ROOT
from manta import lock, storage
from manta.bench import memory, stages
from manta.cluster import capacity
from manta.errors import ClusterError, DataError
from manta.train.step import device

# DeepSpeed calls this to find a Mac's GPU; here the call would fail.
MAC = "import torch.mps; torch.mps.current_allocated_memory = lambda: 0"
ENGINE = f"""
{MAC}
torch.backends.mps.is_available = lambda: True
import torch.distributed as dist
from manta.model.gpt import GPT, ModelConfig
from manta.train.step.device import find_device, pick_device
from manta.train.step.engine import Engine
from manta.train.step.optimizer import OptimizerConfig

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
found = find_device("fp32", False, 1)
assert pick_device("auto").type == found.torch_device.type == "cpu"
model = GPT(ModelConfig(n_layer=1, n_embd=32, n_head=2, vocab_size=128))
engine = Engine(
    model, OptimizerConfig(), found, zero_stage=1, micro_batch_size=1, grad_accum_steps=1
)
from deepspeed.accelerator import get_accelerator
weights = {{weight.device.type for weight in model.parameters()}}
print(get_accelerator().device_name(), engine.device.type, weights)
"""


def run(code: str, **env: str) -> str:
    """The last line that this Python code prints, in a process of its own."""
    clean = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": str(ROOT / "platform"), "LOCAL_RANK": "0", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_training_stays_on_the_cpu_where_deepspeed_would_take_a_macs_gpu() -> None:
    code = f"{MAC}; import deepspeed; print(deepspeed.get_accelerator().device_name())"
    assert run(code) == "mps"
    assert run(ENGINE) == "cpu cpu {'cpu'}"


def test_deepspeed_is_not_imported_before_the_engine_says_for_which_device() -> None:
    assert run("import sys, manta.train.worker; print('deepspeed' in sys.modules)") == "False"


def test_off_linux_ray_ends_its_processes_by_their_group_and_manta_leaves_it_that() -> None:
    code = """
import os, sys
import manta.storage  # whose libraries ask for the platform, too
calls = []
os.register_at_fork = lambda **hooks: calls.extend(hook.__module__ for hook in hooks.values())
sys.platform = "{}"
import manta.cluster.connection
print(calls.count("manta.cluster.connection"))
"""
    assert (run(code.format("darwin")), run(code.format("linux"))) == ("0", "1")


def test_a_macs_gpu_which_ray_counts_is_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ClusterError, match=r"CUDA, which a Mac's lacks.*gpus_per_worker=0"):
        capacity.require(1, cpus=1.0, gpus=1, wait_seconds=0.0)


def test_without_affinities_all_cpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert device.available_cpus() == os.cpu_count()


def test_memory_is_counted_where_no_process_tells_what_it_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "COUNTED_ONCE", False)
    held = bytearray(os.urandom(1 << 20) * 64)
    assert memory.total_memory() > len(held)
    with memory.MemoryWatch() as watch:
        pass
    assert watch.peak > len(held)


def test_the_peak_is_in_bytes_though_a_mac_says_it_in_bytes_and_linux_in_kib(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for platform, unit in (("linux", 1024), ("darwin", 1)):
        monkeypatch.setattr(sys, "platform", platform)
        assert said * unit <= memory.peak_resident() < (said + (1 << 20)) * unit


def test_what_glibc_alone_has_is_left_out_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    stages.return_freed_memory()
    assert stages._process_bytes() > 1 << 20


# --- files ---------------------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    """Stands for flock on a filesystem that has no locks."""

    def flock(file: Any, how: int) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("reason", [errno.ENOTSUP, errno.ENOSYS])
def test_a_filesystem_without_locks_has_leases(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, reason)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    path = tmp_path / "folder" / "x.lock"
    said: list[str] = []
    with lock.lock(str(path), "preparing x", said.append):
        assert said == []  # its own new file is no lease of somebody else
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with (
            pytest.raises(DataError, match=f"process {os.getpid()} on .* is using it"),
            lock.lock(str(path), "preparing x"),
        ):
            raise AssertionError("two have it")
    with lock.lock(str(path), "preparing x"):
        pass


def test_a_lock_service_that_is_down_is_one_line_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, errno.ENOLCK)
    with (
        pytest.raises(DataError, match=r"^preparing x: .*x\.lock cannot be locked \(.*home="),
        lock.lock(str(tmp_path / "x.lock"), "preparing x"),
    ):
        raise AssertionError("it is locked")


@pytest.mark.parametrize("is_supported", [True, False])
def test_a_file_is_on_the_disk_where_fsync_leaves_it_in_the_drive(
    is_supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def full(descriptor: int, command: int) -> int:
        calls.append("full")
        if not is_supported:
            raise OSError(errno.ENOTSUP, "Operation not supported")
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), real(descriptor)))
    storage.write_bytes(str(tmp_path / "file"), b"content")
    assert calls == (["full"] if is_supported else ["full", "fsync"])
    assert (tmp_path / "file").read_bytes() == b"content"


# --- the Makefile --------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_shows_each_target_with_what_it_does() -> None:
    command = ["make", "--no-print-directory", "help"]  # (make itself may run the tests)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "help          Show this"
    assert {line.split()[0] for line in lines} >= {"quickstart", "test", "check", "faults"}
    assert not any("#" in line or "\t" in line for line in lines)


def test_the_makefile_has_no_options_that_only_gnu_tools_know() -> None:
    recipes = [line for line in (ROOT / "Makefile").read_text().splitlines() if line[:1] == "\t"]
    for word in ("nproc", "timeout ", "sed -i", "readlink -f", "--sort", "xargs -r", "date -d"):
        assert not any(word in line for line in recipes), word


def test_torch_has_no_gpu_of_a_macs_here() -> None:
    """This machine has no Mac GPU; otherwise the simulation above would not be one."""
    assert sys.platform == "darwin" or not torch.backends.mps.is_available()
