"""What a run learns from its batches: the seam between the loop, which is the same for all kinds of
training, and what is different about each kind.

Shapes: B sequences, T tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from manta.data import conversations
from manta.data.conversations import Rule
from manta.data.manifest import Manifest
from manta.errors import ConfigError
from manta.text.conversations import Turn
from manta.text.templates import Template
from manta.text.tokenizer import Tokenizer
from manta.train.settings import PretrainConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Pretraining: predicts each next token of documents."""

    tokenizer: Tokenizer
    document_mask: bool

    def trained(self, batch: np.ndarray) -> np.ndarray | None:
        """(B, T) bool: whether each target of the ids (B, T + 1) is learnt; None: all are."""
        del batch
        return None

    def documents(self, tokens: Tensor) -> Tensor | None:
        """(B, T) the number of the document that each input belongs to, counted within its
        sequence; None if attention is not masked by documents. The end-of-text token opens a
        document, as a model is given that token to begin one."""
        return (tokens == self.tokenizer.eot).cumsum(1) if self.document_mask else None

    def prompt(self, text: str) -> list[int]:
        """The ids after which the model completes a person's text."""
        return self.tokenizer.prompt(text)


@dataclasses.dataclass(frozen=True)
class Answers(NextToken):
    """Fine-tuning: predicts the trained tokens of conversations, which do not see each other."""

    rule: Rule

    def trained(self, batch: np.ndarray) -> np.ndarray | None:
        return conversations.trained(self.rule, batch.astype(np.int64))

    def documents(self, tokens: Tensor) -> Tensor | None:
        return self.rule.documents(tokens)

    def prompt(self, text: str) -> list[int]:
        template = Template.of(self.tokenizer)
        return template.encode([Turn("user", text)], add_generation_prompt=True).ids.tolist()


def objective_of(c: TrainConfig, datasets: tuple[Manifest, ...], tokenizer: Tokenizer) -> NextToken:
    """The objective for these datasets, which `check_kind` has let pass."""
    if is_chat(datasets):
        return Answers(tokenizer, True, conversations.rule_of(datasets[0]))
    return NextToken(tokenizer, c.document_mask)


def is_chat(datasets: tuple[Manifest, ...]) -> bool:
    return datasets[0].recipe.get("kind") == conversations.KIND


def check_kind(c: PretrainConfig, datasets: tuple[Manifest, ...]) -> None:
    """Checks that the datasets are of one kind, and that the config trains that kind as it must be.

    Raises:
        ConfigError: a mix has texts and conversations, or conversations that are trained
            differently; or the config lets conversations see each other, or cuts their rows.
    """
    first, *others = datasets
    for other in others:
        for key in ("kind", "train_on", "row_tokens"):
            if first.recipe.get(key) != other.recipe.get(key):
                raise ConfigError(
                    f"data.mix: {first.name} and {other.name} differ in {key} "
                    f"({first.recipe.get(key)} and {other.recipe.get(key)}); prepare both alike"
                )
    if not is_chat(datasets):
        return
    rows = first.recipe["row_tokens"]
    if c.sequence_length != rows:
        raise ConfigError(
            f"{first.path} has rows of {rows} tokens, but the sequence length is "
            f"{c.sequence_length}: set seq_len={rows}, or prepare the data with "
            f"data.row_tokens={c.sequence_length} and another data.name"
        )
    if not c.document_mask:
        raise ConfigError(
            f"{first.path} holds conversations, which would see each other: set document_mask=true"
        )


def weighted(
    objective: NextToken, draw: Callable[[], np.ndarray], count: int, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray | None, float]]:
    """Draws a step's micro batches: each with its trained targets, and the weight of its mean loss.

    The mean of the weighted losses, over the micro batches of all ranks, is then the mean over all
    trained targets of the step, however these are spread. Where every target is trained, micro
    batches are drawn one by one, and all weights are 1. All ranks must call this alike.
    """
    first = draw()
    trained = objective.trained(first)
    if trained is None:
        yield first, None, 1.0
        for _ in range(count - 1):
            yield draw(), None, 1.0
        return
    batches = [first, *(draw() for _ in range(count - 1))]
    masks = [trained, *map(objective.trained, batches[1:])]
    counts = [int(np.count_nonzero(mask)) for mask in masks if mask is not None]
    total = torch.tensor(sum(counts), dtype=torch.int64, device=device)
    dist.all_reduce(total)
    whole = max(int(total), 1)  # a step of damaged rows alone has none
    for batch, mask, number in zip(batches, masks, counts, strict=True):
        yield batch, mask, number * count * dist.get_world_size() / whole
