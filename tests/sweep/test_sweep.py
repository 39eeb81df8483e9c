"""Sweeps without Ray: the runs of a sweep, what it refuses, and how it ranks the results."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.config import from_dict, load, to_dict
from manta.errors import ClusterError, ConfigError
from manta.sweep.settings import SweepConfig
from manta.sweep.sweep import Ranking, rank
from manta.train.settings import PretrainConfig

few = settings(deadline=None, max_examples=25)
rates = st.lists(
    st.sampled_from([1e-7, 3e-4, 1e-3, 0.0010000001, 0.25, 9.0])
    | st.floats(0.001, 0.001000001)
    | st.floats(min_value=5e-324, allow_infinity=False),
    min_size=1, max_size=5, unique=True,
)  # fmt: skip
batches = st.lists(st.integers(1, 8).map(lambda n: 256 * n), min_size=1, max_size=4, unique=True)
val_losses = st.floats(0, 20) | st.just(math.nan)


@dataclasses.dataclass
class Result:
    """One of Ray Tune's results, with the parts that a ranking reads."""

    config: dict[str, Any]
    metrics: dict[str, Any] | None
    error: Exception | None = None


class Results(list[Result]):
    """A list of results, in the form in which Ray Tune gives them."""

    @property
    def errors(self) -> list[Exception]:
        return [result.error for result in self if result.error is not None]


def sweep_of(home: Path | str = "/nowhere", **keys: Any) -> SweepConfig:
    return from_dict(SweepConfig, {"home": str(home), **keys})


def ended(trial: PretrainConfig, val_loss: float) -> Result:
    metrics = {"val_loss": val_loss, "val_bpb": val_loss / 2, "tokens": 1024.0}
    return Result({"trial": to_dict(trial)}, metrics)


def died(trial: PretrainConfig, why: str = "its worker died") -> Result:
    return Result({"trial": to_dict(trial)}, None, RuntimeError(why))


@few
@given(rates, batches, st.none() | st.integers(1, 4))
def test_the_trials_are_each_rate_with_each_batch_and_otherwise_the_config(
    lr: list[float], tokens: list[int], threads: int | None
) -> None:
    c = sweep_of(
        name="a/sweep", seed=7, threads_per_worker=threads, cpus_per_worker=2.5,
        sweep={"lr": lr, "tokens_per_batch": tokens}, optimizer={"weight_decay": 0.5},
    )  # fmt: skip
    trials = c.trials()
    found = [(trial.optimizer.lr, trial.tokens_per_batch) for trial in trials]
    assert found == list(itertools.product(lr, tokens))
    names = [trial.name for trial in trials]
    assert len(set(names)) == len(names)
    assert all(name.startswith("a/sweep/") for name in names)
    shared = to_dict(c)
    del shared["sweep"]
    for trial in trials:
        own = to_dict(trial)
        # A trial uses only the CPUs that it has reserved.
        assert own["threads_per_worker"] == (threads or 2)
        for tree in (own, shared):
            for key in ("name", "tokens_per_batch", "threads_per_worker"):
                tree.pop(key, None)
            tree["optimizer"].pop("lr", None)
        assert own == shared


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sweep": {"lr": []}}, "sweep.lr=[]: it needs a value"),
        ({"sweep": {"tokens_per_batch": []}}, "sweep.tokens_per_batch=[]: it needs a value"),
        (
            {"sweep": {"tokens_per_batch": [512, 300]}},
            "sweep.tokens_per_batch: no trial can take 300: tokens_per_batch=300 does not divide",
        ),
        ({"sweep": {"lr": [0]}}, "sweep.lr"),
        ({"sweep": {"lr": [1e-3, 2e-3, 0.001]}}, "0.001 is there twice: omit one"),
        ({"sweep": {"tokens_per_batch": [512, 512]}}, "512 is there twice: omit one"),
        ({"eval": {"suites": ["quick"]}}, "evaluate the best trial instead"),
    ],
    ids=str,
)
def test_what_a_sweep_cannot_try_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        sweep_of(**keys)
    assert said in str(refused.value)


def test_the_batch_of_a_single_run_is_not_asked_for() -> None:
    """Each trial has a batch of its own, so the sweep's own batch need not divide."""
    c = sweep_of(tokens_per_batch=300, sweep={"tokens_per_batch": [512]})
    assert [trial.tokens_per_batch for trial in c.trials()] == [512] * 3


@few
@given(
    st.lists(val_losses | st.none(), min_size=6, max_size=6).filter(
        lambda losses: any(loss is not None for loss in losses)
    ),
    st.randoms(use_true_random=False),
)
def test_trials_are_ranked_by_their_val_loss_and_the_best_is_a_config(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float | None], random: Any
) -> None:
    """None means that the trial failed. NaN is worse than any number."""
    home = tmp_path_factory.mktemp("home")
    c = sweep_of(home, model={"dropout": 0.25}, threads_per_worker=3)
    trials = c.trials()
    by_name = {trial.name: loss for trial, loss in zip(trials, losses, strict=True)}
    results = Results(
        died(trial) if loss is None else ended(trial, loss)
        for trial, loss in zip(trials, losses, strict=True)
    )
    random.shuffle(results)
    ranking = rank(c, trials, results)
    ranked = [row["run"] for row in ranking.rows]
    assert sorted(ranked) == sorted(name for name, loss in by_name.items() if loss is not None)
    keys = [math.inf if math.isnan(by_name[name] or 0) else by_name[name] for name in ranked]
    assert keys == sorted(keys)  # type: ignore[type-var]

    folder = home / "runs" / "sweep"
    assert ranking.best_config == str(folder / "best.yaml")
    best = next(trial for trial in trials if trial.name == ranked[0])
    expected = dataclasses.replace(best, name="sweep-best", home=None, threads_per_worker=3)
    assert load(PretrainConfig, [ranking.best_config]) == expected
    saved = json.loads((folder / "ranking.json").read_text())
    assert [row["run"] for row in saved] == ranked
    keys_of = {trial.name: (trial.optimizer.lr, trial.tokens_per_batch) for trial in trials}
    for row in saved:
        assert (row["lr"], row["tokens_per_batch"]) == keys_of[row["run"]]


def test_a_sweep_without_a_trial_that_ended_well_says_why(tmp_path: Path) -> None:
    c = sweep_of(tmp_path)
    trials = c.trials()
    results = Results([died(trials[0], "no room on the disk"), died(trials[1], "another reason")])
    with pytest.raises(ClusterError, match=r"no trial of sweep sweep ended well: .*no room on the"):
        rank(c, trials, results)
    without_a_loss = Results([Result({"trial": to_dict(trials[0])}, {"tokens": 1})])
    with pytest.raises(ClusterError, match=r"ended well: \?"):
        rank(c, trials, without_a_loss)
    assert not (tmp_path / "runs").exists()


def test_the_table_has_a_line_for_each_trial_best_first() -> None:
    rows = [
        {"lr": 1e-3, "tokens_per_batch": 512, "val_loss": 2.5, "val_bpb": 1.25, "tokens": 10_240,
         "run": "sweep/a"},
        {"lr": 0.25, "tokens_per_batch": 256, "val_loss": math.nan, "val_bpb": math.nan,
         "tokens": 512, "run": "sweep/b"},
    ]  # fmt: skip
    head, *lines = Ranking(rows, "best.yaml").table().splitlines()
    assert head.split()[:2] == ["rank", "lr"]
    assert [line.split() for line in lines] == [
        ["1", "0.001", "512", "2.5000", "1.2500", "10,240", "sweep/a"],
        ["2", "0.25", "256", "nan", "nan", "512", "sweep/b"],
    ]
