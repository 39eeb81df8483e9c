"""Optuna's TPE as a function: what it suggests follows from what was tried, and beats luck."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sweeps import Truth, config, simulated
from manta.config import from_dict
from manta.errors import ConfigError
from manta.sweep import space as spaces
from manta.sweep.journal import Notes
from manta.sweep.plan import Plan
from manta.sweep.search import Tried
from manta.sweep.settings import SweepConfig

optuna_search = pytest.importorskip("manta.sweep.optuna_search")
pytest.importorskip("optuna", reason="needs optuna")

few = settings(deadline=None, max_examples=10)
SPACE = (
    spaces.parse("lr", {"log_uniform": [1e-4, 1e-1]}),
    spaces.parse("width", {"int_uniform": [3, 9]}),
    spaces.parse("share", {"uniform": [0, 1]}),
    spaces.parse("kind", [None, [1, 2], {"a": 1}, "x"]),
)
losses = st.dictionaries(
    st.sampled_from([100, 200, 400]), st.floats(1, 9) | st.just(math.inf), max_size=3
)


@few
@given(st.lists(losses, max_size=14), st.integers(0, 1 << 40), st.integers(0, 99))
def test_suggestions_are_in_the_space_and_follow_from_what_was_tried(
    known: list[dict[int, float]], seed: int, index: int
) -> None:
    """The same holds with trials that are running, paused or failed."""
    tried = [
        Tried(spaces.drawn(SPACE, 1, number), found, 400 in found)
        for number, found in enumerate(known)
    ]
    found = optuna_search.suggest(SPACE, tried, seed, index)
    assert found == optuna_search.suggest(SPACE, tried, seed, index)
    assert list(found) == [d.key for d in SPACE]
    assert 1e-4 <= found["lr"] <= 1e-1
    assert 3 <= found["width"] <= 9
    assert isinstance(found["width"], int)
    assert 0 <= found["share"] <= 1
    assert found["kind"] in SPACE[3].values


def test_suggestions_gather_where_losses_are_low() -> None:
    """Compared with random draws of the same number: the last half of each sweep."""
    space = {"optimizer.lr": {"log_uniform": [1e-5, 1.0]}}

    def distance(search: str) -> float:
        """The median distance from the best rate, in octaves."""
        found = []
        for world in range(5):
            truth = Truth(world=world, noise=0.001)
            c = config(space=space, trials=30, search=search, seed=world)
            for segment in simulated(c, truth).segments[15:]:
                found.append(abs(math.log2(segment.settings["optimizer.lr"] / truth.best_lr)))
        return statistics.median(found)

    assert distance("optuna") < distance("random") / 1.5


@few
@given(st.sampled_from(["none", "asha"]), st.integers(1, 3), st.floats(0, 1))
def test_a_sweep_with_optuna_goes_on_after_a_cut_as_if_there_was_none(
    scheduler: str, lanes: int, share: float
) -> None:
    truth = Truth(diverges_from=0.05)
    space = {"optimizer.lr": {"log_uniform": [1e-4, 1e-1]}}
    c = config(space=space, search="optuna", trials=13, scheduler=scheduler)
    whole = Notes()
    plan = simulated(c, truth, lanes=lanes, notes=whole)
    assert len(plan.standings()) == 13
    cut = Notes(whole.records[: max(1, int(share * len(whole.records)))])
    again = simulated(c, truth, lanes=lanes, order=3, notes=cut)
    assert cut.records == whole.records
    assert again.standings() == plan.standings()
    more = config(space=space, search="optuna", trials=15, scheduler=scheduler)
    simulated(more, truth, lanes=lanes, notes=cut)
    assert len(Plan(more, cut, 1).standings()) == 15


def test_a_space_that_is_used_up_ends_the_search() -> None:
    c = config(lr=[1e-3, 2e-3], tokens_per_batch=[512, 1024], search="optuna", trials=9)
    plan = simulated(c, Truth())
    assert sorted(s.trial.name for s in plan.standings()) == sorted(
        trial.name for trial in config(lr=[1e-3, 2e-3], tokens_per_batch=[512, 1024]).grid[0]
    )


def test_suggestions_that_no_run_can_have_are_passed_over() -> None:
    space = {"model.n_embd": {"int_uniform": [32, 36]}, "optimizer.lr": [1e-3, 2e-3]}
    for search in ("optuna", "random"):
        plan = simulated(config(space=space, search=search, trials=4), Truth())
        names = {s.trial.name for s in plan.standings()}
        assert names == {f"s/lr{lr}-n_embd{n}" for lr in (0.001, 0.002) for n in (32, 36)}
        assert all("n_embd" in name for name in plan.passed_over)
        assert plan.passed_over


def test_without_optuna_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    c = from_dict(SweepConfig, {"sweep": {"search": "optuna", "trials": 2}})
    with pytest.raises(ConfigError, match=r"package optuna: pip install 'manta\[optuna\]"):
        Plan(c, Notes(), 1)
