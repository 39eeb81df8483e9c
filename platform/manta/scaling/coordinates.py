"""The coordinate check: how the sizes of activations grow with the width, in the first steps.

If learning rates are right for all widths, what each block adds to the residual stream, and the
logits, have about the same size at every width after each step (Yang et al. 2022, appendix D.1).
Otherwise wide models need smaller rates, and a rate that was found on a narrow one does not fit.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.model.families import model_of
from manta.model.gpt import GPT, LanguageModel
from manta.model.init import initialise
from manta.train.settings import TrainConfig
from manta.train.step.optimizer import make_optimizer

LOGITS = "logits"


@dataclasses.dataclass(frozen=True)
class Growth:
    """The sizes of activations by width, and how they grow."""

    widths: tuple[int, ...]
    sizes: dict[str, np.ndarray]
    """Mean absolute values by activation, each (widths, steps + 1); the step 0 is before training.
    Geometric means over the seeds."""

    def exponents(self, step: int) -> dict[str, float]:
        """The power of the width with which each activation grows, at a step; those that are zero
        have none."""
        x, found = np.log(self.widths), {}
        for name, values in self.sizes.items():
            column = values[:, step]
            if np.all(column > 0) and np.all(np.isfinite(column)):
                found[name] = float(np.polyfit(x, np.log(column), 1)[0])
        return found


def growth(runs: Sequence[TrainConfig], tokens: Tensor, steps: int, seeds: int = 1) -> Growth:
    """Trains each run for a few steps at its peak rates, and measures.

    Args:
        runs: configs of GPTs that differ in their width alone, with their vocabulary.
        tokens: (N,) int64 ids of a text, of at least `steps` + 1 batches.
    """
    measured: dict[str, list[np.ndarray]] = {}
    for run in runs:
        drawn = [_sizes(run, tokens, steps, run.seed + number) for number in range(seeds)]
        for name in drawn[0]:
            with np.errstate(divide="ignore"):  # the logarithm of 0: the mean is 0 then
                values = np.exp(np.mean([np.log(sizes[name]) for sizes in drawn], axis=0))
            measured.setdefault(name, []).append(values)
    widths = tuple(run.model.n_embd for run in runs)
    return Growth(widths, {name: np.stack(values) for name, values in measured.items()})


def _sizes(run: TrainConfig, tokens: Tensor, steps: int, seed: int) -> dict[str, np.ndarray]:
    """The mean absolute value of each activation after 0, 1, ... `steps` steps, each
    (steps + 1,)."""
    torch.manual_seed(seed)
    model = model_of(run.model)
    initialise(model, run.init)
    optimizer = make_optimizer(model, run.optimizer, lr_scales=run.lr_scales)
    length, rows = run.sequence_length, run.tokens_per_batch // run.sequence_length
    found: dict[str, list[float]] = {}
    for block, layer in enumerate(_blocks(model), 1):
        for part in ("attention", "mlp"):
            _watch(layer.get_submodule(part), found.setdefault(f"{part} {block}", []))
    logits_sizes = found.setdefault(LOGITS, [])
    for batch in tokens.split(rows * (length + 1))[: steps + 1]:
        batch = batch.view(rows, length + 1)
        logits = model(batch[:, :-1])
        logits_sizes.append(float(logits.detach().abs().mean()))
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        if run.optimizer.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.grad_clip)
        optimizer.step()
    return {name: np.array(values) for name, values in found.items()}


def _blocks(model: LanguageModel) -> list[nn.Module]:
    assert isinstance(model, GPT), "checked by the config"
    return list(model.blocks)


def _watch(module: nn.Module, sizes: list[float]) -> None:
    def note(_module: nn.Module, _given: Any, output: Tensor) -> None:
        sizes.append(float(output.detach().abs().mean()))

    module.register_forward_hook(note)
