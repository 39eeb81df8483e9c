"""A plan goes with its run, and the run says at its end how wrong it was."""

import json
from pathlib import Path
from typing import Any

import pytest

from manta import layout, storage
from manta.train.records import history, planned

CONFIG: dict[str, Any] = {
    "home": "/a", "log_every": 10, "num_workers": 1, "optimizer": {"lr": 0.1}
}  # fmt: skip


def a_plan(home: Path, **more: Any) -> str:
    """Files a plan in the home; returns the folder of its run."""
    plan = {
        **planned.header("a/b", CONFIG, "2026-11-27"), "tokens": 1000, "hours": 0.5,
        "train_hours": 0.4, "tokens_per_second": 200.0, "peak_memory_bytes": 2e9, "loss": None,
        **more,
    }  # fmt: skip
    storage.write_json(layout.plan_file(str(home), "a/b"), plan)
    return layout.run_folder(str(home), "a/b")


def adopt(home: Path, config: dict[str, Any]) -> list[str]:
    said: list[str] = []
    planned.adopt(str(home), "a/b", layout.run_folder(str(home), "a/b"), config, said.append)
    return said


def an_outcome(run: str, tokens: int = 1000) -> None:
    metrics = [
        {"step": n, "tokens": tokens * n // 4, "loss": 2.0, "tokens_per_second": 160.0 + 20 * n}
        for n in range(1, 5)
    ]
    metrics.append({"step": 4, "tokens": tokens, "val_loss": 2.5})
    text = "".join(json.dumps(record) + "\n" for record in metrics)
    storage.write_bytes(storage.join(run, layout.METRICS), text.encode())
    seconds = {"seconds": {"productive": 1500.0, "start": 120.0}, "updated": 1e9, "starts": 1}
    storage.write_json(storage.join(run, layout.GOODPUT), seconds)
    history.note(run, "memory", bytes=2_200_000_000)
    history.note(run, "memory", bytes=1_000_000_000)


def test_the_summary_says_how_wrong_the_plan_was(tmp_path: Path) -> None:
    run = a_plan(tmp_path, loss=2.0)
    assert adopt(tmp_path, {**CONFIG, "home": "/b", "log_every": 1}) == []
    an_outcome(run)
    found = {figure.name: figure.error for figure in planned.figures(run)}
    assert found == pytest.approx(
        {
            "hours": -0.1,
            "hours of steps": 1 / 24,
            "tok/s": 0.05,
            "peak memory in GB": 0.1,
            "val loss": 0.25,
        }
    )
    (line,) = planned.line(run)
    assert "hours 0.45 (planned 0.5: -10.0%)" in line


def test_a_plan_that_knew_no_start_is_compared_without_it(tmp_path: Path) -> None:
    run = a_plan(tmp_path, counts_start=False)
    assert adopt(tmp_path, CONFIG) == []
    an_outcome(run)
    found = {figure.name: figure.measured for figure in planned.figures(run)}
    assert found["hours after the start"] == pytest.approx(1500 / 3600)
    assert "hours" not in found


def test_a_plan_for_another_config_stays_where_it_is(tmp_path: Path) -> None:
    run = a_plan(tmp_path)
    (line,) = adopt(tmp_path, {**CONFIG, "num_workers": 2, "optimizer": {"lr": 0.2}})
    assert "num_workers, optimizer.lr" in line
    assert planned.read(run) is None
    assert planned.line(run) == []
    assert storage.exists(layout.plan_file(str(tmp_path), "a/b"))


def test_a_run_of_another_length_is_compared_by_its_speed_alone(tmp_path: Path) -> None:
    run = a_plan(tmp_path, loss=2.0)
    adopt(tmp_path, CONFIG)
    an_outcome(run, tokens=2000)
    assert {figure.name for figure in planned.figures(run)} == {"tok/s", "peak memory in GB"}


@pytest.mark.parametrize("content", ["{", "[]", '{"run": "a", "tokens": -1, "config": {}}'])
def test_a_damaged_plan_stops_no_run(tmp_path: Path, content: str) -> None:
    run = a_plan(tmp_path)
    Path(layout.plan_file(str(tmp_path), "a/b")).write_text(content)
    (line,) = adopt(tmp_path, CONFIG)
    assert "begins without a plan" in line
    an_outcome(run)
    storage.write_bytes(storage.join(run, layout.PLAN), content.encode())
    assert planned.line(run) == []


def test_without_a_plan_nothing_is_said(tmp_path: Path) -> None:
    assert adopt(tmp_path, CONFIG) == []
    assert planned.line(layout.run_folder(str(tmp_path), "a/b")) == []
