"""A micro batch, and the objective of pretraining: to predict each next token of documents.

Other objectives derive from this one, and override what is different about them.

Shapes: B sequences, T tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from manta.data.ahead import Ahead
from manta.model.targets import IGNORED
from manta.text.tokenizer import Tokenizer

Figures = dict[str, Tensor]
Model = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """A micro batch, or rows of the val split."""

    ids: np.ndarray
    """(B, T + 1) ids; below 0 where a token could not be read, and in padding of the val split."""
    trained: np.ndarray | None = None
    """(B, T) bool: whether each target is learnt; None: all are."""
    units: int | None = None
    """What the loss is the mean of, counted in this batch: trained targets, say. None: every target
    is trained, so all batches of one shape count alike."""

    def to(self, device: torch.device) -> tuple[Tensor, Any]:
        """Inputs and targets, (B, T) int64 each, on the device. An id below 0 becomes an arbitrary
        valid id as an input. As a target it is IGNORED, as all targets are that are not trained."""
        ids = torch.from_numpy(self.ids.astype(np.int64))
        if device.type == "cuda":
            ids = ids.pin_memory().to(device, non_blocking=True)
        inputs, targets = ids[:, :-1].clamp(min=0), ids[:, 1:].contiguous()
        if self.trained is not None:
            left_out = torch.from_numpy(~self.trained).to(device)
            targets = targets.masked_fill(left_out, IGNORED)
        return inputs, targets


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The objective of pretraining."""

    tokenizer: Tokenizer
    document_mask: bool

    logged: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of the `figures`."""

    def batch(self, ids: np.ndarray) -> Batch:
        """The micro batch of these ids (B, T + 1)."""
        return Batch(ids)

    def batches(self, ids: Iterator[np.ndarray], at_once: int) -> Iterator[Batch]:
        """The micro batches of these ids. A step draws `at_once` of them one after the other."""
        del at_once
        return map(self.batch, ids)

    def documents(self, tokens: Tensor) -> Tensor | None:
        """(B, T) the number of the document that each input belongs to, counted within its
        sequence; None if attention is not masked by documents. The end-of-text token opens a
        document, as a model is given that token to begin one."""
        return (tokens == self.tokenizer.eot).cumsum(1) if self.document_mask else None

    def figures(self, engine: Model, tokens: Tensor, targets: Any) -> Figures:
        """The figures of a micro batch, each a mean over its units: first "loss", with a gradient,
        which is what the run minimises, then what else is logged of each step.

        Args:
            engine: the model, or an engine that has it; called once, as `GPT.forward`.
            tokens, targets: (B, T) int64 each; another objective's batches may give, instead of
                the targets, a tuple that has more (`Batch.to`).
        """
        return {"loss": engine(tokens, targets, documents=self.documents(tokens))}

    def sums(self, engine: Model, tokens: Tensor, targets: Any) -> Tensor:
        """Sums over rows of the val split, from which `val_figures` follow once they are added over
        all rows; float64, on the device. Here: nats and count of all targets, nats and bytes of
        those that stand for text. End-of-text counts in the loss but not in bits per byte."""
        documents = self.documents(tokens)
        nats = engine(tokens, targets, reduction="none", documents=documents).double()
        counted = targets != IGNORED
        lengths = self._token_bytes.to(tokens.device)[targets.clamp(min=0)] * counted
        found = [nats.sum(), counted.sum(), nats[lengths > 0].sum(), lengths.sum()]
        return torch.stack([value.double() for value in found])

    def val_figures(self, sums: np.ndarray) -> dict[str, float]:
        """The figures of the val split, from its `sums`: first "loss", then what else is logged."""
        nats, count, text_nats, text_bytes = sums.tolist()
        return {"loss": nats / count, "bpb": text_nats / math.log(2) / max(text_bytes, 1)}

    def warning(self, sums: np.ndarray) -> str | None:
        """What a person should be told about the `sums` of the val split, if anything."""
        del sums
        return None

    def prompt(self, text: str) -> list[int]:
        """The ids after which the model completes a person's text."""
        return self.tokenizer.prompt(text)

    @functools.cached_property
    def _token_bytes(self) -> Tensor:
        return torch.from_numpy(self.tokenizer.token_bytes())


def ahead(batches: Iterator[Batch], at_once: int) -> Iterator[Batch]:
    """The same micro batches, made by a thread while the step before is computed."""
    return Ahead(batches, depth=at_once)
