"""What follows from a config, and what a worker decides from its machine."""

import dataclasses
import importlib
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.config import differences, from_dict, load, to_dict
from manta.errors import ConfigError
from manta.model.cost import flops_per_token, parameters
from manta.model.gpt import GPT, ModelConfig
from manta.model.memory import costs
from manta.train import build
from manta.train.build import compiles, micro_batch, slow_attention
from manta.train.settings import PretrainConfig, TrainConfig, memory_setup
from manta.train.step import scaling
from manta.train.step.device import Device
from manta.train.step.engine_settings import EngineConfig
from manta.train.step.optimizer import make_optimizer

few = settings(deadline=None, max_examples=25)
CPU = Device(torch.device("cpu"), "fp32", 1e11, "CPU")
GPU = Device(torch.device("cuda", 0), "bf16", 7e14, "NVIDIA H100 80GB HBM3", 989e12)


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, arguments)
    return str(caught.value)


def test_a_run_of_one_worker_may_have_a_share_of_a_gpu() -> None:
    c = load(PretrainConfig, ["gpus_per_worker=0.25", "deterministic=true"])
    assert from_dict(PretrainConfig, to_dict(c)) == c and c.gpus_per_worker == 0.25
    assert "NCCL needs a whole GPU for each worker" in refusal(
        "gpus_per_worker=0.25", "num_workers=2"
    )
    assert "gpus_per_worker" in refusal("gpus_per_worker=1.5")


# What the machine is fast in


def test_bf16_that_is_only_emulated_is_not_chosen() -> None:
    """oneDNN may not use this processor's own bf16 instructions, if it has them."""
    code = "from manta.train.step import device; print(device.find_device('auto', False, 1).dtype)"
    path = str(Path(__file__).parents[2] / "platform")
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "fp32"


# One dial


@few
@given(depth=st.integers(1, 64))
def test_depth_gives_a_model_and_a_recipe_that_fit_together(depth: int) -> None:
    c = load(PretrainConfig, [f"model.depth={depth}"])
    assert (c.model.n_layer, c.model.n_embd) == (depth, 64 * depth)
    assert c.model.head_size == 64 and c.model.family == "modern" and c.model.qk_norm
    assert c.total_tokens == 20 * 12 * depth * c.model.n_embd**2
    assert c.tokens_per_batch == 2 ** round(math.log2(c.tokens_per_batch))
    assert c.tokens_per_batch % c.sequence_length == 0
    assert 1e-5 < c.optimizer.lr < 1e-2


def test_depth_12_is_the_reference() -> None:
    c = load(PretrainConfig, ["model.depth=12"])
    assert (c.optimizer.lr, c.tokens_per_batch) == (6e-4, 524288)
    blocks = parameters(from_dict(ModelConfig, {"depth": 12, "vocab_size": 50257}))
    assert c.total_tokens == pytest.approx(20 * (blocks.attention + blocks.mlp), rel=0.01)


def test_a_deeper_model_gets_more_tokens_in_larger_batches() -> None:
    found = [load(PretrainConfig, [f"model.depth={d}"]) for d in (2, 4, 8, 12, 20, 32)]
    assert sorted(c.total_tokens for c in found) == [c.total_tokens for c in found]
    assert sorted(c.tokens_per_batch for c in found) == [c.tokens_per_batch for c in found]


@few
@given(
    depth=st.integers(1, 20),
    keys=st.fixed_dictionaries(
        {},
        optional={
            "n_layer": st.integers(1, 9),
            "n_embd": st.just(256),
            "n_head": st.just(4),
            "qk_norm": st.booleans(),
        },
    ),
    tokens=st.none() | st.integers(1, 9),
    lr=st.none() | st.floats(1e-5, 1e-2),
)
def test_what_is_given_goes_over_what_depth_gives_and_all_of_it_comes_back(
    depth: int, keys: dict[str, Any], tokens: int | None, lr: float | None
) -> None:
    # n_embd and n_head go together.
    keys = keys if ("n_embd" in keys) == ("n_head" in keys) else {}
    tree: dict[str, Any] = {"model": {"depth": depth, **keys}}
    if tokens is not None:
        tree["tokens_per_batch"] = tokens * 1024
    if lr is not None:
        tree["optimizer"] = {"lr": lr}
    c = from_dict(TrainConfig, tree)
    assert all(getattr(c.model, key) == value for key, value in keys.items())
    assert tokens is None or c.tokens_per_batch == tokens * 1024
    assert lr is None or c.optimizer.lr == lr
    assert from_dict(TrainConfig, to_dict(c)) == c
    assert from_dict(TrainConfig, differences(c)) == c


@pytest.mark.parametrize("value", ["0", "-3", "true", "many", "1.5"])
def test_a_depth_that_is_none_is_said(value: str) -> None:
    assert refusal(f"model.depth={value}").startswith("model.depth=")


