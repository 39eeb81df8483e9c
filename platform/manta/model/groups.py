"""The groups of a GPT's weights, by which the optimizer tells them apart."""

import typing
from typing import Literal

Group = Literal["matrices", "embeddings", "head", "vectors"]
# In the order in which the optimizer has them. ZeRO lays each group's weights end to end, and
# splits them over the workers.
GROUPS: tuple[Group, ...] = typing.get_args(Group)


def group_of(dimensions: int, *, in_block: bool, is_head: bool) -> Group:
    """The group of a weight of so many dimensions. The blocks' matrices are those that Muon takes;
    the vectors, norms and biases, are those that never decay."""
    if dimensions < 2:
        return "vectors"
    if in_block:
        return "matrices"
    return "head" if is_head else "embeddings"
