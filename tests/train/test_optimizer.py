"""Optimizers: Muon as in the paper, the same at ZeRO stages 0, 1 and 2, in real DeepSpeed."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.ranks import (
    ACCUMULATED,
    RANKS,
    SHARES,
    STEPS,
    batches,
    distance,
    engine_of,
    make_model,
    on_ranks,
    save,
)
from manta.config import from_dict
from manta.errors import ConfigError
from manta.train.checkpoints import fragments
from manta.train.step import muon
from manta.train.step.muon import MuonAdamW, orthogonalise
from manta.train.step.optimizer import OptimizerConfig, make_optimizer

OPTIMIZERS = {
    "muon": OptimizerConfig(kind="muon"),
    "muon-keys": OptimizerConfig(
        kind="muon", muon_lr=5e-3, muon_momentum=0.8, muon_weight_decay=0.3, embedding_lr=1e-2,
        grad_clip=0.5,
    ),
    "adamw-keys": OptimizerConfig(embedding_lr=1e-2, head_lr=3e-3),
}  # fmt: skip
CASES = [
    ("modern", "muon"), ("modern", "muon-keys"), ("gpt2", "muon"), ("gpt2", "adamw-keys"),
    ("lstm", "muon"),
]  # fmt: skip


# ---- the reference: one process, no DeepSpeed, Muon written out from the paper


def paper_update(gradient: Tensor, buffer: Tensor, beta: float) -> Tensor:
    """Algorithm 2 of Jordan et al. 2024 with Nesterov momentum, on one matrix, in float64, with the
    quintics of Amsel et al. 2025."""
    buffer.mul_(beta).add_((1 - beta) * gradient)
    x = (1 - beta) * gradient + beta * buffer
    x = x.double() / (1.01 * x.double().norm())
    for a, b, c in muon.QUINTICS:
        y = x / 1.01
        gram = y @ y.T
        x = a * y + b * gram @ y + c * gram @ gram @ y
    return x


def plain_training(name: str, c: OptimizerConfig) -> dict[str, Tensor]:
    """The weights after STEPS steps."""
    torch.set_num_threads(1)
    model = make_model(name)
    matrices = {n: p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2}
    muon = matrices if c.kind == "muon" else {}
    rest = [(n, p) for n, p in model.named_parameters() if n not in muon]
    peaks = {"embedding.weight": c.embedding_lr, "positions.weight": c.embedding_lr}
    peaks["head.weight"] = c.head_lr
    groups = [
        {"params": [p], "lr": peaks.get(n) or c.lr, "weight_decay": c.weight_decay * (p.dim() > 1)}
        for n, p in rest
    ]
    adamw = torch.optim.AdamW(groups, betas=c.betas, eps=c.eps)
    tops = [group["lr"] for group in adamw.param_groups]
    buffers = {name: torch.zeros_like(p) for name, p in muon.items()}
    m = model.config
    for share, batch in zip(SHARES, batches(model), strict=True):
        model(batch[:, :-1], batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        for group, top in zip(adamw.param_groups, tops, strict=True):
            group["lr"] = share * top
        adamw.step()
        for name, p in muon.items():
            rows = [p.size(0)]
            if "qkv" in name:
                rows = [h * m.head_size for h in (m.n_head, m.kv_heads, m.kv_heads)]
            if m.family == "lstm":
                rows = [m.n_embd] * 4  # a matrix for each gate
            lr = share * (c.muon_lr or c.lr)
            decay = c.weight_decay if c.muon_weight_decay is None else c.muon_weight_decay
            with torch.no_grad():
                parts = [part.split(rows) for part in (p, p.grad, buffers[name])]
                for weight, gradient, buffer in zip(*parts, strict=True):
                    update = paper_update(gradient, buffer, c.muon_momentum or 0.95)
                    update *= 0.2 * math.sqrt(max(weight.shape))
                    weight.mul_(1 - lr * decay).sub_(lr * update)
        model.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


# ---- the same in DeepSpeed


def run_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Runs every setting, one after the other, because starting the processes costs the most."""
    results: dict[str, Any] = {"sliced": run_slices(rank, world_size)}
    for model, kind in CASES:
        for stage in (0, 1, 2):
            key = f"{model} {kind} {stage}"
            results[key] = engine_training(model, OPTIMIZERS[kind], stage, rank)
    for stage in (0, 1, 2):
        results[f"resumed {stage}"] = resumed(stage, rank, f"{folder}/at-{stage}")
    for stage in (0, 1, 2):  # last, because DeepSpeed keeps autocast on after it
        trained = engine_training("modern", OPTIMIZERS["muon"], stage, rank, "bf16")
        results[f"bf16 {stage}"] = trained
    return results


