"""The cost model against real allocations: parameters, activations, DeepSpeed's stages."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manta.bench import stages
from manta.config import from_dict
from manta.model.activations import activations
from manta.model.cost import (
    flops_per_token,
    hidden_matrices,
    learning,
    parameters,
    weights,
)
from manta.model.families import num_parameters
from manta.model.gpt import GPT
from manta.model.lora import LoraConfig
from manta.model.memory import (
    ALLOWANCE,
    BUCKET,
    GIB,
    USABLE,
    Setup,
    costs,
)
from manta.model.presets import PRESETS
from manta.model.shape import ModelConfig
from manta.model.trainable import Trainable, freeze
from manta.model.trainable import learning as learning_of

R50K_SIZE = 50257
PARTS: tuple[Trainable, ...] = ("all", "last_two", "last_block", "head")
MODES = ("none", "selective", "full")
few = settings(deadline=None, max_examples=25)


def preset(name: str, **keys: Any) -> ModelConfig:
    return from_dict(ModelConfig, {"preset": name, "vocab_size": R50K_SIZE, **keys})


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    keys: dict[str, Any] = {
        "family": draw(st.sampled_from(["gpt2", "modern"])),
        "n_layer": draw(st.integers(1, 4)),
        "n_head": 4,
        "n_embd": 8 * draw(st.integers(1, 20)),
        "context_length": draw(st.integers(8, 64)),
        "vocab_size": draw(st.integers(2, 2000)),
        "tie_embeddings": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "dropouts": {"activations": draw(st.sampled_from([0.0, 0.2]))},
    }
    if keys["family"] == "gpt2":
        keys |= {"bias": draw(st.booleans()), "qkv_bias": draw(st.booleans())}
    else:
        keys |= {"n_kv_head": draw(st.sampled_from([1, 2, 4])), "qk_norm": draw(st.booleans())}
        keys["head_dim"] = draw(st.sampled_from([None, 2, 16, 64]))
    return from_dict(ModelConfig, keys)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    stage = draw(st.sampled_from([0, 1, 2, 3]))
    return Setup(
        draw(models()),
        seq_len=draw(st.integers(1, 64)),
        micro_batch_size=draw(st.integers(1, 16)),
        num_workers=draw(st.integers(1, 16)),
        zero_stage=stage,
        dtype=draw(st.sampled_from(["bf16", "fp32"])),
        optimizer_kind=draw(st.sampled_from(["adamw", "muon"])) if stage < 3 else "adamw",
        activation_checkpointing=draw(st.sampled_from(MODES)),
        offload_optimizer=stage > 0 and draw(st.booleans()),
        offload_parameters=stage == 3 and draw(st.booleans()),
        reduce_bucket=draw(st.sampled_from([1000, BUCKET])),
        trainable=draw(st.sampled_from(PARTS)),
        device=draw(st.sampled_from(["cuda", "cpu"])),
    )


# Parameters and FLOPs


@given(c=models())
@few
def test_parameters_are_those_that_the_model_has(c: ModelConfig) -> None:
    with torch.device("meta"):
        model = GPT(c)
    assert parameters(c).total == sum(p.numel() for p in model.parameters())
    found = sorted(tuple(p.shape) for p in model.parameters())
    assert found == sorted(w.shape for w in weights(c) for _ in range(w.count))
    for part in PARTS:
        freeze(model, part)
        shapes = sorted(tuple(p.shape) for _, p in learning_of(model))
        assert shapes == sorted(w.shape for w in learning(c, part) for _ in range(w.count))
    freeze(model, "all")
    matrices = [p for name, p in model.named_parameters() if "blocks" in name and p.dim() == 2]
    assert hidden_matrices(c) == sum(p.numel() for p in matrices)


@given(c=models(), seq_len=st.integers(1, 64))
@few
def test_flops_are_6_for_each_parameter_that_multiplies_and_attention(
    c: ModelConfig, seq_len: int
) -> None:
    assert c.vocab_size is not None
    looked_up = parameters(c).positions + (0 if c.tie_embeddings else c.vocab_size * c.n_embd)
    expected = 6 * (num_parameters(c) - looked_up) + 12 * c.n_layer * c.query_size * seq_len
    assert flops_per_token(c, seq_len) == expected


# Activations


class Live(TorchDispatchMode):
    """Bytes of the storages that ops made and that still exist, except a model's own."""

    def __init__(self, model: GPT):
        super().__init__()
        own = [*model.parameters(), *model.buffers()]
        self._own = {t.untyped_storage()._cdata for t in own}
        self._living: dict[int, tuple[Any, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._living and key not in self._own:
                    ends = weakref.ref(storage, lambda _, key=key: self._drop(key))
                    self._living[key] = (ends, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return found

    def _drop(self, key: int) -> None:
        self.now -= self._living.pop(key)[1]


SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt2-wide": {"family": "gpt2", "n_embd": 256, "tie_embeddings": False, "bias": False},
    "modern": {"family": "modern"},
    "modern-gqa": {"n_kv_head": 2, "n_embd": 128, "n_layer": 3},
    "modern-qk-norm": {"n_kv_head": 1, "qk_norm": True, "tie_embeddings": False},
    "modern-heads-of-their-own": {"n_kv_head": 2, "qk_norm": True, "head_dim": 48},
}


def shape(name: str) -> ModelConfig:
    keys = {"n_layer": 2, "n_head": 4, "n_embd": 96, "vocab_size": 300, "context_length": 64}
    return from_dict(ModelConfig, {**keys, **SHAPES[name]})


def loss_of(model: GPT, batch: int, dtype: str) -> torch.Tensor:
    c = model.config
    tokens = torch.zeros(batch, c.context_length, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        return model(tokens, tokens)


@pytest.mark.filterwarnings("error:Mismatch dtype")  # torch's, where it has no fused RMSNorm
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_what_autograd_saves_is_what_is_predicted(name: str, dtype: Any, part: Any) -> None:
    """This is without checkpointing, and without what the loss keeps for itself."""
    c, batch = dataclasses.replace(shape(name), n_layer=3), 3
    model = GPT(c)
    freeze(model, part)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, batch, dtype)
    found = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    predicted = activations(c, batch, c.context_length, dtype, device="cpu", trainable=part)
    assert found == pytest.approx(predicted.held - predicted.loss, rel=0.02)
    del loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "part"), [*((name, "all") for name in SHAPES), ("modern", "last_block")]
)
def test_what_is_alive_after_a_forward_and_at_most_is_what_is_predicted(
    name: str, part: Any, dtype: Any, mode: Any
) -> None:
    c, batch = shape(name), 3
    model = GPT(c)
    freeze(model, part)
    model.recompute = mode
    with Live(model) as live:
        loss_of(model, batch, dtype).backward()  # from here on there are gradients
        before, live.peak = live.now, 0
        loss = loss_of(model, batch, dtype)
        held = live.now - before
        loss.backward()
        peak = live.peak - before
    predicted = activations(c, batch, c.context_length, dtype, mode, "cpu", trainable=part)
    assert held == pytest.approx(predicted.held, rel=0.02)
    # Autograd decides as it runs which gradients exist at once, so this is an estimate.
    assert 0.9 < (predicted.held + predicted.temporary) / peak < 1.25


