"""Verdicts on memory against processes that get no more than so much of it."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from manta.bench.stages import return_freed_memory
from manta.config import from_dict, merged
from manta.model.memory import ALLOWANCE, costs
from manta.train.alone import Step, together
from manta.train.fitting import verdict
from manta.train.settings import PretrainConfig, memory_setup
from manta.train.step.device import Device

pytestmark = pytest.mark.long
STATUS = Path("/proc/self/status")
# What Python, DeepSpeed and gloo take for themselves, apart from libraries.
REST = 40 << 20
RUN: dict[str, Any] = {
    "model": {
        "n_layer": 6, "n_embd": 512, "n_head": 8, "context_length": 256, "vocab_size": 8192,
    },
    "micro_batch_size": 8, "tokens_per_batch": 4096, "total_tokens": 4096, "compile": "none",
    "dtype": "fp32", "num_workers": 2,
}  # fmt: skip
SMALL = {
    "model": {"n_layer": 1, "n_embd": 64, "n_head": 1, "context_length": 16, "vocab_size": 512},
    "micro_batch_size": 1, "tokens_per_batch": 32, "total_tokens": 32,
}  # fmt: skip


def train(tree: dict[str, Any], limit: int) -> None:
    """Trains two steps with at most so many bytes more than before."""
    return_freed_memory()
    torch.set_num_threads(1)
    steps(merged(tree, SMALL))  # loads what is loaded at its first use
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    most = 1024 * int(lines["VmData"].split()[0]) + limit
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    steps(tree)


def steps(tree: dict[str, Any]) -> None:
    step = Step(from_dict(PretrainConfig, tree), Device(torch.device("cpu"), "fp32", 1e12, "CPU"))
    step.run()
    step.run()


def fits(tree: dict[str, Any], limit: float) -> bool:
    try:
        together(2, "gloo", train, tree, int(limit))
    except ProcessRaisedException as e:
        assert "not enough memory" in str(e) or "can't allocate memory" in str(e), str(e)[-2000:]
        return False
    return True


@pytest.mark.skipif(not STATUS.is_file(), reason="only Linux limits a process's data")
@pytest.mark.parametrize("share", [0.93, 0.7])
def test_what_does_not_fit_runs_out_of_memory_and_each_way_that_is_named_runs(share: float) -> None:
    c = from_dict(PretrainConfig, RUN)
    setup = memory_setup(c, c.model, "fp32", "cpu")
    setup = type(setup)(**{**vars(setup), "micro_batch_size": 8})
    peak = costs(setup).peak - ALLOWANCE
    found = verdict(c, setup, share * peak + ALLOWANCE)
    assert found.fits is False and len(found.ways) >= 1
    assert fits(RUN, peak + REST)
    assert not fits(RUN, share * peak)
    for way in found.ways:
        assert fits(merged(RUN, way.keys), share * peak + REST), str(way)
