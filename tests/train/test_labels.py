"""The objective of a classifier: the mean over all labelled texts of a step, however these are
packed and spread, and the figures of the val split."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.ranks import distance, make_model, on_ranks
from helpers.steps import step_of
from manta.data.labelled import balanced_weights
from manta.model.gpt import GPT
from manta.train.objectives.labels import Labels

VOCAB, START, ROW = 100, 99, 16
NAMES = ("bird", "cat", "ray")
WEIGHTS = (0.5, 1.0, 3.0)
LINEAR = {"lr": 100.0, "eps": 1000.0, "weight_decay": 0.0, "grad_clip": 0.0}
SPLITS = {1: (1, 8), 2: (1, 4)}  # micro batches in a rank's share, by the number of ranks


def classifier(name: str = "modern") -> GPT:
    torch.manual_seed(1)
    return GPT(make_model(name).config.classifying(NAMES))


def objective(weights: tuple[float, ...] | None = WEIGHTS) -> Labels:
    tokenizer = cast(Any, SimpleNamespace(vocab_size=VOCAB, start=START, eot=START))
    return Labels(tokenizer, True, NAMES, weights)


def texts() -> list[tuple[list[int], int]]:
    """Texts of 1 to 12 tokens, each with the number of its label."""
    rng = np.random.default_rng(3)
    sizes = [1, 12, *rng.integers(2, 7, 8).tolist()]
    return [(rng.integers(0, START, size).tolist(), i % len(NAMES)) for i, size in enumerate(sizes)]


def rows() -> np.ndarray:
    """(8, 17) ids of the texts in whole rows, the last of which holds none."""
    made = np.full((8, ROW + 1), START)
    at, row = 0, 0
    for ids, label in texts():
        piece = [START, *ids, VOCAB + label]
        if at + len(piece) > ROW:
            at, row = 0, row + 1
        made[row, at : at + len(piece)] = piece
        at += len(piece)
    assert row < 7
    return made


def after_a_step(stage: int, rank: int, world_size: int, count: int) -> tuple[Any, float]:
    """The weights after one step, and its mean loss."""
    weights, figures = step_of(
        classifier(), objective(), rows(), LINEAR,
        stage=stage, rank=rank, world_size=world_size, count=count,
    )  # fmt: skip
    return weights, figures["loss"]


def run_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    cases = itertools.product((0, 1, 2, 3), SPLITS[world_size])
    return {f"{s}-{n}": after_a_step(s, rank, world_size, n) for s, n in cases}


def alone(model: GPT) -> tuple[Tensor, Tensor]:
    """The logits of each text by itself, (N, K), and the labels, (N,)."""
    logits = [model(torch.tensor([[START, *ids]]), last_only=True)[0, 0] for ids, _ in texts()]
    return torch.stack(logits), torch.tensor([label for _, label in texts()])


@pytest.mark.parametrize("world_size", SPLITS)
def test_the_mean_is_over_all_labelled_texts_of_a_step(world_size: int, tmp_path: Path) -> None:
    model = classifier()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LINEAR["lr"], eps=LINEAR["eps"], weight_decay=0.0
    )
    logits, labels = alone(model)
    weights = torch.tensor(WEIGHTS)[labels]
    loss = (F.cross_entropy(logits, labels, reduction="none") * weights).mean()
    loss.backward()
    optimizer.step()
    expected = {n: w.detach() - start[n] for n, w in model.named_parameters()}
    assert expected["head.weight"].norm() > 1e-2  # a step that is worth comparing
    for name, (found, its_loss) in on_ranks(run_rank, world_size, tmp_path).items():
        assert its_loss == pytest.approx(float(loss.detach()), rel=1e-5), name
        assert distance({n: found[n] - start[n] for n in found}, expected) < 1e-5, name


@pytest.mark.parametrize("family", ["modern", "gpt2"])
def test_a_packed_text_has_the_logits_that_it_has_alone(family: str) -> None:
    model = classifier(family).eval()
    batch = objective().batch(rows())
    assert batch.units == len(texts())
    tokens, targets = batch.to(torch.device("cpu"))
    with torch.no_grad():
        logits, labels = objective()._logits(model, tokens, targets)
        expected, theirs = alone(model)
    assert torch.equal(labels, theirs)
    assert torch.allclose(logits, expected, atol=1e-6)


def test_no_label_is_ever_an_input() -> None:
    seen = []

    def model(tokens: Tensor, **keys: Tensor) -> Tensor:
        seen.append(tokens)
        return torch.zeros(int(keys["at"].sum()), len(NAMES))

    objective().figures(model, *objective().batch(rows()).to(torch.device("cpu")))
    assert int(seen[0].max()) == START < VOCAB


def test_the_figures_of_the_val_split_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    model, found = classifier().eval(), objective()
    with torch.no_grad():
        sums = sum(
            found.sums(model, *found.batch(part).to(torch.device("cpu"))).numpy()
            for part in np.array_split(rows(), 4)
        )
        logits, labels = alone(model)
    figures, given = found.val_figures(cast(np.ndarray, sums)), logits.argmax(1)
    assert figures == pytest.approx(
        {
            "loss": float(F.cross_entropy(logits, labels)),
            "accuracy": metrics.accuracy_score(labels, given),
            "macro_f1": metrics.f1_score(labels, given, average="macro"),
        }
    )
    half = dataclasses.replace(found, weights=None)
    assert half.val_figures(cast(np.ndarray, sums)) == figures


def test_balanced_weights_count_all_labels_alike() -> None:
    weights = balanced_weights([999, 1, 0])
    assert [999 * weights[0], weights[1]] == pytest.approx([500, 500])
    assert balanced_weights([7, 7]) == [1.0, 1.0]