def steps(engine: Any, c: OptimizerConfig, rank: int, which: range) -> dict[str, Tensor]:
    all_batches = list(batches(engine.module))
    for step in which:
        engine.set_lr(SHARES[step])
        mine = all_batches[step].chunk(RANKS)[rank]
        for index, micro in enumerate(mine.chunk(ACCUMULATED)):
            loss = engine(micro[:, :-1], micro[:, 1:])
            engine.backward(loss, is_last=index == ACCUMULATED - 1)
            if index == ACCUMULATED - 1:
                engine.step(c.grad_clip)
    return engine.full_weights()


def engine_training(
    name: str, c: OptimizerConfig, stage: int, rank: int, dtype: str = "fp32"
) -> dict[str, Tensor]:
    return steps(engine_of(name, c, stage, dtype), c, rank, range(STEPS))


def resumed(stage: int, rank: int, folder: str) -> Any:
    """Weights of a run that resumed from its checkpoint, of one that was never interrupted, and of
    one that resumed with other rates and decays."""
    c = OPTIMIZERS["muon"]
    first = engine_of("modern", c, stage)
    steps(first, c, rank, range(2))
    index = save(first, rank, Path(folder))
    whole = steps(first, c, rank, range(2, STEPS))
    found = [whole]
    other = dataclasses.replace(
        c, lr=1e-9, weight_decay=0.0, muon_momentum=0.5, embedding_lr=1e-9, grad_clip=0.25
    )
    for optimizer in (c, other):
        again = engine_of("modern", optimizer, stage, start=torch.load(f"{folder}/weights.pt"))
        fragments.load_state(again, index, Path(folder))
        start = again.full_weights()
        found.append(steps(again, optimizer, rank, range(2, STEPS)))
    clip = again._zero.clip_grad if stage else 0.25
    return [*found, start, clip]


# One weight spans all slices, some span two, some one; the last slice is mostly padding.
SLICED = [(30, 20), (7, 5), (1, 9), (6, 6), (6, 6), (4, 11)]


