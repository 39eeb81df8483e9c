"""The groups into which the optimizer sorts a GPT's weights."""

import typing
from typing import Literal

Group = Literal["matrices", "embeddings", "head", "vectors"]
# The optimizer has the groups in this order. ZeRO lays each group's weights end to end and splits
# them over the workers.
GROUPS: tuple[Group, ...] = typing.get_args(Group)


def group_of(dimensions: int, *, in_block: bool, is_head: bool) -> Group:
    """Returns the group of a weight by its number of dimensions. Muon takes the blocks' matrices;
    the vectors (norms and biases) never decay."""
    if dimensions < 2:
        return "vectors"
    if in_block:
        return "matrices"
    return "head" if is_head else "embeddings"
