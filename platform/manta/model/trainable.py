"""The weights that learn in a run which goes on from others' weights: all, or some near the end.

A weight that does not learn has no gradient and no optimizer state, and where nothing before it
learns, the backward pass ends there.
"""

import re
from typing import Literal

from torch import nn

from manta.model.gpt import LanguageModel
from manta.model.shape import ModelConfig

Trainable = Literal["all", "last_block", "last_two", "head"]
# The number of blocks that learn, counted from the last one. The final norm and the head learn with
# each of these.
LAST_BLOCKS: dict[Trainable, int] = {"head": 0, "last_block": 1, "last_two": 2}


def blocks_trained(which: Trainable, n_layer: int) -> int:
    """The number of blocks that learn: the last ones of `n_layer`."""
    return n_layer if which == "all" else min(n_layer, LAST_BLOCKS[which])


def learns(name: str, which: Trainable, c: ModelConfig) -> bool:
    """Whether a weight learns. `name` is as in the model's `named_parameters`.

    A tied head does not learn: it is the embedding, which comes first.
    """
    if which == "all" or name.startswith("norm."):
        return True
    if name.startswith("head."):
        return not c.tie_embeddings
    block = re.match(r"blocks\.(\d+)\.", name)
    return block is not None and int(block[1]) >= c.n_layer - blocks_trained(which, c.n_layer)


def freeze(model: LanguageModel, which: Trainable) -> None:
    """Leaves gradients to the weights that learn."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(learns(name, which, model.config))


def problems(which: Trainable, c: ModelConfig) -> list[str]:
    """Messages about a choice that a model of config `c` does not have."""
    if which not in ("all", "head") and c.is_recurrent:
        return [f"trainable={which}: an LSTM (model.family=lstm) has no blocks; use trainable=all"]
    if which == "head" and c.tie_embeddings:
        return [
            "trainable=head: the head's weights are the embedding's (model.tie_embeddings=true), "
            "which come first in the model; use trainable=last_block, last_two or all"
        ]
    return []


def learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights that learn, each once, with their names."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
