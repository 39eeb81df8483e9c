"""An LSTM in DeepSpeed: whole and sharded weights train alike, and the optimizer's state moves to
other workers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import STEPS, distance, engine_of, on_ranks, save, train
from manta.train.checkpoints import fragments
from manta.train.step.optimizer import OptimizerConfig

STAGES = (0, 3)  # test_optimizer.py has 1 and 2
ADAMW = OptimizerConfig()
HALF = STEPS // 2


def run_whole(rank: int, _world_size: int, folder: str) -> dict[str, Any]:
    """Trains at both stages, and saves half way."""
    found = {}
    for stage in STAGES:
        engine = engine_of("lstm", ADAMW, stage)
        train(engine, range(HALF))
        save(engine, rank, Path(folder, str(stage)))
        found[stage] = train(engine, range(HALF, STEPS))
    return found


def run_on(_rank: int, _world_size: int, folder: str) -> dict[str, Any]:
    """Goes on from what each stage saved, at the other stage."""
    found = {}
    for stage in STAGES:
        at = Path(folder).parent / "whole" / str(stage)
        start = torch.load(at / "weights.pt")
        engine = engine_of("lstm", ADAMW, 3 - stage, start=start)
        fragments.load_state(engine, json.loads((at / "index.json").read_text()), at)
        found[stage] = train(engine, range(HALF, STEPS))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Any], dict[int, Any]]:
    folder = tmp_path_factory.mktemp("lstm")
    for name in ("whole", "on"):
        (folder / name).mkdir()
    whole: Any = on_ranks(run_whole, 2, folder / "whole")
    on: Any = on_ranks(run_on, 1, folder / "on")
    return whole, on


@pytest.mark.parametrize("stage", STAGES)
def test_both_stages_train_alike_and_go_on_at_the_other_one_on_fewer_workers(
    trained: tuple[dict[int, Any], dict[int, Any]], stage: int
) -> None:
    whole, on = trained
    assert distance(whole[stage], whole[0]) < 1e-4
    assert distance(on[stage], whole[0]) < 1e-4
    assert any("weight_hh" in name for name in whole[stage])
