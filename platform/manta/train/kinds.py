"""The objective for a run's datasets, and what the config must have for it."""

import dataclasses
from typing import Any

from manta.data import conversations, labelled, preferences, reference
from manta.data.manifest import Manifest
from manta.errors import ConfigError
from manta.terminal import named
from manta.text.tokenizer import Tokenizer
from manta.train.objectives.answers import Answers
from manta.train.objectives.labels import Labels
from manta.train.objectives.next_token import NextToken
from manta.train.objectives.preference import Preference
from manta.train.settings import PretrainConfig, TrainConfig

TEXT = "text"


def kind_of(datasets: tuple[Manifest, ...]) -> str:
    """The kind of these datasets (`data.kind`), which `check_kind` has let pass."""
    return datasets[0].recipe.get("kind", TEXT)


def objective_of(c: TrainConfig, datasets: tuple[Manifest, ...], tokenizer: Tokenizer) -> NextToken:
    """The objective for these datasets, which `check_kind` has let pass."""
    if kind_of(datasets) == conversations.KIND:
        return Answers(tokenizer, True, conversations.rule_of(datasets[0]))
    if kind_of(datasets) == preferences.KIND:
        (data,) = datasets
        before = reference.read(data, str(c.dpo.reference))
        return Preference(tokenizer, True, conversations.rule_of(data), c.dpo, before)
    if kind_of(datasets) == labelled.KIND:
        weights = None
        if c.class_weights == "balanced":
            counts = datasets[0].label_counts[labelled.TRAIN]
            weights = tuple(labelled.balanced_weights(counts))
        return Labels(tokenizer, True, datasets[0].labels, weights)
    return NextToken(tokenizer, c.document_mask)


def identity(c: TrainConfig, datasets: tuple[Manifest, ...]) -> dict[str, Any]:
    """What decides a run's objective; it stays the same for a whole run."""
    if kind_of(datasets) == labelled.KIND:
        return {"labels": list(datasets[0].labels), "class_weights": c.class_weights}
    if kind_of(datasets) == conversations.KIND:
        return {"train_on": datasets[0].recipe["train_on"]}
    if kind_of(datasets) == preferences.KIND:
        return {f"dpo.{key}": value for key, value in dataclasses.asdict(c.dpo).items()}
    return {}


def check_kind(c: PretrainConfig, datasets: tuple[Manifest, ...]) -> None:
    """Checks that the datasets are of one kind, and that the config trains that kind as it must be.

    Raises:
        ConfigError: a mix has texts and conversations, or conversations that are trained
            differently; or the config lets conversations see each other, or cuts their rows; or
            pairs have no reference, or are mixed; or the model is no classifier of the dataset's
            labels.
    """
    first, *others = datasets
    _check_labels(c, first)
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
            f"{first.path} holds conversations or labelled texts, which would see each other: set "
            "document_mask=true"
        )
    if kind_of(datasets) not in (preferences.KIND, labelled.KIND):
        return
    if others:
        raise ConfigError(
            "data.mix is for texts and conversations: pairs and labelled texts are trained from "
            "one set"
        )
    if kind_of(datasets) == preferences.KIND and c.dpo.reference is None:
        raise ConfigError(
            f"{first.path} holds pairs of answers, for which a run needs the log-probabilities of "
            "its start: jobs/finetune.py kind=preference base=RUN data.source=FILE computes them"
        )


def _check_labels(c: PretrainConfig, dataset: Manifest) -> None:
    """Raises ConfigError unless the model has the dataset's labels, or both have none."""
    if c.model.labels != dataset.labels:
        ours, theirs = (named(labels, most=5) or "no labels" for labels in (
            c.model.labels, dataset.labels
        ))  # fmt: skip
        raise ConfigError(
            f"{dataset.path} has {theirs}, the model {ours}: a classifier is made by "
            "python jobs/finetune.py kind=classify base=RUN data.source=FILE"
        )
    if c.class_weights != "none" and not dataset.labels:
        raise ConfigError(
            f"class_weights={c.class_weights} is for labelled texts (kind=classify): omit it"
        )
