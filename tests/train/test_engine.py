"""The keys of DeepSpeed: each one acts where it is allowed, and is refused elsewhere."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.ranks import ACCUMULATED, MICRO_BATCH, SHARES, batches, device, make_model, on_ranks
from manta.config import from_dict, load
from manta.errors import ConfigError
from manta.train.settings import PretrainConfig
from manta.train.step.deepspeed_config import import_deepspeed
from manta.train.step.engine import Engine
from manta.train.step.engine_settings import EngineConfig
from manta.train.step.optimizer import OptimizerConfig
from manta.train.step.reducer import Reducer

RANKS = 2
MUON = OptimizerConfig(kind="muon")

# Settings that do not change the arithmetic, and the stages at which they act.
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
    engine = Engine(
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
        engine.set_lr(share)
        for index, micro in enumerate(
            batch[MICRO_BATCH * ACCUMULATED * rank :].split(MICRO_BATCH)[:ACCUMULATED]
        ):
            loss = engine(micro[:, :-1], micro[:, 1:])
            is_last = index == ACCUMULATED - 1
            engine.backward(loss, is_last=is_last)
            if is_last:
                engine.step(optimizer.grad_clip)
            losses.append(loss.item())
    return losses, engine


def reductions(rank: int, stage: int) -> list[int]:
    """The number of collective calls in each micro batch of a step, after a first run of steps."""
    _, engine = train(rank, stage, {}, OptimizerConfig())
    found = []
    for index in range(3):
        micro = next(batches(engine.module))[:MICRO_BATCH]
        loss = engine(micro[:, :-1], micro[:, 1:])
        with profile(activities=[ProfilerActivity.CPU]) as p:
            engine.backward(loss, is_last=index == 2)
            if index == 2:
                engine.step(1.0)
        names = [event.name for event in p.events()]
        found.append(sum("reduce" in name and name.startswith("gloo:") for name in names))
    return found


def averaged(rank: int) -> dict[str, Any]:
    """Two micro batches of a small net whose gradients are averaged in buckets: what is sent when,
    and whether the gradients equal those of all_reduce."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    weights = [torch.nn.Parameter(torch.ones(3)), *net.parameters()]  # nothing uses the first
    events: list[str] = []
    for index, layer in enumerate(net):
        layer.weight.register_post_accumulate_grad_hook(
            lambda _, index=index: events.append(f"gradient {index}")
        )
    reducer = Reducer(weights, 100, torch.float32)
    send = reducer._send
    reducer._send = lambda bucket: (events.append("send"), send(bucket))[1]  # type: ignore
    expected = [torch.zeros_like(weight) for weight in weights]
    for index in range(2):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * rank + index))
        loss = net(x).square().mean()
        parts = torch.autograd.grad(loss, weights[1:], retain_graph=True)
        for total, part in zip(expected[1:], parts, strict=True):
            total += part
        reducer.armed = index == 1
        loss.backward()
    reducer.finish()
    for total in expected:
        torch.distributed.all_reduce(total)
    expected = [total / RANKS for total in expected]
    same = all(torch.equal(w.grad, e) for w, e in zip(weights, expected, strict=True))  # type: ignore
    return {"events": events, "same": same}


def casts(stage: int, once: bool, recompute: str = "none") -> dict[str, Any]:
    """How often each weight was cast in a step of three micro batches in bf16, and the weights
    after it."""
    model = make_model("modern")
    model.recompute = recompute  # type: ignore[assignment]
    engine = Engine(
        model, OptimizerConfig(), device("bf16"),
        zero_stage=stage, micro_batch_size=MICRO_BATCH, grad_accum_steps=ACCUMULATED,
    )  # fmt: skip
    engine.set_lr(1.0)
    weights = {p.data_ptr() for name, p in model.named_parameters() if "blocks" in name}
    count = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal count
            is_cast = op is torch.ops.aten._to_copy.default
            count += is_cast and args[0].data_ptr() in weights
            return op(*args, **(kwargs or {}))

    micros = next(batches(model))[: MICRO_BATCH * ACCUMULATED].split(MICRO_BATCH)
    with engine.casting_once() if once else contextlib.nullcontext():
        for index, micro in enumerate(micros):
            with Count():
                loss = engine(micro[:, :-1], micro[:, 1:])
            engine.backward(loss, is_last=index == len(micros) - 1)
    engine.step(1.0)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.blocks.modules())
    return {"casts": count, "linears": linears, "weights": after}


