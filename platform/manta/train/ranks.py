"""A worker's place among the workers that train together, and what they agree on."""

import dataclasses
from typing import Any

import ray.train
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class Rank:
    """A worker's place among the workers of the run."""

    rank: int
    world_size: int
    local_world_size: int
    """Workers on the same machine."""
    local_rank: int = 0
    """The place among those."""

    @classmethod
    def here(cls) -> "Rank":
        """The place of this process, according to Ray Train."""
        context = ray.train.get_context()
        return cls(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            local_world_size=context.get_local_world_size(),
            local_rank=context.get_local_rank(),
        )

    @property
    def is_first(self) -> bool:
        """Whether this worker speaks and writes for all."""
        return self.rank == 0


def agreed(value: Any) -> Any:
    """Rank 0's value, on every rank. (A collective call.)"""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
