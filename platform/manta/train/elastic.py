"""The number of workers of a run with num_workers=[fewest, most], each time that they start."""

from collections.abc import Callable

from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import ScalingConfig

from manta.cluster import capacity

Resources = dict[str, dict[str, float]]


class Whole(ElasticScalingPolicy):
    """Ray Train's own policy, but for two things: it takes only numbers of workers that divide the
    run's batch, and it does not count nodes that are about to leave."""

    def __init__(
        self,
        scaling_config: ScalingConfig,
        counts: list[int],
        leaving: Callable[[], set[str]] = capacity.leaving,
    ):
        super().__init__(scaling_config)
        self._counts, self._leaving = counts, leaving

    def _count_possible_workers(self, reserved_resources: Resources) -> int:
        """The largest number of workers that is allowed and fits; 0 if none does."""
        gone = self._leaving()
        there = {node: has for node, has in reserved_resources.items() if node not in gone}
        room = super()._count_possible_workers(there)
        return max((count for count in self._counts if count <= room), default=0)
