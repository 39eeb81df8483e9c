"""The mean over all trained targets of a step, however these are spread over micro batches and
ranks."""

import itertools
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.ranks import MODELS, distance, make_model, on_ranks
from helpers.steps import step_of
from manta.model.gpt import IGNORED
from manta.train.objectives.next_token import Batch, NextToken

SEQUENCES, LENGTH = 8, 16
# With this epsilon, AdamW's first step is proportional to the gradient.
LINEAR = {"lr": 100.0, "eps": 1000.0, "weight_decay": 0.0, "grad_clip": 0.0}
SPLITS = {1: (1, 2, 4, 8), 2: (1, 2, 4)}
"""Micro batches in a rank's share of the step, by the number of ranks."""


class Some(NextToken):
    """Trains the targets of `mask`, in the order in which the sequences are drawn."""

    def __init__(self, mask: np.ndarray):
        super().__init__(cast(Any, None), document_mask=False)
        object.__setattr__(self, "mask", mask)

    def batch(self, ids: np.ndarray) -> Batch:
        trained = self.mask[ids[:, 0]]  # type: ignore[attr-defined]
        return Batch(ids, trained, int(trained.sum()))


def sequences() -> tuple[np.ndarray, np.ndarray]:
    """(8, 17) ids, each sequence begun by its number, and the targets that are trained: from none
    to all of them."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, MODELS["modern"]["vocab_size"], (SEQUENCES, LENGTH + 1))
    ids[:, 0] = np.arange(SEQUENCES)
    mask = rng.random((SEQUENCES, LENGTH)) < np.linspace(0, 1, SEQUENCES)[:, None]
    return ids, mask


def after_a_step(stage: int, rank: int, world_size: int, count: int) -> tuple[Any, float]:
    """The weights after one step, and its mean loss."""
    ids, mask = sequences()
    weights, figures = step_of(
        make_model("modern"), Some(mask), ids, LINEAR,
        stage=stage, rank=rank, world_size=world_size, count=count,
    )  # fmt: skip
    return weights, figures["loss"]


def run_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    cases = itertools.product((0, 1, 2, 3), SPLITS[world_size])
    return {f"{s}-{n}": after_a_step(s, rank, world_size, n) for s, n in cases}


def in_plain_torch() -> tuple[dict[str, Tensor], float]:
    """The weights after one step, and its loss: the mean over all trained targets at once."""
    ids, mask = sequences()
    model = make_model("modern")
    targets = torch.from_numpy(np.where(mask, ids[:, 1:], IGNORED))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LINEAR["lr"], eps=LINEAR["eps"], weight_decay=0.0
    )
    loss = model(torch.from_numpy(ids[:, :-1]), targets)
    loss.backward()
    optimizer.step()
    return dict(model.named_parameters()), float(loss)


@pytest.mark.parametrize("world_size", SPLITS)
def test_the_mean_is_over_all_trained_targets_of_a_step(world_size: int, tmp_path: Path) -> None:
    weights, loss = in_plain_torch()
    start = dict(make_model("modern").named_parameters())
    assert distance(start, weights) > 1e-2  # a step that is worth comparing
    for name, (found, its_loss) in on_ranks(run_rank, world_size, tmp_path).items():
        assert its_loss == pytest.approx(loss, rel=1e-5), name
        moved = {key: found[key] - start[key] for key in found}
        expected = {key: (weights[key] - start[key]).detach() for key in found}
        assert distance(moved, expected) < 1e-5, name