# Stages


def test_deepspeed_holds_at_each_stage_what_is_predicted() -> None:
    c = from_dict(
        ModelConfig,
        {"n_layer": 3, "n_embd": 256, "vocab_size": 4096, "context_length": 16},
    )
    found = stages.measure(c, workers=2)
    assert [row["stage"] for row in found["stages"]] == [0, 1, 2, 3]
    for row in found["stages"]:
        for moment in stages.MOMENTS:
            measured, predicted = row["tensors"][moment], row["predicted"][moment]
            assert measured == pytest.approx(predicted, rel=0.1), (row["stage"], moment)
    lines = stages.table(found).splitlines()
    assert len(lines) == 6 and lines[0].startswith(f"{parameters(c).total:,} parameters")


def test_adapters_cost_the_state_of_their_own_weights_at_each_stage() -> None:
    keys = {"n_layer": 3, "n_embd": 256, "vocab_size": 4096, "context_length": 16}
    c, lora = from_dict(ModelConfig, keys), LoraConfig(rank=32)
    for row in stages.measure(c, workers=2, lora=lora, only=(0, 1, 3))["stages"]:
        sizes, stage = row["tensors"], row["stage"]
        for moment in stages.MOMENTS:
            expected = row["predicted"][moment]
            assert sizes[moment] == pytest.approx(expected, rel=0.05), (stage, moment)
        s = Setup(c, 8, num_workers=2, zero_stage=stage, dtype="fp32", lora=lora)
        if stage < 3:  # which also gathers small weights at its first step
            state = sizes["stepped"] - sizes["made"]
            assert state == pytest.approx(costs(s).optimizer_state, rel=0.05), stage


