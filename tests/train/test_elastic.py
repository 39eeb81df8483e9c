"""The number of workers of an elastic run."""

import pytest
import ray.train

from manta.config import load
from manta.errors import ConfigError
from manta.train.elastic import Whole
from manta.train.settings import PretrainConfig

NODES = {"a": {"CPU": 4.0}, "b": {"CPU": 4.0}, "c": {"CPU": 4.0}}


def config(*keys: str) -> PretrainConfig:
    return load(PretrainConfig, ["model.context_length=16", *keys])


def workers_on(nodes: dict[str, dict[str, float]], c: PretrainConfig, *leaving: str) -> int:
    scaling = ray.train.ScalingConfig(
        num_workers=(c.fewest_workers, c.most_workers), resources_per_worker={"CPU": 1}
    )
    return Whole(scaling, c.worker_counts, lambda: {*leaving})._count_possible_workers(nodes)


def test_an_elastic_run_has_as_many_workers_as_fit_and_divide_its_batch() -> None:
    c = config("num_workers=[2,12]", f"tokens_per_batch={16 * 12}")
    assert c.worker_counts == [2, 3, 4, 6, 12]
    assert workers_on(NODES, c) == 12
    assert workers_on(NODES, c, "b") == 6  # of the 8 that fit on the nodes that stay
    assert workers_on(NODES, c, "b", "c") == 4
    assert workers_on({"a": {"CPU": 1.0}}, c) == 0
    assert c.derived()["numbers of workers"] == "2, 3, 4, 6, 12"


def test_machines_of_eight_need_no_batch_that_nine_workers_could_share() -> None:
    c = config("num_workers=[8,16]", f"tokens_per_batch={16 * 16}")
    assert c.worker_counts == [8, 16]


def test_the_fewest_and_the_most_workers_must_divide_the_batch() -> None:
    with pytest.raises(ConfigError, match=r"tokens_per_batch=256 does not divide by .* 12 = 192"):
        config("num_workers=[8,12]", "tokens_per_batch=256")
