"""Replays of ASHA over the recorded curves of a real grid: what it trains, and what it finds."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from manta.bench import curves as recorder
from manta.bench.command import bench
from manta.bench.curves import RECORDED
from manta.bench.settings import BenchConfig
from manta.bench.sweeps import noise, read, replays
from manta.config import from_dict
from manta.errors import DataError

MOST_TOKENS, LEAST_FOUND = 0.4, 0.9


@pytest.mark.parametrize("lanes", [1, 4])
def test_asha_finds_the_winner_of_a_real_grid_with_two_fifths_of_its_tokens(lanes: int) -> None:
    found = replays(read(str(RECORDED)), {"scheduler": "asha"}, 10, seed=0, lanes=lanes)
    assert found.trials == 16
    assert found.tokens <= MOST_TOKENS
    assert found.within >= LEAST_FOUND


def test_a_whole_grid_finds_its_winner_with_all_of_its_tokens() -> None:
    found = replays(read(str(RECORDED)), {}, 2, seed=0)
    assert (found.tokens, found.exact, found.regret) == (1.0, 1.0, 0.0)


def test_the_recorded_curves_are_those_of_the_grid() -> None:
    curves = read(str(RECORDED))
    assert RECORDED.stat().st_size < 100_000
    assert curves.config == json.loads(json.dumps(recorder.GRID))
    grid, _ = curves.sweep.grid
    assert len(curves.curves) == 3 * len(grid) == 108
    assert [c.settings for c in curves.curves[::3]] == [trial.settings for trial in grid]
    total = curves.sweep.total_tokens
    for curve in curves.curves:
        assert curve.tokens == [total * (n + 1) // 16 for n in range(16)]
        assert all(loss is not None and 3 < loss < 7 for loss in curve.losses)
    assert 0.001 < noise(curves) < 0.1


def test_curves_that_are_not_there_are_recorded_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid: dict[str, Any] = {
        **recorder.GRID,
        "total_tokens": 2048,
        "model": {"n_layer": 1, "n_embd": 16, "n_head": 2, "context_length": 16, "vocab_size": 512},
        "sweep": {"lr": [1e-3, 1e-2], "tokens_per_batch": [64, 128], "repeats": 2},
    }
    monkeypatch.setattr(recorder, "GRID", grid)
    monkeypatch.setattr("manta.bench.sweeps.REPLAYS", 2)
    text = "".join(f"Verse {i}: {i * 7} rays of light.\n" for i in range(900))
    (tmp_path / "text.txt").write_text(text)
    keys = {"what": "sweeps", "data": {"source": str(tmp_path / "text.txt")}}
    c = from_dict(BenchConfig, {**keys, "curves": str(tmp_path / "curves.json")})
    first = bench(c)
    made = read(str(tmp_path / "curves.json"))
    assert (first["trials"], first["seeds"]) == (4, 2)
    for curve in made.curves:
        assert len(curve.losses) == 16
        assert curve.losses[-1] < curve.losses[0] < math.log(512) + 1  # type: ignore[operator]
    assert bench(c)["strategies"] == first["strategies"]  # from the file
    (tmp_path / "text.txt").write_text(text[:2000])
    with pytest.raises(DataError, match="give a longer one"):
        bench(from_dict(BenchConfig, {**keys, "curves": str(tmp_path / "other.json")}))
    assert not (tmp_path / "other.json").exists()
