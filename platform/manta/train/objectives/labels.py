"""The objective of a classifier: the label of each text, from the hidden state of its last token.

In a row of labelled texts (`data/labelled.py`), the target of a text's last token is its label's
id, and no other target is learnt.

Shapes: B sequences, T tokens, N labelled texts in them, K labels.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manta.train.objectives.next_token import Batch, Figures, NextToken, ahead


@dataclasses.dataclass(frozen=True)
class Labels(NextToken):
    labels: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    """What a text of each label counts in the loss; None: all count alike."""

    logged: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    def batch(self, ids: np.ndarray) -> Batch:
        is_label = ids[:, 1:] >= self.tokenizer.vocab_size
        return Batch(ids, is_label, int(np.count_nonzero(is_label)))

    def batches(self, ids: Iterator[np.ndarray], at_once: int) -> Iterator[Batch]:
        return ahead(super().batches(ids, at_once), at_once)

    def documents(self, tokens: Tensor) -> Tensor | None:
        return (tokens == self.tokenizer.start).cumsum(1)

    def figures(self, engine: Callable[..., Tensor], tokens: Tensor, targets: Tensor) -> Figures:
        logits, labels = self._logits(engine, tokens, targets)
        nats = F.cross_entropy(logits, labels, reduction="none")
        if self.weights is not None:
            nats = nats * torch.tensor(self.weights, device=nats.device)[labels]
        count = max(len(labels), 1)  # without a text, the loss is 0, and has a gradient of zeros
        is_right = (logits.detach().argmax(1) == labels).float()
        return {"loss": nats.sum() / count, "accuracy": is_right.sum() / count}

    def sums(self, engine: Callable[..., Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
        """Sums over texts: nats (each text counts once, whatever the weights), then for each label
        the texts of it that are found, all texts of it, and all texts that are given it."""
        logits, labels = self._logits(engine, tokens, targets)
        size, given = len(self.labels), logits.argmax(1)
        nats = F.cross_entropy(logits, labels, reduction="sum").double()[None]
        found = [labels[given == labels], labels, given]
        return torch.cat([nats, *(torch.bincount(f, minlength=size).double() for f in found)])

    def val_figures(self, sums: np.ndarray) -> dict[str, float]:
        found, there, given = sums[1:].reshape(3, -1)
        count = max(there.sum(), 1.0)
        counted = there + given > 0  # labels that a text has or was given
        f1 = 2 * found[counted] / (there + given)[counted]
        return {
            "loss": float(sums[0] / count),
            "accuracy": float(found.sum() / count),
            "macro_f1": float(f1.mean()) if len(f1) else 0.0,
        }

    def _logits(
        self, engine: Callable[..., Tensor], tokens: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The logits of the labelled texts, (N, K), fp32, and the numbers of their labels, (N,)."""
        first, start = self.tokenizer.vocab_size, self.tokenizer.start
        # A label's id is no input: the start token is in its place, and opens a text of no tokens.
        tokens = tokens.masked_fill(tokens >= first, start)
        at = targets >= first
        logits = engine(tokens, documents=self.documents(tokens), at=at)
        return logits.float(), targets[at] - first
