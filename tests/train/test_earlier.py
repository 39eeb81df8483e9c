"""What earlier runs of a home tell of the speed of others: of those alike, and of no others."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.sweeps import config
from manta.config import from_dict
from manta.model.cost import flops_per_token
from manta.train import earlier
from manta.train.records import history
from manta.train.settings import PretrainConfig, save_run_config

MODEL = {"n_layer": 1, "n_embd": 32, "n_head": 2, "context_length": 64}
BASE = from_dict(
    PretrainConfig, {"home": "/nowhere", "tokens_per_batch": 1024, "model": MODEL, "dtype": "fp32"}
)


def run(home: Path, **keys: Any) -> PretrainConfig:
    return dataclasses.replace(BASE, home=str(home), threads_per_worker=1, **keys)


def trained(c: PretrainConfig, speed: float = 1000.0, micro_batch: int | None = None) -> None:
    """A finished run of this config, with measured steps on this machine."""
    save_run_config(c)
    folder = Path(c.run_folder)
    (folder / "checkpoints" / "step-00000064").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000064" / "MANIFEST.json").write_text("{}")
    steps = [{"step": n, "tokens": n, "tokens_per_second": speed, "step_seconds": 0.5}
             for n in range(1, 5)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in steps))
    history.note(str(folder), "command", **history.command())
    history.note(str(folder), "started", micro_batch=micro_batch or c.micro_batch)


def flops(c: PretrainConfig) -> float:
    return flops_per_token(c.expected_model, c.sequence_length)


def test_the_newest_run_of_the_same_kind_tells_the_speed(tmp_path: Path) -> None:
    c = run(tmp_path)
    assert earlier.pace(str(tmp_path), [c]) is None
    trained(run(tmp_path, name="old"), 1000.0)
    found = earlier.pace(str(tmp_path), [c])
    assert found is not None
    assert found == earlier.Pace(("old",), pytest.approx(1000.0 * flops(c)))
    # A newer run on all of the machine's threads, where the run to come has one of them.
    os.utime(tmp_path / "runs" / "old" / "metrics.jsonl", (1, 1))
    trained(dataclasses.replace(run(tmp_path, name="newer"), threads_per_worker=None))
    found = earlier.pace(str(tmp_path), [c])
    assert found is not None
    expected = 1000.0 * flops(c) / (os.cpu_count() or 1)
    assert found == earlier.Pace(("newer",), pytest.approx(expected))


@pytest.mark.parametrize("keys", [
    {"tokens_per_batch": 2048}, {"micro_batch_size": 4}, {"batch_ramp": {512: 2048}},
    {"num_workers": 2}, {"dtype": "bf16"}, {"zero_stage": 1}, {"document_mask": True},
    {"activation_checkpointing": "full"}, {"seq_len": 32},
], ids=str)  # fmt: skip
def test_a_run_in_other_batches_or_another_way_tells_nothing(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    trained(run(tmp_path, name="other", **keys))
    assert earlier.pace(str(tmp_path), [run(tmp_path)]) is None
    assert earlier.pace(str(tmp_path), [run(tmp_path, **keys)]) is not None


def test_a_run_elsewhere_or_with_less_memory_tells_nothing(tmp_path: Path) -> None:
    trained(run(tmp_path, name="small"), micro_batch=1)
    assert earlier.pace(str(tmp_path), [run(tmp_path)]) is None
    trained(run(tmp_path, name="elsewhere"))
    file = tmp_path / "runs" / "elsewhere" / "history.jsonl"
    file.write_text(re.sub(r'"memory_bytes": \d+', '"memory_bytes": 1', file.read_text()))
    assert earlier.pace(str(tmp_path), [run(tmp_path)]) is None


def test_each_batch_counts_with_its_own_speed_and_each_model_with_its_flops(tmp_path: Path) -> None:
    small, large = run(tmp_path), run(tmp_path, tokens_per_batch=2048)
    wide = dataclasses.replace(small, model=dataclasses.replace(small.model, n_embd=64))
    trained(dataclasses.replace(small, name="small"), 1000.0)
    assert earlier.pace(str(tmp_path), [small, large]) is None
    trained(dataclasses.replace(large, name="large"), 4000.0)
    found = earlier.pace(str(tmp_path), [small, large])
    assert found is not None
    assert set(found.runs) == {"small", "large"}
    # A token takes 1 ms in one of two runs of equal length, and 0.25 ms in the other.
    assert found.flops_per_second == pytest.approx(2 * flops(small) / (1e-3 + 0.25e-3))
    assert earlier.pace(str(tmp_path), [wide]) is None  # its model was never trained
    found = earlier.pace(str(tmp_path), [small, wide])
    assert found == earlier.Pace(("small",), pytest.approx(1000.0 * flops(small)))


def test_a_sweep_shows_its_hours_where_all_of_its_batches_are_known(tmp_path: Path) -> None:
    c = dataclasses.replace(config(lr=[1e-3], tokens_per_batch=[1024, 2048]), home=str(tmp_path))
    key = "steps of all trials in one lane"
    assert key not in c.derived()
    for trial, name in zip(c.examples(), ("a", "b"), strict=True):
        assert key not in c.derived()
        trained(dataclasses.replace(c.config_of(trial), name=name))
    assert c.derived()[key] == "2m11s, if as fast as in a, b"  # 2 x 65,536 tokens
