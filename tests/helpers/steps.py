"""One optimizer step of an objective, spread over micro batches and ranks."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from helpers.ranks import device
from manta.config import from_dict
from manta.model.gpt import LanguageModel
from manta.train.objectives.next_token import NextToken
from manta.train.objectives.weights import weighted
from manta.train.step.engine import Engine
from manta.train.step.optimizer import OptimizerConfig


def step_of(
    model: LanguageModel,
    objective: NextToken,
    ids: np.ndarray,
    optimizer: dict[str, Any],
    *,
    stage: int,
    rank: int,
    world_size: int,
    count: int,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The weights after one step on all ranks' rows of ids, `count` micro batches a rank; and the
    means of the objective's figures over the step."""
    mine = np.array_split(ids, world_size)[rank]
    engine = Engine(
        model, from_dict(OptimizerConfig, optimizer), device(), zero_stage=stage,
        micro_batch_size=len(mine) // count, grad_accum_steps=count,
    )  # fmt: skip
    batches = iter(objective.batches(iter(np.array_split(mine, count)), count))
    totals = torch.zeros(len(objective.logged))
    drawn = weighted(lambda: next(batches), count, torch.device("cpu"))
    for index, (batch, weight) in enumerate(drawn):
        tokens, targets = batch.to(torch.device("cpu"))
        figures = objective.figures(engine, tokens, targets)
        found = {name: weight * value for name, value in figures.items()}
        engine.backward(found["loss"], is_last=index == count - 1)
        means = torch.stack([found[name].detach() for name in objective.logged])
        totals += means / (count * world_size)
    engine.step(0.0)
    dist.all_reduce(totals)
    return engine.full_weights(), dict(zip(objective.logged, totals.tolist(), strict=True))
