"""The objective of pairs: the chosen answer is to gain on the rejected one, by DPO.

Shapes: B rows, T tokens, P pairs, K tokens of all answers.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manta.data import preferences
from manta.data.preferences import Answers as AnswersOfPairs
from manta.data.reference import Reference
from manta.model.inference import send
from manta.train.objectives.answers import Answers
from manta.train.objectives.dpo import NAMES, DpoConfig, figures_of_pairs
from manta.train.objectives.next_token import Batch, Figures, Model

# Nats per token. When the chosen answers have lost this much, their perplexity is a tenth higher.
DISPLACED = 0.1


class PairTargets(NamedTuple):
    """The targets of a batch of pairs, on the device."""

    ids: Tensor
    """(B, T) int64; IGNORED outside of answers."""
    places: Tensor
    """(K,) int64: the index of each target of an answer among all B * T."""
    numbers: Tensor
    """(K,) int64: the number of its answer."""
    sizes: Tensor
    """(2P,) float64: the number of tokens of each answer."""
    reference: Tensor
    """(2P,) float64: the log-probability that each answer had before training."""

    def logp(self, nats: Tensor) -> Tensor:
        """(2P,) float64: the log-probability of each answer, from the nats (B, T) of targets."""
        zeros = torch.zeros_like(self.reference)
        return zeros.index_add(0, self.numbers, -nats.flatten()[self.places].double())


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PairBatch(Batch):
    """A micro batch of pairs; its units are pairs."""

    answers: AnswersOfPairs
    reference: np.ndarray
    """(2P,) float64: the log-probability that each answer had before training."""

    def to(self, device: torch.device) -> tuple[Tensor, PairTargets]:
        inputs, ids = super().to(device)
        numbers = self.answers.of_target.ravel()
        places = np.flatnonzero(numbers >= 0)
        sizes = np.bincount(numbers[places], minlength=len(self.reference)).astype(np.float64)
        arrays = (places, numbers[places], sizes, self.reference)
        return inputs, PairTargets(ids, *(send(torch.from_numpy(a), device) for a in arrays))


def batch_of(answers: AnswersOfPairs, ids: np.ndarray, reference: np.ndarray) -> PairBatch:
    """The batch of rows of ids (B, T + 1) with these answers."""
    trained = answers.of_target >= 0
    return PairBatch(ids, trained, answers.pairs, answers=answers, reference=reference)


@dataclasses.dataclass(frozen=True)
class Preference(Answers):
    dpo: DpoConfig
    reference: Reference

    logged: ClassVar[tuple[str, ...]] = NAMES

    def batch(self, ids: np.ndarray) -> PairBatch:
        found = preferences.answers_in(self.rule, ids.astype(np.int64))
        return batch_of(found, ids, self.reference.of(found.keys))

    def figures(self, engine: Model, tokens: Tensor, targets: PairTargets) -> Figures:
        found = self._of_pairs(engine, tokens, targets)
        count = max(len(targets.reference) // 2, 1)  # rows that could not be read have no pair
        return {name: (values.sum() / count).float() for name, values in found.items()}

    def sums(self, engine: Model, tokens: Tensor, targets: PairTargets) -> Tensor:
        """The number of pairs, the tokens of their chosen answers, and the sum of each figure."""
        found = self._of_pairs(engine, tokens, targets)
        sizes = targets.sizes[::2]
        totals = [values.sum() for values in found.values()]
        return torch.stack([sizes.new_tensor(len(sizes)), sizes.sum(), *totals])

    def val_figures(self, sums: np.ndarray) -> dict[str, float]:
        pairs, _, *totals = sums.tolist()
        return {name: total / pairs for name, total in zip(self.logged, totals, strict=True)}

    def warning(self, sums: np.ndarray) -> str | None:
        _, tokens, *totals = sums.tolist()
        reward = dict(zip(self.logged, totals, strict=True))["chosen_reward"]
        lost = -reward / self.dpo.beta / tokens
        if lost <= DISPLACED:
            return None
        return (
            f"the chosen answers have become less likely, too: by {lost:.2f} nats per token since "
            "the start of training, on the val split. The model learns to avoid the rejected "
            "answers and drifts from both (likelihood displacement). A lower optimizer.lr, a "
            "larger dpo.beta, or dpo.sft_weight=1 helps; read the samples before you go on"
        )

    def _of_pairs(self, engine: Model, tokens: Tensor, targets: PairTargets) -> Figures:
        documents = self.documents(tokens)
        nats = engine(tokens, targets.ids, reduction="none", documents=documents)
        logp = targets.logp(nats)
        return figures_of_pairs(self.dpo, logp, targets.reference, targets.sizes)
