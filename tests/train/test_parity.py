"""Fifty steps of the training step, with each of its optimizations, against a plain PyTorch loop:
fp32, logits whole, every activation kept, nothing padded, compiled or fused."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.ranks import device, on_ranks
from manta.config import from_dict
from manta.model import loss as losses
from manta.model.gpt import GPT
from manta.train.build import build
from manta.train.settings import TrainConfig

STEPS, SEQUENCES, LENGTH, VOCAB = 50, 4, 32, 300
MODEL = {
    "n_layer": 3,
    "n_embd": 64,
    "n_head": 4,
    "n_kv_head": 2,
    "qk_norm": True,
    "context_length": LENGTH,
    "vocab_size": VOCAB,
}
# The settings of each run, and the largest relative distance of its losses from the plain loop's.
RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "as it is": ({}, 1e-5),
    "accumulated": ({"micro_batch_size": 1}, 1e-5),
    "selective": ({"activation_checkpointing": "selective"}, 1e-5),
    "full": ({"activation_checkpointing": "full"}, 1e-5),
    "stage 1": ({"zero_stage": 1}, 1e-5),
    "stage 3": ({"zero_stage": 3, "activation_checkpointing": "full"}, 1e-5),
    "compiled": ({"compile": "blocks", "activation_checkpointing": "selective"}, 1e-5),
    "bf16": ({"dtype": "bf16"}, 1e-2),
}


def config_of(**keys: Any) -> TrainConfig:
    tree = {
        "tokens_per_batch": SEQUENCES * LENGTH,
        "total_tokens": STEPS * SEQUENCES * LENGTH,
        "optimizer": {"lr": 3e-3},
        "model": MODEL,
    }
    return from_dict(TrainConfig, tree | keys)


def batches() -> list[Tensor]:
    """STEPS batches of a text in which each token mostly follows from the one before."""
    random = torch.Generator().manual_seed(3)
    follows = torch.randperm(VOCAB, generator=random)
    found = torch.randint(VOCAB, (STEPS, SEQUENCES, LENGTH + 1), generator=random)
    surprises = torch.rand(found.shape, generator=random) < 0.2
    for at in range(1, LENGTH + 1):
        found[:, :, at] = torch.where(
            surprises[:, :, at], found[:, :, at], follows[found[:, :, at - 1]]
        )
    return list(found)


def plain(c: TrainConfig) -> list[float]:
    """The plain loop, written by hand with the model and torch alone."""
    torch.set_num_threads(1)
    torch.manual_seed(c.seed)
    model = GPT(c.model)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    o = c.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": o.weight_decay}, {"params": rest, "weight_decay": 0}],
        lr=o.lr, betas=o.betas, eps=o.eps, foreach=False,
    )  # fmt: skip
    found = []
    for batch in batches():
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def run_rank(names: list[str], rank: int, world_size: int, folder: str) -> dict[str, list[float]]:
    losses.CPU_CHUNK = 50  # several chunks in a micro batch, the last one shorter
    found: dict[str, Any] = {name: trained(config_of(**RUNS[name][0])) for name in names}
    found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


def trained(c: TrainConfig) -> list[float]:
    c = dataclasses.replace(c, micro_batch_size=c.micro_batch)
    accum = c.grad_accum_steps(0)
    engine = build(
        c,
        c.model,
        device("bf16" if c.dtype == "bf16" else "fp32"),
        size=c.micro_batch,
        steps=accum,
        compiled=c.compile == "blocks",
    )
    found = []
    for batch in batches():
        engine.set_lr(1.0)
        sums = 0.0
        for index, micro in enumerate(batch.split(c.micro_batch)):
            loss = engine(micro[:, :-1], micro[:, 1:].contiguous())
            engine.backward(loss, is_last=index == accum - 1)
            if index == accum - 1:
                engine.step(c.optimizer.grad_clip)
            sums += loss.item() / accum
        found.append(sums)
    return found


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The losses of the runs whose tests are selected, as compiling is slow."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = {call.params.get("name") for call in calls if call}
    names = [name for name in RUNS if name in wanted] or ["compiled"]  # the last test alone
    run = functools.partial(run_rank, names)
    return on_ranks(run, 1, tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return plain(config_of())


def test_there_is_something_to_learn(expected: list[float]) -> None:
    assert expected[-1] < 0.8 * expected[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long) if name == "compiled" else name for name in RUNS],
)
def test_fifty_losses_are_those_of_the_plain_loop(
    name: str, found: dict[str, Any], expected: list[float]
) -> None:
    assert found[name] == pytest.approx(expected, rel=RUNS[name][1])


@pytest.mark.long
def test_blocks_share_their_compilations(found: dict[str, Any]) -> None:
    """The first block, which has no sum to finish, has a compilation of its own; all others share
    one. The head's loss has one for each of the two sizes of its chunks here."""
    assert found["graphs"] == 2 + 2
