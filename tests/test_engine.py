"""The keys of DeepSpeed: each acts where it may be set, and is refused where it would not."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_optimizer import ACCUMULATED, MICRO_BATCH, SHARES, batches, device, make_model, on_ranks
from torch.profiler import ProfilerActivity, profile

from manta.config import from_dict
from manta.errors import ConfigError
from manta.train import engine as engines
from manta.train.engine_settings import EngineConfig
from manta.train.optimizer import OptimizerConfig

RANKS = 2
MUON = OptimizerConfig(kind="muon")

# Settings that leave the arithmetic as it is, and the stages at which they act.
SAME = {
    "offload": ({"offload_optimizer": "cpu"}, (1, 2, 3)),
    "offload both": ({"offload_optimizer": "cpu", "offload_parameters": "cpu"}, (3,)),
    "offload parameters": ({"offload_parameters": "cpu"}, (3,)),
    "overlap": ({"overlap_comm": True}, (1, 2)),
    "buckets": ({"reduce_bucket_mb": 1, "allgather_bucket_mb": 1}, (1, 2)),
    "json": ({"deepspeed_json": '{"zero_optimization": {"sub_group_size": 5000}}'}, (3,)),
}


def train(rank: int, stage: int, keys: dict[str, Any], optimizer: OptimizerConfig) -> Any:
    """The losses of a short run, and its engine."""
    engine = engines.make_engine(
        make_model("modern"),
        optimizer,
        device(),
        zero_stage=stage,
        micro_batch_size=MICRO_BATCH,
        grad_accum_steps=ACCUMULATED,
        c=EngineConfig(**keys),
    )
    losses = []
    for share, batch in zip(SHARES, batches(engine.module), strict=True):
        engines.set_lr(engine, share)
        for index, micro in enumerate(
            batch[MICRO_BATCH * ACCUMULATED * rank :].split(MICRO_BATCH)[:ACCUMULATED]
        ):
            loss = engine(micro[:, :-1], micro[:, 1:])
            is_last = index == ACCUMULATED - 1
            engines.backward_and_step(engine, loss, optimizer.grad_clip, is_last=is_last)
            losses.append(loss.item())
    return losses, engine


def reductions(rank: int, stage: int) -> list[int]:
    """How many collective calls each micro batch of a step makes, after a step."""
    _, engine = train(rank, stage, {}, OptimizerConfig())
    found = []
    for index in range(3):
        micro = next(batches(engine.module))[:MICRO_BATCH]
        loss = engine(micro[:, :-1], micro[:, 1:])
        with profile(activities=[ProfilerActivity.CPU]) as p:
            engines.backward_and_step(engine, loss, 1.0, is_last=index == 2)
        names = [event.name for event in p.events()]
        found.append(sum("reduce" in name and name.startswith("gloo:") for name in names))
    return found


def run_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {"plain": {}, "muon": {}, "bf16": {}, "reductions": {}}
    for stage in (0, 1, 2, 3):
        results["plain"][stage] = train(rank, stage, {}, OptimizerConfig())[0]
        results["bf16"][stage], engine = train(
            rank, stage, {"communication_dtype": "bf16"}, OptimizerConfig()
        )
        results["reductions"][stage] = reductions(rank, stage)
    for name, (keys, stages) in SAME.items():
        results[name] = {}
        for stage in stages:
            results[name][stage], engine = train(rank, stage, keys, OptimizerConfig())
            zero = engine._config.zero_config
            results[f"{name} config {stage}"] = json.loads(zero.model_dump_json())
    for stage in (0, 1, 2):
        results["muon"][stage] = train(rank, stage, {}, MUON)[0]
    for stage in (1, 2):
        results[f"muon offload {stage}"] = train(rank, stage, {"offload_optimizer": "cpu"}, MUON)[0]
    for name, keys in {
        "nonsense": {"deepspeed_json": '{"zero_optimization": {"no_such_key": 1}}'},
        "nowhere": {"offload_optimizer": "nvme", "offload_path": f"{folder}/nowhere"},
    }.items():
        with pytest.raises(ConfigError) as caught:
            train(rank, 3, keys, OptimizerConfig())
        results[name] = str(caught.value)
    return results


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(run_rank, RANKS, tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("name", SAME)
def test_settings_that_keep_the_arithmetic_keep_the_losses(
    found: dict[str, Any], name: str
) -> None:
    for stage in SAME[name][1]:
        assert found[name][stage] == pytest.approx(found["plain"][stage], abs=1e-6), stage


def test_settings_reach_deepspeed(found: dict[str, Any]) -> None:
    assert found["buckets config 1"]["reduce_bucket_size"] == 250_000  # fp32 values
    assert found["buckets config 2"]["allgather_bucket_size"] == 250_000
    assert found["overlap config 2"]["overlap_comm"] is True
    assert found["offload config 2"]["offload_optimizer"]["device"] == "cpu"
    assert found["offload both config 3"]["offload_param"]["device"] == "cpu"
    assert found["json config 3"]["sub_group_size"] == 5000


def test_muon_trains_alike_at_every_stage_and_offloaded(found: dict[str, Any]) -> None:
    muon = found["muon"]
    assert muon[0] != pytest.approx(found["plain"][0], abs=1e-4)
    for losses in (muon[1], muon[2], found["muon offload 1"], found["muon offload 2"]):
        assert losses == pytest.approx(muon[0], abs=1e-6)


def test_gradients_that_travel_in_bf16_are_rounded(found: dict[str, Any]) -> None:
    for stage in (0, 1, 2, 3):
        plain, rounded = found["plain"][stage], found["bf16"][stage]
        assert plain == pytest.approx(found["plain"][0], abs=1e-6)
        assert rounded != pytest.approx(plain, abs=1e-6)
        assert rounded == pytest.approx(plain, abs=1e-2)


def test_stages_0_and_1_reduce_once_a_step(found: dict[str, Any]) -> None:
    """Stages 2 and 3 keep no gradients of others, so they reduce each micro batch."""
    counts = found["reductions"]
    print(counts)
    for stage in (0, 1):
        assert counts[stage][:2] == [0, 0] and counts[stage][2] > 0
    for stage in (2, 3):
        assert min(counts[stage]) > 0


def test_what_a_worker_or_deepspeed_refuses_is_one_line(found: dict[str, Any]) -> None:
    assert "no_such_key" in found["nonsense"] and "deepspeed_json" in found["nonsense"]
    assert "nowhere" in found["nowhere"] and "offload_optimizer=cpu" in found["nowhere"]
    assert "\n" not in found["nonsense"] + found["nowhere"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"offload_optimizer": "nvme"}, ["offload_optimizer=nvme", "engine.offload_path"]),
        ({"offload_path": "/disk"}, ["offload_path=/disk", "engine.offload_optimizer=nvme"]),
        ({"reduce_bucket_mb": 0}, ["reduce_bucket_mb"]),
        ({"communication_dtype": "fp16"}, ["communication_dtype", "bf16"]),
        ({"deepspeed_json": "nowhere.json"}, ["nowhere.json", "no such file"]),
        ({"deepspeed_json": "{nonsense"}, ["not JSON"]),
        ({"deepspeed_json": "[1]"}, ["not a JSON object"]),
        ({"deepspeed_json": '{"optimizer": {}}'}, ["sets optimizer", "optimizer.kind"]),
        ({"deepspeed_json": '{"zero_optimization": {"stage": 2}}'}, ["set zero_stage"]),
        ({"deepspeed_json": '{"bf16": {"enabled": true}}'}, ["set dtype"]),
        (
            {"deepspeed_json": '{"zero_optimization": {"offload_param": {"device": "cpu"}}}'},
            ["engine.offload_parameters"],
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(EngineConfig, keys)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_key_that_would_do_nothing_is_refused() -> None:
    def conflicts(stage: int, on_gpu: bool, **keys: Any) -> list[str]:
        return EngineConfig(**keys).conflicts(stage, on_gpu, OptimizerConfig())

    for stage in (0, 1, 2, 3):
        assert conflicts(stage, False) == conflicts(stage, True) == []
        assert conflicts(stage, True, communication_dtype="bf16") == []
    for key, value, stages, on_cpu in [
        ("overlap_comm", True, {1, 2, 3}, False),
        ("overlap_comm", False, {1, 2, 3}, False),
        ("reduce_bucket_mb", 10, {1, 2, 3}, True),
        ("allgather_bucket_mb", 10, {1, 2}, True),
        ("offload_optimizer", "cpu", {1, 2, 3}, False),
        ("offload_parameters", "cpu", {3}, False),
    ]:
        for stage in (0, 1, 2, 3):
            for on_gpu in (True, False):
                lines = conflicts(stage, on_gpu, **{key: value})
                works = stage in stages and (on_gpu or on_cpu)
                assert len(lines) == (not works), (key, stage, on_gpu, lines)
                assert all(f"engine.{key}=" in line and "omit it" in line for line in lines)
    nvme = {"offload_optimizer": "nvme", "offload_path": "/disk"}
    assert conflicts(3, False, **nvme) == []
    assert "set that to 3" in conflicts(2, True, **nvme)[0]
    moved = EngineConfig(deepspeed_json='{"zero_optimization": {"round_robin_gradients": true}}')
    assert moved.conflicts(1, True, OptimizerConfig()) == []
    assert "Muon" in moved.conflicts(1, True, MUON)[0]


def test_the_json_travels_with_the_config(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"sub_group_size": 7}, "wall_clock_breakdown": false}')
    c = from_dict(EngineConfig, {"deepspeed_json": str(file)})
    inlined = c.inlined()
    file.unlink()
    assert inlined.extra() == {
        "zero_optimization": {"sub_group_size": 7},
        "wall_clock_breakdown": False,
    }
    assert inlined.inlined() == inlined
    assert EngineConfig().inlined() == EngineConfig()
