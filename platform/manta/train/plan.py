"""What a run starts from: its weights, its model, and the order of its data."""

import dataclasses

from manta.data import mixture
from manta.data.manifest import Manifest
from manta.data.order import Order
from manta.errors import ConfigError
from manta.model.gpt import ModelConfig
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint
from manta.train.settings import PretrainConfig


def from_weights(c: PretrainConfig, newest: str | None) -> PretrainConfig:
    """Returns `c` as it is if it has no `init.checkpoint`; else with the model of the run's
    `newest` checkpoint or, if that is None, of `init.checkpoint`. Raises CheckpointError if
    `init.checkpoint` is not found."""
    if c.init.checkpoint is None:
        return c
    path = newest or checkpoint.resolve(c.init.checkpoint, c.home_folder, "init.checkpoint")
    model = checkpoint.load_model_config(path).with_dropout_of(c.model)
    if c.model.labels:
        model = model.classifying(c.model.labels)
    init = c.init if newest else dataclasses.replace(c.init, checkpoint=path)
    return dataclasses.replace(c, model=model, init=init)


def with_vocabulary(
    model: ModelConfig, tokenizer: Tokenizer, extending: bool = False
) -> ModelConfig:
    """The model with this tokenizer's vocabulary. Raises ConfigError if its own is too small.

    With weights that are there already, `extending` tells that the tokenizer extends theirs: the
    model gets rows for the new ids.
    """
    if extending and model.vocab_size is not None:
        return dataclasses.replace(model, vocab_size=max(model.vocab_size, tokenizer.vocab_size))
    if model.vocab_size is not None and model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size} ids ({tokenizer.name}): omit it, or raise it"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or tokenizer.vocab_size)


def order_of(c: PretrainConfig, datasets: tuple[Manifest, ...]) -> Order:
    """The order in which steps read tokens. Raises DataError if there are too few tokens."""
    phases = c.data.phases(c.sequence_length)
    return mixture.make_order(datasets, phases, c.stages, c.seed, c.sequence_length)