def test_depth_and_preset_are_one_or_the_other() -> None:
    said = refusal("model.depth=4", "model.preset=gpt2-124m")
    assert "depth=4 and preset=gpt2-124m: give one of them" in said


def test_rules_of_scaling() -> None:
    assert scaling.lr_scales("adamw", 512, None, 4096, None) == dict.fromkeys(
        ["matrices", "head", "embeddings", "vectors"], 1.0
    )
    found = scaling.lr_scales("adamw", 1024, 256, 4096, 1024)
    assert found == {"matrices": 0.5, "head": 0.5, "embeddings": 2.0, "vectors": 2.0}
    assert scaling.lr_scales("muon", 1024, 256, 1, None)["matrices"] == 0.5
    c = config_of(optimizer={"reference_width": 128, "reference_batch": 512})
    assert c.lr_scales["matrices"] == pytest.approx(1.0)  # twice the root of batch, half the width
    assert "matrices 1," in c.derived()["learning rates are multiplied by"]
    model = GPT(from_dict(ModelConfig, {"n_layer": 1, "n_embd": 32, "vocab_size": 50}))
    groups = make_optimizer(model, c.optimizer, lr_scales={"matrices": 0.25}).param_groups
    rates = {group["name"]: group["peak_lr"] / c.optimizer.lr for group in groups}
    assert rates == {"matrices": 0.25, "embeddings": 1.0, "vectors": 1.0}


# What a worker decides


def config_of(**keys: Any) -> TrainConfig:
    return from_dict(TrainConfig, keys)


MODEL = ModelConfig(vocab_size=4096)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, with the compilers of a fully equipped machine; Triton and
    Python's headers exist too."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcc", "g++"):
        (folder / name).touch(mode=0o755)
    headers = tmp_path / "include"
    headers.mkdir()
    (headers / "Python.h").touch()
    (tmp_path / "triton.py").touch()
    monkeypatch.setenv("PATH", str(folder))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(headers))
    monkeypatch.syspath_prepend(tmp_path)
    return folder


# GPT-2's size: 0.86 GFLOPs a token, so that these tokens take ten minutes on the CPU above and two
# on the GPU.
LARGE = ModelConfig(n_layer=12, n_head=12, n_embd=768, context_length=1024, vocab_size=50257)


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("times", [0.5, 2])
def test_a_short_run_is_not_worth_compiling_and_a_long_one_is(
    tools: Path, device: Device, times: float
) -> None:
    seconds = build.WORTH_COMPILING_SECONDS[device.torch_device.type]
    tokens = int(times * seconds * device.peak / flops_per_token(LARGE, 1024))
    keys = {"total_tokens": tokens, "seq_len": 1024, "model": {"context_length": 1024}}
    assert compiles(config_of(**keys), LARGE, device) == (times > 1)
    assert not compiles(config_of(**keys, zero_stage=3), LARGE, device)
    assert not compiles(config_of(**keys, compile="none"), LARGE, device)
    assert compiles(config_of(**keys, compile="blocks"), LARGE, device)
    assert compiles(config_of(**keys, compile="blocks", zero_stage=3), LARGE, device)


@pytest.mark.parametrize(
    ("device", "gone", "words"),
    [
        (CPU, "bin/g++", r"a C\+\+ compiler, and g\+\+ is not on the PATH: install g\+\+"),
        (CPU, "include/Python.h", r"Python's headers, and .*include has no Python.h: install"),
        (GPU, "bin/gcc", "a C compiler, and gcc or clang is not on the PATH: install gcc"),
        (GPU, "include/Python.h", r"Python's headers, and .*include has no Python.h: install"),
        (GPU, "triton.py", r"Triton, and Python finds no package triton: .*pip install triton"),
    ],
    ids=lambda value: value.torch_device.type if isinstance(value, Device) else None,
)
def test_without_what_compiling_needs_auto_does_without_and_blocks_says_what_is_missing(
    tools: Path, device: Device, gone: str, words: str
) -> None:
    long = {"total_tokens": 1 << 50}
    assert compiles(config_of(**long), LARGE, device)
    (tools.parent / gone).unlink()
    importlib.invalidate_caches()
    assert not compiles(config_of(**long), LARGE, device)
    with pytest.raises(ConfigError, match=f"compile=blocks needs {words}.*, or set compile=none"):
        compiles(config_of(**long, compile="blocks"), LARGE, device)


