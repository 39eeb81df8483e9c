"""What grows with the number of workers: nothing faster than their number, and for each of them
nothing beyond a bound."""

import numpy as np
import pytest

from manta.bench.command import bench
from manta.bench.growth import (
    BOUNDED,
    CONSTANT,
    LINEAR,
    WORKERS,
    checkpoint,
    data,
    memory,
    speech,
)
from manta.bench.settings import BenchConfig
from manta.config import load
from manta.model.shape import ModelConfig

FEW, MANY = 64, 4096
# A worker that read, held or said more for each other worker would have 64 times as much.
MOST = 6

MODELS = {
    "narrow": ModelConfig(n_layer=3, n_embd=64, n_head=2, vocab_size=4096),
    "deep": ModelConfig(n_layer=12, n_embd=32, n_head=2, vocab_size=300, tie_embeddings=False),
    "biases": ModelConfig(family="gpt2", n_layer=4, n_embd=128, n_head=2, vocab_size=1000),
}


def check(few: dict[str, float], many: dict[str, float]) -> None:
    assert few.keys() == many.keys() <= {*BOUNDED, *LINEAR}
    for key in few.keys() & BOUNDED.keys():
        assert many[key] <= MOST * few[key], f"{key}: {few[key]}, then {many[key]}"
    for key in few.keys() & LINEAR.keys():
        assert many[key] <= 1.5 * MANY / FEW * few[key], f"{key}: {few[key]}, then {many[key]}"


@pytest.mark.parametrize("model", MODELS)
def test_checkpoints_and_memory_do_not_grow_for_each_worker(model: str) -> None:
    few, many = (
        {**checkpoint(n, MODELS[model]), **memory(n, MODELS[model], 64)} for n in (FEW, MANY)
    )
    check(few, many)


@pytest.mark.parametrize("keys", [[], ["data.log_fingerprint=true", "log_every=1"]])
def test_the_driver_hears_and_a_run_keeps_the_same_from_any_number_of_ranks(
    keys: list[str],
) -> None:
    c = load(BenchConfig, ["what=growth", *keys])
    one, many = (speech(n, MODELS["narrow"], c) for n in (1, FEW))
    assert {key: one[key] for key in CONSTANT} == {key: many[key] for key in CONSTANT}
    assert one["messages"] == 3 and 10 <= one["series"] <= 20  # a line, a step and an evaluation
    assert many["rank_series"] == FEW * one["rank_series"] == 3 * FEW


@pytest.mark.parametrize("seq_len", [256, 1024, 4096])
@pytest.mark.parametrize("sequences", [1, 8])
def test_reading_and_planning_do_not_grow_for_each_worker(sequences: int, seq_len: int) -> None:
    few, many = (data(n, sequences * seq_len, seq_len) for n in (FEW, MANY))
    # What a worker needs of a step may be less than a row group, which it reads as a whole.
    floor = 1 + 2 * (1 << 14) / (sequences * seq_len)
    assert many["read"] <= max(MOST * few["read"], floor)
    check({k: few[k] for k in ("plan",)}, {k: many[k] for k in ("plan",)})
    assert many["requests"] <= 6  # some reads of row groups, and two of a shard's footer


def test_the_table_has_every_row(capsys: pytest.CaptureFixture, tmp_path: object) -> None:
    keys = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", f"home={tmp_path}"]
    found = bench(load(BenchConfig, ["what=growth", *keys]))
    shown = capsys.readouterr().out
    for text in (*BOUNDED.values(), *LINEAR.values(), *CONSTANT.values(), "4,096"):
        assert text in shown
    every = {*BOUNDED, *LINEAR, *CONSTANT}
    assert [set(row) for row in found["rows"]] == [every] * len(WORKERS)
    for key in CONSTANT:
        assert len({row[key] for row in found["rows"]}) == 1
    assert np.all(np.diff([row["files"] for row in found["rows"]]) > 0)
