"""The commands that a sweep proposes: they are tried, and continue the sweep as they say."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from helpers.sweeps import Truth, config, simulated
from manta.config import from_dict, load, to_dict, to_yaml
from manta.sweep import extending, identity
from manta.sweep.findings import Finding, findings
from manta.sweep.journal import Notes
from manta.sweep.plan import Plan, Result
from manta.sweep.settings import SweepConfig

RATES = [5e-4, 1e-3, 2e-3, 4e-3]
ONE = {"tokens_per_batch": None}
HIGH, LOW = Truth(best_lr=1.0), Truth(best_lr=1e-7)
RANGE = {"optimizer": {"lr": {"log_uniform": [1e-4, 1e-2]}}}


def edges(truth: Truth, **sweep: Any) -> tuple[Plan, list[Finding]]:
    plan = simulated(config(**sweep), truth)
    return plan, [f for f in findings(plan) if f.kind == "edge"]


def continued(plan: Plan, command: str, folder: Path) -> tuple[SweepConfig, Plan]:
    """The config that a command gives, and the plan that goes on with it, as it is then."""
    program, job, file, *arguments = shlex.split(command)
    assert (program, job) == ("python", "jobs/sweep.py")
    assert file == "/nowhere/runs/s/sweep.yaml"
    path = folder / "sweep.yaml"
    path.write_text(to_yaml(extending.tree(plan.c)))
    c = load(SweepConfig, [str(path), *arguments])
    records = plan.journal.records if c.name == plan.c.name else []
    return c, Plan(c, Notes(records), 2)


@pytest.mark.parametrize(
    ("truth", "sweep", "said", "changed"),
    [
        (HIGH, {"lr": RATES, **ONE}, "lr 0.004 is the highest tried; try 0.008 next",
         "sweep.lr=[0.0005,0.001,0.002,0.004,0.008]"),
        (HIGH, {"space": {"optimizer.lr": RATES}}, "lr 0.004 is the highest tried; try 0.008 next",
         "sweep.space.optimizer.lr=[0.0005,0.001,0.002,0.004,0.008]"),
        (LOW, {"lr": RATES, **ONE}, "lr 0.0005 is the lowest tried; try 0.00025 next",
         "sweep.lr=[0.00025,0.0005,0.001,0.002,0.004]"),
        (HIGH, {"lr": RATES, **ONE, "search": "random", "trials": 4}, "try 0.008 next",
         "sweep.lr=[0.0005,0.001,0.002,0.004,0.008] sweep.trials=5"),
        (HIGH, {"lr": RATES, **ONE, "scheduler": "asha"}, "try 0.008 next",
         "sweep.lr=[0.0005,0.001,0.002,0.004,0.008]"),
        (HIGH, {"lr": RATES, **ONE, "scheduler": "pbt", "exchanges": 2}, "try 0.008 next",
         "name=s-lr-high sweep.lr=[0.0005,0.001,0.002,0.004,0.008]"),
        (HIGH, {"space": RANGE, "search": "random", "trials": 40}, "try 0.000",
         "name=s-lr-high sweep.space.optimizer.lr.log_uniform=["),
    ],
    ids=str,
)  # fmt: skip
def test_the_best_value_at_the_edge_is_said_with_the_command_that_goes_beyond(
    truth: Truth, sweep: dict[str, Any], said: str, changed: str, tmp_path: Path
) -> None:
    plan, (edge,) = edges(truth, **sweep)
    assert said in edge.sentence
    assert changed in str(edge.command)
    had = {s.trial for s in plan.segments}
    c, after = continued(plan, str(edge.command), tmp_path)
    new = {s.trial for s in after.ready()} - had
    assert new == {s.trial for s in after.ready()}, "only new trials run"
    if c.name == plan.c.name:
        assert len(new) == 1
    else:
        assert new


def test_a_best_value_inside_the_range_is_no_edge() -> None:
    assert not edges(Truth(noise=0.0), lr=[1e-3, 2e-3, 4e-3], **ONE)[1]
    # A diverged neighbour was tried as well.
    assert not edges(Truth(best_lr=1.0, diverges_from=4e-3), lr=[1e-3, 2e-3, 4e-3], **ONE)[1]


def test_what_is_tried_next_is_near_though_its_neighbour_is_far() -> None:
    _, (edge,) = edges(Truth(noise=0.0, diverges_from=50.0), lr=[1e-3, 100.0], **ONE)
    assert "lr 0.001 is the lowest tried; try 0.0001 next" in edge.sentence


def test_choices_have_no_edge_and_nothing_impossible_is_proposed() -> None:
    space = {"optimizer.kind": ["adamw", "muon"], "optimizer.weight_decay": [0.0, 0.1]}
    (edge,) = edges(Truth(noise=0.0), space=space, lr=None, **ONE)[1] or [None]
    assert edge is None or "weight_decay 0.1 is the highest tried; try 0.2" in edge.sentence
    # The best of equal ones is the first, weight_decay 0: below it there is nothing.
    assert edge is None


def test_whole_numbers_stay_whole() -> None:
    space = {"model.n_layer": [1, 2], "tokens_per_batch": [1024, 1536]}
    found = edges(Truth(noise=0.0), space=space, lr=None)[1]
    assert [f.figures["next"] for f in found] == [[512]]  # no model has half a block


@pytest.mark.parametrize("sweep", [{"lr": RATES, **ONE}, {"lr": RATES, "scheduler": "asha", **ONE}])
def test_a_sweep_of_one_seed_gives_its_contenders_more(
    sweep: dict[str, Any], tmp_path: Path
) -> None:
    plan = simulated(config(**sweep), Truth())
    (asked,) = [f for f in findings(plan) if f.kind == "seeds"]
    c, after = continued(plan, str(asked.command), tmp_path)
    assert (c.sweep.repeats, c.sweep.repeat) == (4, "contenders")
    while ready := after.ready():
        assert {s.seed for s in ready} <= {c.seed + n for n in range(4)}
        segment = ready[0]
        after.tell(Result(segment.trial, segment.until, Truth().answer(segment)))
    said = [f.sentence for f in findings(after) if f.kind == "difference"]
    assert len(said) == 2 and all("seed" in text for text in said)


@pytest.mark.parametrize(
    "sweep",
    [
        {},
        {"lr": [1e-3, 2e-3, 4e-3], "tokens_per_batch": [2048, 4096]},
        {"lr": RATES, **ONE},
        {"space": RANGE, "search": "random", "trials": 3},
        {"space": {"optimizer.lr": RATES, "model": {"n_layer": [1, 2]}}},
        {"space": {"optimizer.kind": ["adamw"]}, "lr": RATES},
        {"replay": {0: {"optimizer.lr": 1e-3}, 4096: {"optimizer.lr": 2e-3}}},
    ],
    ids=str,
)
def test_the_file_of_a_sweep_is_its_config(sweep: dict[str, Any], tmp_path: Path) -> None:
    c = config(**sweep)
    path = tmp_path / "sweep.yaml"
    path.write_text(to_yaml(extending.tree(c)))
    again = load(SweepConfig, [str(path)])
    assert again.dimensions == c.dimensions
    assert {**to_dict(again), "sweep": {}} == {**to_dict(c), "sweep": {}}
    assert identity.identity(again) == identity.identity(c)


def test_a_command_has_no_place_of_a_person(tmp_path: Path) -> None:
    """The home of a person is ~, and words that a shell would change are in quotes."""
    home = {"home": str(Path.home() / "manta"), "name": "s", "sweep": {"lr": RATES}}
    c = from_dict(SweepConfig, home)
    assert extending.command(c, "a=[1,2]").startswith("python jobs/sweep.py ~/manta/runs/s/")
    spaced = from_dict(SweepConfig, {**home, "home": "/my home"})
    assert extending.command(spaced) == "python jobs/sweep.py '/my home/runs/s/sweep.yaml'"