def run_slices(rank: int, world_size: int) -> dict[str, Any]:
    """Muon on whole weights and on this rank's slice of them, as ZeRO has it."""
    generator = torch.Generator().manual_seed(4)
    c = OptimizerConfig(kind="muon", lr=0.1)
    total = sum(math.prod(shape) for shape in SLICED)
    size = -(-total // world_size) + 7
    padding = torch.zeros(size * world_size - total)
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SLICED]

    def laid_out(tensors: list[Tensor]) -> Tensor:
        flat = torch.cat([*(t.detach().flatten() for t in tensors), padding])
        return flat[rank * size : (rank + 1) * size].clone()

    piece = torch.nn.Parameter(laid_out(weights))
    both = []
    for params in (weights, [piece]):
        group = {"params": params, "shapes": SLICED, "momentum": 0.9, "weight_decay": 0.1}
        both.append(
            MuonAdamW(
                [group], torch.float32, lr=c.lr, betas=c.betas, eps=c.eps, rounds=c.muon_rounds
            )
        )
    for _ in range(3):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator)
        piece.grad = laid_out([p.grad for p in weights if p.grad is not None])
        for optimizer in both:
            optimizer.step()
    difference = (piece.detach() - laid_out(weights)).abs().max()
    if world_size > 1:
        dist.all_reduce(difference, dist.ReduceOp.MAX)
    return {"difference": difference, "weights": [p.detach() for p in weights]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(run_rank, RANKS, tmp_path_factory.mktemp("optimizer"))


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_every_stage_trains_as_plain_pytorch_does(
    trained: dict[str, Any], model: str, kind: str
) -> None:
    c = OPTIMIZERS[kind]
    start = dict(make_model(model).named_parameters())
    # AdamW takes a full step where a gradient is only rounding; ranks sum in other orders there.
    tolerance = 1e-5 if c.kind == "muon" else 1e-4
    expected = plain_training(model, c)
    assert distance(expected, start) > 1e-3  # it has learned
    for stage in (0, 1, 2):
        found = distance(trained[f"{model} {kind} {stage}"], expected)
        assert found < tolerance, f"stage {stage}: {found}"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_goes_on_bit_for_bit_and_with_the_configs_own_rates(
    trained: dict[str, Any], stage: int
) -> None:
    whole, again, slow, start, clip = trained[f"resumed {stage}"]
    assert distance(again, whole) == 0
    assert distance(slow, start) < 1e-6  # the config's rate, not the checkpoint's
    assert clip == 0.25


def test_stages_agree_in_bf16(trained: dict[str, Any]) -> None:
    for stage in (0, 1, 2):
        found = trained[f"bf16 {stage}"]
        assert distance(found, trained["bf16 0"]) < 0.01  # bf16 rounds to 0.004
        assert 1e-4 < distance(found, trained["modern muon 0"]) < 0.05


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(-12, 12), st.integers(0, 9), st.integers(3, 5)
)
def test_orthogonalised_matrices_have_singular_values_of_about_one(
    rows: int, columns: int, exponent: float, seed: int, rounds: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    left = torch.linalg.qr(torch.randn(2, rows, small, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(2, columns, small, generator=generator)).Q
    values = 0.05 + torch.rand(2, 1, small, generator=generator)
    x = 10**exponent * (left * values) @ right.mT
    found = orthogonalise(x, torch.float32, rounds)
    assert found.shape == x.shape
    singular = torch.linalg.svdvals(found)
    # The quintics' result for any value from 0.002 of the norm on.
    low, high = {3: (0.18, 1.88), 4: (0.43, 1.57), 5: (0.86, 1.13)}[rounds]
    assert singular.min() > low and singular.max() < high
    assert not orthogonalise(torch.zeros_like(x), torch.float32).any()


def test_muon_is_torchs_own_where_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon has one process, treats each weight as one matrix, computes always in bf16,
    and uses one quintic for all rounds."""
    monkeypatch.setattr(muon, "QUINTICS", ((3.4445, -4.7750, 2.0315),) * 5)
    monkeypatch.setattr(muon, "SAFETY", 1.0)
    c = OptimizerConfig(kind="muon", lr=1e-2)
    ours, theirs = make_model("modern"), make_model("modern")
    mine = make_optimizer(ours, c, "bf16")
    weights = {n: p for n, p in theirs.named_parameters() if "mlp" in n and p.dim() == 2}
    peer = torch.optim.Muon(
        weights.values(), lr=c.lr, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    start = copy.deepcopy(weights)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        mine.step()
        peer.step()
    found = dict(ours.named_parameters())
    for name, q in weights.items():
        moved = (q - start[name]).norm()
        assert (found[name] - q).norm() < 0.03 * moved, name


def test_any_slice_of_the_matrices_is_updated_as_the_whole(
    trained: dict[str, Any],
) -> None:
    alone, together = run_slices(0, 1), trained["sliced"]
    assert alone["difference"] < 1e-5 and together["difference"] < 1e-5
    for a, b in zip(alone["weights"], together["weights"], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_each_group_has_its_own_peak() -> None:
    c = OptimizerConfig(kind="muon", lr=1.0, muon_lr=2.0, embedding_lr=3.0, head_lr=4.0)
    groups = make_optimizer(make_model("gpt2"), c).param_groups
    peaks = {group["name"]: group["peak_lr"] for group in groups}
    assert peaks == {"matrices": 2.0, "embeddings": 3.0, "head": 4.0, "vectors": 1.0}
    tied = make_optimizer(make_model("modern"), OptimizerConfig(lr=1.0)).param_groups
    assert [group["name"] for group in tied] == ["matrices", "embeddings", "vectors"]
    assert {group["lr"] for group in tied} == {1.0}
    counted = sum(p.numel() for group in tied for p in group["params"])
    assert counted == sum(p.numel() for p in make_model("modern").parameters())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"muon_lr": 0.02}, ["muon_lr=0.02", "set optimizer.kind=muon"]),
        ({"muon_momentum": 0.9}, ["muon_momentum=0.9", "omit it"]),
        ({"muon_weight_decay": 0.0}, ["muon_weight_decay=0"]),
        ({"kind": "muon", "muon_momentum": 1.0}, ["muon_momentum"]),
        ({"kind": "sgd"}, ["kind", "adamw"]),
    ],
)
def test_a_key_of_another_optimizer_is_refused(keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(OptimizerConfig, keys)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_what_the_rest_of_the_run_rules_out_is_said() -> None:
    muon = OptimizerConfig(kind="muon")
    assert [muon.conflicts(stage, True) for stage in (0, 1, 2)] == [[], [], []]
    (line,) = muon.conflicts(3, True)
    assert "zero_stage=2" in line
    head = OptimizerConfig(head_lr=1e-3)
    assert head.conflicts(3, False) == []
    (line,) = head.conflicts(0, True)
    assert "embedding_lr" in line
