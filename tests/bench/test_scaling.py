"""Crews of workers that wait to be told what to do, and weak scaling measured with them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.common import tiny_model_arguments
from manta.bench.command import bench
from manta.bench.settings import BenchConfig
from manta.bench.workers import crew
from manta.config import load
from manta.errors import ConfigError


def summing(first: int) -> Callable[[int], list[int]]:
    def answer(command: int) -> list[int]:
        if command < 0:
            raise ConfigError("a number below 0")
        if command == 0:
            os._exit(3)
        total = torch.tensor(first + command * (1 + dist.get_rank()))
        dist.all_reduce(total)
        return [int(total), dist.get_world_size()]

    return answer


def test_crews_answer_in_turn_and_at_once_and_a_workers_error_is_raised() -> None:
    with crew(2, "gloo", 0, summing, 5) as both, crew(1, "gloo", 0, summing, 7) as one:
        for each in (both, one):
            each.tell(10)
        assert both.answers() == [[40, 2]] * 2  # 2 x 5, 10 and 20
        assert one.answers() == [[17, 1]]
        both.tell(-1)
        with pytest.raises(ConfigError, match="below 0"):
            both.answers()
        one.tell(0)
        with pytest.raises(RuntimeError, match="a worker of the bench has failed"):
            one.answers()


@pytest.mark.long
def test_two_workers_are_measured_against_one_and_against_two_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keys = ["what=scaling", "rounds=1", "steps_per_round=1"]
    found = bench(load(BenchConfig, [*tiny_model_arguments(tmp_path), *keys]))
    assert found["workers"] == 2 and found["tokens_per_worker"] == 256
    for key in ("alone", "apart", "together"):
        assert found[f"{key}_tokens_per_second"] > 0
    assert len(found["communication_seconds"]) == 2
    assert found["efficiencies"][0] == pytest.approx(
        found["efficiencies_of_ceiling"][0] * found["ceilings"][0]
    )
    assert "weak scaling" in capsys.readouterr().out
