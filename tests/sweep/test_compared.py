"""Findings of simulated sweeps with a known truth: what they say, and how often it is wrong."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sweeps import Truth, config, simulated
from manta.sweep.compared import against_best, groups
from manta.sweep.findings import Finding, findings

few = settings(deadline=None, max_examples=20)
RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
FLAT = Truth(curvature=0.0)


def found(truth: Truth, **sweep: Any) -> dict[str, list[Finding]]:
    """The findings of a simulated sweep, by kind."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings(simulated(config(tokens_per_batch=None, **sweep), truth)):
        kinds.setdefault(finding.kind, []).append(finding)
    return kinds


def shown(means: Sequence[float], spreads: Sequence[float], seeds: int, world: int) -> str:
    """What is said of the best of some settings and the second best: nothing, right or wrong."""
    random = np.random.default_rng([world, seeds])
    drawn = [
        [float(v) for v in mean + spread * random.standard_normal(seeds)]
        for mean, spread in zip(means, spreads, strict=True)
    ]
    best, second, *_ = np.argsort([np.mean(values) for values in drawn]).tolist()
    difference = against_best(drawn, best)[second]
    assert difference is not None
    if not difference.is_shown:
        return "nothing"
    return "right" if means[best] < means[second] else "wrong"


@pytest.mark.parametrize(
    ("means", "spreads"),
    [
        ([0, 0, 0], [1, 1, 1]),
        ([0, 0, 0], [10, 1, 1]),
        pytest.param([0, 0.2, 4], [1, 1, 1], marks=pytest.mark.long),
        pytest.param([0] * 12, [1] * 12, marks=pytest.mark.long),
        pytest.param([0] * 6, [10, *[1] * 5], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_best_beats_second_is_wrong_in_one_of_twenty_at_most(
    means: list[float], spreads: list[float]
) -> None:
    """3 of 60 sweeps, and two standard errors more."""
    said = [shown(means, spreads, 3, world) for world in range(60)]
    assert said.count("wrong") <= 6


def test_a_clear_difference_is_shown() -> None:
    said = [shown([0, 6, 8], [1, 1, 1], 3, world) for world in range(20)]
    assert said.count("right") >= 19


def test_three_seeds_tell_the_best_from_others_and_the_sentence_says_by_how_much() -> None:
    said = found(Truth(noise=0.002), lr=[5e-4, 2e-3], repeats=3)
    (best,), (difference,) = said["best"], said["difference"]
    assert best.sentence.startswith("best: lr 0.002, val loss ")
    assert best.sentence.endswith("(3 seeds) after 65,536 tokens")
    assert difference.sentence.startswith("lr 0.002 beats 0.0005 by 0.0")
    assert "(3 seeds each, p < 0.001)" in difference.sentence
    figures = difference.figures
    assert figures["difference"] == pytest.approx(0.08, abs=0.01)  # 0.02 * log2(4)^2


def test_equal_settings_cannot_be_told_apart_and_the_command_gives_more_seeds() -> None:
    said = found(dataclasses.replace(FLAT, world=3), lr=RATES, repeats=3)
    assert all(f.sentence.startswith("cannot tell lr ") for f in said["difference"][:1])
    asked = [f for f in said["difference"] if f.command]
    assert asked
    for finding in asked:
        more = finding.figures["more_seeds"]
        assert f"about {more} more seed" in finding.sentence
        assert f"sweep.repeats={3 + more}" in str(finding.command)


def test_nothing_can_be_told_from_one_seed() -> None:
    said = found(Truth(), lr=RATES)
    (finding,) = said["seeds"]
    assert finding.sentence.startswith("nothing can be told from one seed: ")
    assert finding.command == (
        "python jobs/sweep.py /nowhere/runs/s/sweep.yaml sweep.repeats=4 sweep.repeat=contenders"
    )
    assert "difference" not in said


def test_the_seed_that_chose_the_contenders_is_not_in_their_comparison() -> None:
    """Its losses are low because they were chosen so."""
    keys: dict[str, Any] = {"lr": RATES, "repeats": 4, "repeat": "contenders", "contenders": 2}
    said = found(Truth(noise=0.002), **keys)
    (difference,) = said["difference"]
    assert "(3 fresh seeds each, " in difference.sentence
    (left,) = said["seeds"]
    assert left.sentence.startswith("3 other settings have one seed each")
    plan = simulated(config(tokens_per_batch=None, **keys), Truth(noise=0.002))
    first, second = groups(plan)[:2]
    by = np.mean(second.fresh(65_536)) - np.mean(first.fresh(65_536))
    assert difference.figures["difference"] == pytest.approx(by)
    assert len(first.losses(65_536)) == 4


def test_only_losses_at_equal_tokens_are_compared() -> None:
    """Trials that asha paused are in no sentence about a difference."""
    said = found(Truth(noise=0.001), lr=RATES, scheduler="asha", repeats=2)
    at_the_end = simulated(
        config(tokens_per_batch=None, lr=RATES, scheduler="asha", repeats=2), Truth(noise=0.001)
    )
    whole = [g for g in groups(at_the_end) if g.tokens == 65_536]
    assert len(said.get("difference", ())) == len(whole) - 1


def test_no_test_is_made_between_trials_that_copied_weights() -> None:
    said = found(Truth(), lr=RATES, scheduler="pbt")
    assert "pbt copies weights" in said["scheduler"][0].sentence
    assert "difference" not in said and "seeds" not in said


def test_failed_trials_are_named_with_their_reason() -> None:
    (finding,) = found(Truth(diverges_from=8e-3), lr=RATES)["failed"]
    assert finding.sentence == "1 trial failed: lr 0.008 (failed)"


@few
@given(st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=4), min_size=2, max_size=5))
def test_any_losses_can_be_compared(losses: list[list[float]]) -> None:
    best = int(np.argmin([np.mean(values) for values in losses]))
    if max(map(len, losses)) < 2:
        return
    for place, difference in enumerate(against_best(losses, best)):
        assert (difference is None) == (place == best)
        if difference is not None:
            assert difference.value >= -1e-9
            assert not difference.is_shown or difference.p < 0.05


FOUR = [1e-3, 2e-3, 3e-3, 4e-3]
SCENARIOS: dict[str, tuple[Truth, dict[str, Any]]] = {
    "two equal settings, 3 seeds": (FLAT, {"lr": FOUR[:2], "repeats": 3}),
    "four equal settings, 3 seeds": (FLAT, {"lr": FOUR, "repeats": 3}),
    "the same, 5 seeds": (FLAT, {"lr": FOUR, "repeats": 5}),
    "the same, 3 contenders with 4 seeds": (
        FLAT,
        {"lr": FOUR, "repeats": 4, "repeat": "contenders"},
    ),
    "asha over eight equal settings, 3 seeds": (
        FLAT,
        {"lr": [n * 1e-3 for n in range(1, 9)], "repeats": 3, "scheduler": "asha", "rungs": 3},
    ),
    "a near-tie: 0.3 standard deviations apart": (
        Truth(curvature=0.003, noise=0.01), {"lr": [1e-3, 2e-3], "repeats": 3},
    ),
    "1 standard deviation apart": (
        Truth(curvature=0.01, noise=0.01), {"lr": [5e-4, 1e-3, 2e-3], "repeats": 3},
    ),
    "3 standard deviations apart": (
        Truth(curvature=0.03, noise=0.01), {"lr": [5e-4, 1e-3, 2e-3], "repeats": 3},
    ),
    "6 standard deviations apart": (
        Truth(curvature=0.06, noise=0.01), {"lr": [5e-4, 1e-3, 2e-3], "repeats": 3},
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", list(SCENARIOS))
def test_of_a_thousand_simulated_sweeps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole sweeps with a known truth: how often "best beats second" is said, and is wrong."""
    truth, sweep = SCENARIOS[name]
    said = wrong = 0
    for world in range(1000):
        known = dataclasses.replace(truth, world=world)
        c = config(tokens_per_batch=None, **sweep)
        plan = simulated(c, known, order=world)
        best, second = [g for g in groups(plan) if g.tokens == c.total_tokens][:2]
        for finding in findings(plan):
            if finding.figures.get("against") == second.settings and " beats " in finding.sentence:
                said += 1
                wrong += known.mean(best.settings, 1) >= known.mean(second.settings, 1)
    with capsys.disabled():
        print(f"\n| {name} | {said / 10:.1f}% | {wrong / 10:.1f}% |")
    assert wrong <= 50
