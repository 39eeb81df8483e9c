"""DPO: its loss and gradient against the formula in plain torch, on any number of ranks and micro
batches, at every ZeRO stage; ln 2 at the start."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from helpers.pairs import chat_tokenizer, rows_of, some_pairs
from helpers.ranks import distance, on_ranks
from helpers.steps import step_of
from manta.config import from_dict
from manta.data import conversations
from manta.data.reference import Reference
from manta.evaluate.worker import Worker
from manta.model.gpt import GPT, ModelConfig
from manta.train.objectives.answers import Answers
from manta.train.objectives.dpo import NAMES, DpoConfig
from manta.train.objectives.preference import Preference

ROW = 384
# With this epsilon, AdamW's first step is proportional to the gradient.
LINEAR = {"lr": 100.0, "eps": 1000.0, "weight_decay": 0.0, "grad_clip": 0.0}
CONFIGS = (
    DpoConfig(),
    DpoConfig(beta=0.5, label_smoothing=0.2),
    DpoConfig(beta=0.3, sft_weight=0.7),
)
MADE = chat_tokenizer()
PAIRS = some_pairs(9)
# Pairs of each row; rows have one pair to three.
ROWS = [PAIRS[:1], PAIRS[1:3], PAIRS[3:6], PAIRS[6:8]]


def model_of(seed: int, vocab_size: int = MADE.vocab_size) -> GPT:
    torch.manual_seed(seed)
    keys = {
        "n_layer": 2, "n_embd": 48, "n_head": 4, "n_kv_head": 2, "context_length": ROW,
        "vocab_size": vocab_size,
    }  # fmt: skip
    return GPT(from_dict(ModelConfig, keys))


def ids() -> np.ndarray:
    return rows_of(MADE, ROWS, ROW)


def reference_of(model: GPT) -> Reference:
    """What an evaluation worker writes for this model."""
    keys, values, _ = Worker(model, MADE).answers(ids())
    order = np.argsort(keys)
    return Reference(keys[order], values[order])


def objective(c: DpoConfig, reference: Reference) -> Preference:
    return Preference(MADE, True, conversations.rule(MADE, "last"), c, reference)


def log_probabilities(model: GPT) -> tuple[Tensor, Tensor]:
    """The sum and the number of the log-probabilities of each pair's chosen and rejected answer,
    (P, 2) each, each conversation computed alone from all its logits."""
    sums, counts = [], []
    for pair in itertools.chain.from_iterable(ROWS):
        for key in ("chosen", "rejected"):
            (row,) = rows_of(MADE, [[pair]], ROW)
            first, second = np.flatnonzero(row == MADE.start)[:2]
            tokens = torch.from_numpy(row[first:second] if key == "chosen" else row[second:])
            until = torch.cat([tokens[1:], tokens[:1]]).eq(MADE.start).int().argmax() + 1
            tokens = tokens[: int(until)]
            text = MADE.decode(tokens.tolist())
            answer = MADE.encode(pair[key])
            before = text.index("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
            start = len(tokens) - 1 - len(MADE.encode("\n")) - len(answer)
            assert MADE.decode(tokens[:start].tolist()) == text[:before]
            logits = model(tokens[None])[0].log_softmax(-1)
            answered = tokens[start : start + len(answer) + 1]
            found = logits[start - 1 : start + len(answer)].gather(1, answered[:, None])
            sums.append(found.sum())
            counts.append(float(len(answered)))
    return torch.stack(sums).view(-1, 2), torch.tensor(counts).view(-1, 2)


def plain_loss(c: DpoConfig, model: GPT, start: GPT) -> Tensor:
    """The mean loss of all pairs, as the paper has it."""
    ours, counts = log_probabilities(model)
    with torch.no_grad():
        theirs, _ = log_probabilities(start)
    margin = c.beta * ((ours - theirs)[:, 0] - (ours - theirs)[:, 1])
    s = c.label_smoothing
    loss = -(1 - s) * F.logsigmoid(margin) - s * F.logsigmoid(-margin)
    return (loss - c.sft_weight * ours[:, 0] / counts[:, 0]).mean()


@pytest.mark.parametrize("c", CONFIGS)
def test_loss_and_gradient_are_those_of_the_formula(c: DpoConfig) -> None:
    model, again, start = model_of(1), model_of(1), model_of(2)
    made = objective(c, reference_of(start))
    inputs, targets = made.batch(ids()).to(torch.device("cpu"))
    figures = made.figures(model, inputs, targets)
    figures["loss"].backward()
    expected = plain_loss(c, again, start)
    expected.backward()
    assert tuple(figures) == made.logged == NAMES
    assert figures["loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = ({n: p.grad for n, p in m.named_parameters()} for m in (model, again))
    assert distance(*gradients) < 1e-4  # type: ignore[arg-type]
    with torch.no_grad():
        sums = made.sums(model, inputs, targets).numpy()
    for name, value in made.val_figures(sums).items():
        assert value == pytest.approx(figures[name].item(), abs=1e-5), name
    ours, _ = log_probabilities(again)
    theirs, _ = log_probabilities(start)
    chosen, rejected = (c.beta * (ours - theirs)).mean(0).tolist()
    assert figures["chosen_reward"].item() == pytest.approx(chosen, abs=1e-4)
    assert figures["rejected_reward"].item() == pytest.approx(rejected, abs=1e-4)
    assert figures["margin"].item() == pytest.approx(chosen - rejected, abs=1e-4)
    assert figures["chosen_logp"].item() == pytest.approx(ours[:, 0].mean().item(), abs=1e-3)


def test_rows_that_could_not_be_read_have_no_pair_and_a_gradient_of_zero() -> None:
    model = model_of(1)
    made = objective(DpoConfig(), reference_of(model))
    batch = made.batch(np.full((2, ROW + 1), -100))
    assert batch.units == 0
    loss = made.figures(model, *batch.to(torch.device("cpu")))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_person_is_told_when_the_chosen_answers_become_less_likely() -> None:
    made = objective(DpoConfig(beta=0.5), Reference(np.zeros(0), np.zeros(0)))

    def sums(reward: float) -> np.ndarray:
        """The sums of 2 pairs with 20 tokens in their chosen answers."""
        return np.array([2, 20, 0.6, 1, 1, reward, -2, -50], dtype=np.float64)

    assert made.warning(sums(-0.9)) is None and made.warning(sums(3)) is None
    told = made.warning(sums(-2))
    assert told is not None and "by 0.20 nats per token" in told and "dpo.sft_weight=1" in told


def peak_of_a_step(model: GPT, made: Answers) -> int:
    """The most bytes that weights, gradients and all that a step makes have at once."""
    inputs, targets = made.batch(np.repeat(ids(), 2, axis=0)).to(torch.device("cpu"))
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        made.figures(model, inputs, targets)["loss"].backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("vocab_size", [MADE.vocab_size, 5000])
def test_a_step_takes_no_more_memory_than_one_on_conversations(vocab_size: int) -> None:
    model = model_of(1, vocab_size)
    pairs = objective(DpoConfig(), reference_of(model))
    chats = Answers(MADE, True, conversations.rule(MADE))
    peak_of_a_step(model, chats)  # makes the gradients
    assert peak_of_a_step(model, pairs) <= 1.05 * peak_of_a_step(model, chats)


# --- on ranks ------------------------------------------------------------------------------------

SPLITS = {1: (1, 2, 4), 2: (1, 2)}
"""Micro batches in a rank's share of the step, by the number of ranks."""


