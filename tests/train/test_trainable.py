"""Weights that do not learn, and adapters: each stage trains like a plain loop, and resumes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import (
    ACCUMULATED,
    MICRO_BATCH,
    STEPS,
    batches,
    device,
    distance,
    make_model,
    on_ranks,
    save,
    train,
)  # fmt: skip
from manta.config import load
from manta.errors import ConfigError
from manta.finetune.settings import FinetuneConfig
from manta.model.gpt import GPT
from manta.model.lora import LoraConfig, attach
from manta.model.trainable import blocks_trained, freeze, learning, learns, problems
from manta.train.checkpoints import fragments
from manta.train.settings import PretrainConfig
from manta.train.step.engine import Engine
from manta.train.step.optimizer import OptimizerConfig, make_optimizer

HALF = STEPS // 2
ADAMW, MUON = OptimizerConfig(), OptimizerConfig(kind="muon")
# Model, weights that learn, optimizer, stages.
CASES: dict[str, tuple[str, Any, OptimizerConfig, tuple[int, ...]]] = {
    "last block": ("modern", "last_block", ADAMW, (0, 1, 2, 3)),
    "head": ("gpt2", "head", ADAMW, (0, 3)),
    "muon": ("gpt2", "last_block", MUON, (0, 2)),
    "adapters": ("modern", LoraConfig(rank=4), ADAMW, (0, 1, 2, 3)),
    "adapters with muon": ("gpt2", LoraConfig(rank=3, embeddings=True), MUON, (1, 2)),
}


def frozen(name: str, which: Any) -> GPT:
    model = make_model(name)
    if isinstance(which, LoraConfig):
        attach(model, which)
    else:
        freeze(model, which)
    return model


def engine_of(model: GPT, c: OptimizerConfig, stage: int) -> Engine:
    sizes = {"micro_batch_size": MICRO_BATCH, "grad_accum_steps": ACCUMULATED}
    return Engine(model, c, device(), zero_stage=stage, **sizes)


def plainly(model: GPT, c: OptimizerConfig) -> dict[str, torch.Tensor]:
    """The weights after the steps of `train` in a plain loop."""
    optimizer = make_optimizer(model, c)
    for batch in batches(model):
        model(batch[:, :-1], batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def run_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Trains half the steps at each stage and saves; goes on, and starts again at another stage."""
    found: dict[str, Any] = {}
    for case, (name, which, c, stages) in CASES.items():
        for stage in stages:
            at = Path(folder, f"{case} {stage} of {world_size}")
            model = frozen(name, which)
            if rank:  # all ranks start from the first one's weights
                for weight in model.parameters():
                    weight.data.normal_()
            engine = engine_of(model, c, stage)
            train(engine, range(HALF))
            index = save(engine, rank, at)
            found[f"{case} {stage}"] = train(engine, range(HALF, STEPS))
            states = engine.optimizer.state.values()
            found[f"{case} {stage} state"] = sum(
                value.numel() for state in states for key, value in state.items() if key != "step"
            )
            found[f"{case} {stage} index"] = index
            found[f"{case} {stage} gradients"] = {
                n for n, w in engine.module.named_parameters() if w.grad is not None
            }
    return found


def run_alone(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Trains, and goes on from what two ranks saved at one stage, at another stage."""
    return {"one": run_rank(rank, world_size, folder), "again": again(folder)}


def again(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case, (name, which, c, stages) in CASES.items():
        for saved, stage in zip(stages, (*stages[1:], stages[0]), strict=True):
            at = Path(folder).parent / "two" / f"{case} {saved} of 2"
            model = frozen(name, which)
            model.load_state_dict(torch.load(at / "weights.pt"), strict=False)
            engine = engine_of(model, c, stage)
            fragments.load_state(engine, json.loads((at / "index.json").read_text()), at)
            found[f"{case} {saved}"] = train(engine, range(HALF, STEPS))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trainable")
    for name in ("one", "two"):
        (folder / name).mkdir()
    two = on_ranks(run_rank, 2, folder / "two")
    return {"two": two, **on_ranks(run_alone, 1, folder / "one")}


@pytest.mark.parametrize("case", CASES)
def test_each_stage_trains_what_a_plain_loop_trains(
    found: dict[str, dict[str, Any]], case: str
) -> None:
    name, which, c, stages = CASES[case]
    model = frozen(name, which)
    before = copy.deepcopy(dict(model.named_parameters()))
    after = plainly(model, c)
    expected = {n for n, _ in learning(model)}
    assert {n for n in after if not torch.equal(after[n], before[n])} == expected
    count = sum(w.numel() for _, w in learning(model))
    for workers in ("one", "two", "again"):
        for stage in stages:
            made = found[workers][f"{case} {stage}"]
            assert distance(made, after) < 1e-5, (workers, stage)
            assert all(torch.equal(made[n], before[n]) for n in before.keys() - expected)
            if workers == "again":
                continue
            assert found[workers][f"{case} {stage} index"].keys() == expected
            assert found[workers][f"{case} {stage} gradients"] <= expected
            if c.kind == "adamw":
                share = count if workers == "one" or not stage else count / 2
                state = found[workers][f"{case} {stage} state"]
                assert 2 * share <= state <= 2.1 * share + 64, (workers, stage)


def test_the_last_blocks_the_norm_and_the_head_learn() -> None:
    gpt2, modern = make_model("gpt2"), make_model("modern")  # the head is its own; is tied
    assert {n for n, _ in gpt2.named_parameters() if learns(n, "head", gpt2.config)} == {
        "head.weight", "norm.weight", "norm.bias",
    }  # fmt: skip
    freeze(modern, "last_block")
    names = {n for n, _ in learning(modern)}
    assert names == {n for n, _ in modern.named_parameters() if n.startswith(("blocks.1.", "norm"))}
    freeze(modern, "last_two")
    assert {n for n, w in modern.named_parameters() if not w.requires_grad} == {"embedding.weight"}
    freeze(modern, "all")
    assert len(learning(modern)) == len(list(modern.parameters()))
    assert blocks_trained("last_two", 1) == 1
    # A classifier of the same model has a head of its own.
    assert learns("head.weight", "head", modern.config.classifying(("a", "b")))
    assert not learns("head.weight", "head", modern.config)
    assert "use trainable=last_block" in problems("head", modern.config)[0]


@pytest.mark.parametrize(
    ("cls", "keys", "words"),
    [
        (PretrainConfig, ["trainable=head"], "come from a checkpoint; .* jobs/finetune.py"),
        (
            FinetuneConfig,
            ["base=a", "kind=text", "trainable=heads"],
            "trainable='heads': should be 'all'",
        ),
        (
            FinetuneConfig,
            ["base=a", "kind=text", "trainable=head", "optimizer.kind=muon"],
            "of which trainable=head trains none: set optimizer.kind=adamw",
        ),
    ],
)
def test_what_cannot_learn_is_refused(cls: Any, keys: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(cls, keys)
    assert load(FinetuneConfig, ["base=a", "kind=text", "trainable=head"]).trainable == "head"


def test_a_head_that_does_not_learn_has_no_gradient() -> None:
    model = frozen("gpt2", "last_block")
    model.head.weight.requires_grad_(False)
    tokens = next(batches(model))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert model.head.weight.grad is None and model.norm.weight.grad is not None
    plain = torch.nn.functional.cross_entropy(
        model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    )
    (expected,) = torch.autograd.grad(plain, [model.norm.weight])
    assert torch.allclose(model.norm.weight.grad, expected, atol=1e-6)