def synchronisations(rank: int, stage: int) -> int:
    """How often DeepSpeed waits for the whole device in a run's steps."""
    from deepspeed.accelerator import get_accelerator

    calls: list[int] = []
    accelerator = get_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "synchronize", lambda *_: calls.append(1), raising=True)
        train(rank, stage, {}, OptimizerConfig())
    return len(calls)


def run_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {"plain": {}, "muon": {}, "bf16": {}, "reductions": {}}
    linear = F.linear  # stage 3 leaves DeepSpeed's own one behind in the process
    with pytest.MonkeyPatch.context() as patch:  # a machine with a GPU, which this run does not use
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setenv("DS_ACCELERATOR", "cuda")
        deepspeed = import_deepspeed("cpu")
        train(rank, 0, {}, OptimizerConfig())
    results["accelerator"] = deepspeed.accelerator.get_accelerator()._name
    results["probed"] = deepspeed.ops.__compatible_ops__
    with pytest.raises(RuntimeError) as other:
        import_deepspeed("cuda")
    results["other device"] = str(other.value)
    results["averaged"] = averaged(rank)
    results["synchronisations"] = {stage: synchronisations(rank, stage) for stage in (0, 1, 2)}
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
            zero = engine._engine._config.zero_config
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
    F.linear = linear
    results["casts"] = [(casts(stage, False), casts(stage, True)) for stage in (0, 1, 2)]
    results["recomputed casts"] = (casts(0, False, "full"), casts(0, True, "full"))
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


def test_deepspeed_takes_the_device_of_the_run_and_not_the_one_that_it_sees(
    found: dict[str, Any],
) -> None:
    assert found["accelerator"] == "cpu"
    assert found["other device"].startswith("DeepSpeed was imported for cpu in this process")


def test_no_operation_of_deepspeeds_is_tried_out(found: dict[str, Any]) -> None:
    """DeepSpeed fills this list with all its operations on the first read, unless it exists."""
    assert found["probed"] == {}


def test_a_step_never_waits_for_the_whole_device(found: dict[str, Any]) -> None:
    assert found["synchronisations"] == {0: 0, 1: 0, 2: 0}


def test_weights_are_cast_once_a_step_and_the_step_stays_the_same(found: dict[str, Any]) -> None:
    for each, once in found["casts"]:
        assert each["casts"] == ACCUMULATED * each["linears"] > once["casts"] == once["linears"]
        for name, weight in each["weights"].items():
            assert torch.equal(weight, once["weights"][name]), name


def test_checkpointed_blocks_keep_no_casts(found: dict[str, Any]) -> None:
    each, once = found["recomputed casts"]
    assert each["casts"] == once["casts"] > once["linears"]


def test_gradients_travel_while_others_are_still_computed(found: dict[str, Any]) -> None:
    events = found["averaged"]["events"]
    assert found["averaged"]["same"]
    backward = ["gradient 3", "gradient 2", "gradient 1", "gradient 0"]
    assert events[:4] == backward  # the first micro batch's stay where they are
    assert [event for event in events[4:] if event != "send"] == backward
    assert events.count("send") == 4 and "send" in events[: events.index("gradient 0", 4)]


def test_stages_0_and_1_reduce_once_a_step(found: dict[str, Any]) -> None:
    """Stages 2 and 3 keep no gradients of other ranks, so they reduce in each micro batch."""
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
        ({"deepspeed_json": "/"}, ["deepspeed_json=/ cannot be read", "directory"]),
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
        ("reduce_bucket_mb", 10, {0, 1, 2, 3}, True),
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


def test_the_json_is_given_on_the_command_line_as_it_is_in_a_file() -> None:
    text = '{"zero_optimization": {"sub_group_size": 5000}, "dump_state": false}'
    assert load(PretrainConfig, [f"engine.deepspeed_json={text}"]).engine.extra() == {
        "zero_optimization": {"sub_group_size": 5000},
        "dump_state": False,
    }


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