def after_a_step(
    stage: int, rank: int, world_size: int, count: int
) -> tuple[Any, dict[str, float]]:
    """The weights after the first step of a model, and its mean figures."""
    made = objective(CONFIGS[0], reference_of(model_of(1)))
    return step_of(
        model_of(1), made, ids(), LINEAR,
        stage=stage, rank=rank, world_size=world_size, count=count,
    )  # fmt: skip


def run_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    splits = itertools.cycle(SPLITS[world_size])  # one each: test_objective.py has them all
    return {str(n): after_a_step(n, rank, world_size, next(splits)) for n in range(4)}


@pytest.mark.parametrize("world_size", SPLITS)
def test_a_step_is_that_of_the_formula_and_begins_at_ln_2(world_size: int, tmp_path: Path) -> None:
    start, model = dict(model_of(1).named_parameters()), model_of(1)
    keys = {"lr": LINEAR["lr"], "eps": LINEAR["eps"], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(model.parameters(), **keys)
    plain_loss(CONFIGS[0], model, model_of(1)).backward()
    optimizer.step()
    expected = {k: (p - start[k]).detach() for k, p in model.named_parameters()}
    for stage, (found, figures) in on_ranks(run_rank, world_size, tmp_path).items():
        assert figures["loss"] == pytest.approx(math.log(2), abs=1e-6), stage
        assert figures["margin"] == pytest.approx(0, abs=1e-6), stage
        assert distance({k: found[k] - start[k] for k in found}, expected) < 1e-4, stage