@given(s=setups())
@few
def test_totals_are_the_sums_of_their_parts(s: Setup) -> None:
    found = costs(s)
    parts = [v for k, v in vars(found).items() if k not in ("activations", "moments")]
    assert all(part >= 0 for part in parts)
    assert found.total - found.activations.held == found.states
    assert found.peak == found.total + found.temporary + ALLOWANCE
    # At stage 3, DeepSpeed's linear layer keeps no bf16 copies of weights.
    spared = found.activations.autocast if s.zero_stage == 3 else 0
    assert found.temporary >= max(found.activations.temporary - spared, 0)
    assert found.moments[found.fullest] == found.peak - found.states - ALLOWANCE
    assert (found.host > 0) == (s.offload_optimizer or s.offload_parameters)
    assert found.lines()[-1 - bool(found.host)].startswith("peak of a step")


@given(s=setups(), more=st.integers(1, 8))
@few
def test_more_tokens_cost_more_and_more_workers_or_checkpointing_do_not(
    s: Setup, more: int
) -> None:
    base = costs(s)
    assert costs(dataclasses.replace(s, seq_len=s.seq_len + more)).peak >= base.peak
    larger = dataclasses.replace(s, micro_batch_size=s.micro_batch_size + more)
    assert costs(larger).total > base.total
    wider = costs(dataclasses.replace(s, num_workers=2 * max(2, s.num_workers)))
    if s.num_workers > 1:
        assert wider.states <= base.states
    held = [
        activations(s.model, s.micro_batch_size, s.seq_len, s.dtype, mode, s.device).blocks  # type: ignore[arg-type]
        for mode in MODES
    ]
    assert held == sorted(held, reverse=True)


@pytest.mark.parametrize("name", sorted(PRESETS))
@given(workers=st.integers(2, 64), kind=st.sampled_from(["adamw", "muon"]))
@settings(deadline=None, max_examples=5)
def test_each_stage_holds_no_more_than_the_one_before(name: str, workers: int, kind: Any) -> None:
    c = preset(name)
    s = Setup(c, 256, num_workers=workers, optimizer_kind=kind, reduce_bucket=1000)
    of = [costs(dataclasses.replace(s, zero_stage=stage)) for stage in (0, 1, 2, 3)]  # type: ignore[arg-type]
    assert of[0].states > of[1].states > of[2].states
    if name != "quickstart":  # whose weights are too small to be sharded
        assert of[2].states > of[3].states
    assert of[0].optimizer_state > of[1].optimizer_state == of[2].optimizer_state


@given(c=models(), kind=st.sampled_from(["adamw", "muon"]))
@few
def test_one_worker_alone_saves_nothing_and_pays_for_the_master_copy(
    c: ModelConfig, kind: Any
) -> None:
    s = Setup(c, 8, optimizer_kind=kind, reduce_bucket=1000)
    size = 4 * parameters(c).total
    none, *others = (costs(dataclasses.replace(s, zero_stage=stage)) for stage in (0, 1, 2, 3))  # type: ignore[arg-type]
    state = 2 * size - (4 * hidden_matrices(c) if kind == "muon" else 0)
    assert (none.weights, none.master_weights) == (size, 0)
    for found in (none, *others):
        assert (found.weights, found.gradients, found.optimizer_state) == (size, size, state)
    assert all(found.master_weights == size for found in others)


@given(s=setups())
@few
def test_offloading_moves_bytes_from_the_device_to_the_host(s: Setup) -> None:
    stage: Any = s.zero_stage or 1
    s = dataclasses.replace(s, zero_stage=stage, optimizer_kind="adamw", offload_parameters=False)
    here = costs(dataclasses.replace(s, offload_optimizer=False))
    there = costs(dataclasses.replace(s, offload_optimizer=True))
    assert (there.optimizer_state, there.master_weights) == (0, 0)
    assert there.host >= here.optimizer_state + here.master_weights
    assert there.weights == here.weights


# What fits


def test_the_presets_fit_on_the_cards_that_they_are_meant_for() -> None:
    """The cards are one of 24 GB, and eight A100s of 40 GB. 92% of a card's memory is used."""
    small, card = 24 * GIB * USABLE, 40 * GIB * USABLE
    gpt2 = Setup(preset("gpt2-163m"), 1024)
    casa = Setup(preset("casa-350m"), 2048)
    lf = Setup(preset("lf-269m"), 2048, num_workers=8)
    for setup, memory, least in (
        (gpt2, small, (16, 32, 64)),
        (casa, small, (4, 8, 16)),
        (lf, card, (8, 16, 32)),
    ):
        for mode, at_least in zip(MODES, least, strict=True):
            s = dataclasses.replace(setup, activation_checkpointing=mode)  # type: ignore[arg-type]
            assert costs(dataclasses.replace(s, micro_batch_size=at_least)).peak <= memory