def test_the_compiler_that_the_environment_names_is_the_one_that_is_looked_for(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config_of(total_tokens=1 << 50, compile="blocks")
    for device, variable in ((CPU, "CXX"), (GPU, "CC")):
        monkeypatch.setenv(variable, "no-compiler")
        with pytest.raises(ConfigError, match="and no-compiler is not on the PATH"):
            compiles(c, LARGE, device)
        monkeypatch.setenv(variable, str(tools / "gcc"))
        assert compiles(c, LARGE, device)


@few
@given(gib=st.floats(0.3, 64), sequences=st.integers(1, 60), workers=st.integers(1, 4))
def test_an_automatic_micro_batch_is_the_largest_that_divides_and_fits(
    gib: float, sequences: int, workers: int
) -> None:
    c = config_of(
        micro_batch_size="auto",
        memory_per_worker=gib,
        tokens_per_batch=256 * sequences * workers,
        num_workers=workers,
    )

    def peak(size: int) -> float:
        return costs(
            dataclasses.replace(memory_setup(c, MODEL, "fp32", "cpu"), micro_batch_size=size)
        ).peak

    memory = gib * 2**30
    try:
        size = micro_batch(c, MODEL, CPU, 1, False)
    except ConfigError as e:
        assert peak(1) > memory
        assert str(e).startswith("micro_batch_size=1 needs ") and "\n" not in str(e)
        return
    assert sequences % size == 0 and peak(size) <= memory
    for larger in range(size + 1, sequences + 1):
        assert sequences % larger or peak(larger) > memory


def test_without_a_figure_a_worker_looks_at_its_own_memory() -> None:
    c = config_of(micro_batch_size="auto", tokens_per_batch=256 * 8)
    assert micro_batch(c, MODEL, CPU, 1, False) == 8


def test_a_memory_is_for_the_automatic_micro_batch() -> None:
    assert "memory_per_worker is for micro_batch_size=auto" in refusal("memory_per_worker=8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimizer.kind=muon", "zero_stage=3"], "optimizer.kind=muon works at zero_stage 0, 1"),
        (["optimizer.muon_lr=0.01"], "for kind=muon"),
        (["optimizer.head_lr=0.01"], "model.tie_embeddings=false"),
        (["engine.offload_optimizer=nvme", "zero_stage=3"], "set engine.offload_path"),
        (["engine.offload_parameters=cpu", "zero_stage=2"], "zero_stage=2: omit it"),
        (["engine.overlap_comm=true"], "zero_stage=0: omit it"),
        (["engine.deepspeed_json=[1]"], "is not a JSON object"),
        (['engine.deepspeed_json={"bf16": {}}'], "sets bf16, which Manta decides: set dtype"),
        (["activation_checkpointing=some"], "activation_checkpointing='some'"),
        (["compile=all"], "compile='all'"),
        (["micro_batch_size=large"], "micro_batch_size='large'"),
    ],
)
def test_what_cannot_work_is_one_line_that_says_what_would(
    arguments: list[str], words: str
) -> None:
    said = refusal(*arguments)
    assert words in said and "\n" not in said


def test_a_gpu_without_a_fused_attention_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(torch.device("cuda"), "bf16", 1e14, "Tesla V100-SXM2-16GB")
    c = load(PretrainConfig, ["gpus_per_worker=1", "model.n_head=4", "model.n_embd=256"])
    asked: list[tuple[Any, ...]] = []
    kernels: list[str] = ["flash"]
    monkeypatch.setattr(
        "manta.train.build.fused_kernels", lambda *what: asked.append(what) or kernels
    )
    assert slow_attention(c, c.model, gpu) is None
    assert asked == [(gpu.torch_device, torch.bfloat16, 64)]
    kernels.clear()
    line = slow_attention(c, c.model, gpu)
    assert line is not None and "Tesla V100-SXM2-16GB has no FlashAttention for heads of 64" in line
    assert slow_attention(c, c.model, CPU) is None


def test_a_model_is_made_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making a large model on the CPU first takes longer than a GPU's whole start."""
    places: list[torch.device] = []

    class Made(Exception):
        pass

    def note(model: Any) -> None:
        places.append(torch.empty(1).device)
        raise Made

    monkeypatch.setattr("manta.train.build.model_of", note)
    elsewhere = Device(torch.device("meta"), "bf16", 1e14, "a device that is not the CPU")
    with pytest.raises(Made):
        build.build(TrainConfig(), MODEL, elsewhere, size=1, steps=1, compiled=False)
    assert places == [torch.device("meta")]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_gradients_are_reduced_in_the_backward_pass_of_several_gpus(on_gpu: bool) -> None:
    c = EngineConfig()
    for stage in (1, 2):
        assert c.overlaps(stage, 2, on_gpu) == on_gpu
        assert not c.overlaps(stage, 1, on_gpu)
        assert not EngineConfig(overlap_comm=False).overlaps(stage, 2, on_gpu)
    keys = [f"gpus_per_worker={int(on_gpu)}", "num_workers=2", "zero_stage=1"]
    run = load(PretrainConfig, keys)
    setup = memory_setup(run, MODEL, "bf16", "cuda" if on_gpu else "cpu")
    assert setup.overlap_comm == on_gpu  # this needs a second bucket
