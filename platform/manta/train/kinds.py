"""The objective for a run's datasets, and what the config must have for it."""

from typing import Any

from manta.data import conversations
from manta.data.manifest import Manifest
from manta.errors import ConfigError
from manta.text.tokenizer import Tokenizer
from manta.train.objectives.answers import Answers
from manta.train.objectives.next_token import NextToken
from manta.train.settings import PretrainConfig, TrainConfig

TEXT = "text"


def kind_of(datasets: tuple[Manifest, ...]) -> str:
    """The kind of these datasets (`data.kind`), which `check_kind` has let pass."""
    return datasets[0].recipe.get("kind", TEXT)


def objective_of(c: TrainConfig, datasets: tuple[Manifest, ...], tokenizer: Tokenizer) -> NextToken:
    """The objective for these datasets, which `check_kind` has let pass."""
    if kind_of(datasets) == conversations.KIND:
        return Answers(tokenizer, True, conversations.rule_of(datasets[0]))
    return NextToken(tokenizer, c.document_mask)


def identity(datasets: tuple[Manifest, ...]) -> dict[str, Any]:
    """What decides a run's objective; it stays the same for a whole run."""
    if kind_of(datasets) == conversations.KIND:
        return {"train_on": datasets[0].recipe["train_on"]}
    return {}


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
    if kind_of(datasets) == TEXT:
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
