"""Sweeps without Ray: the runs of a sweep, what it refuses, and how it ranks the results."""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sweeps import Truth, config, simulated
from manta.config import from_dict, load, to_dict
from manta.errors import ConfigError, SweepError, TrainingError
from manta.failures import WorkersFailed
from manta.sweep.compared import groups
from manta.sweep.rehearsal import rehearse
from manta.sweep.results import conclude, table
from manta.sweep.settings import SweepConfig
from manta.sweep.work import ROUTINE, reason
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


def sweep_of(home: Path | str = "/nowhere", **keys: Any) -> SweepConfig:
    return from_dict(SweepConfig, {"home": str(home), **keys})


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
        lambda losses: any(loss is not None and math.isfinite(loss) for loss in losses)
    ),
    st.randoms(use_true_random=False),
)
def test_trials_are_ranked_by_their_val_loss_and_the_best_is_a_config(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float | None], random: Any
) -> None:
    """None means that the trial failed, as does NaN: both are ranked last, with the reason."""
    home = tmp_path_factory.mktemp("home")
    c = sweep_of(home, model={"dropout": 0.25}, threads_per_worker=3)
    by_name = dict(zip([trial.name for trial in c.trials()], losses, strict=True))
    plan = rehearse(c, 2, lambda s: by_name[s.trial], random.choice)
    ranking = conclude(plan)
    ranked = [row["run"] for row in ranking.rows]
    assert sorted(ranked) == sorted(by_name)
    known = [math.inf if loss is None or math.isnan(loss) else loss for loss in losses]
    of = dict(zip(by_name, known, strict=True))
    assert [of[name] for name in ranked] == sorted(known)
    assert [row["run"] for row in ranking.rows if row["why"]] == [
        name for name in ranked if math.isinf(of[name])
    ]

    folder = home / "runs" / "sweep"
    assert ranking.best_config == str(folder / "best.yaml")
    best = next(trial for trial in c.trials() if trial.name == ranked[0])
    # The winner's own run, which goes on from its checkpoint.
    expected = dataclasses.replace(best, threads_per_worker=3)
    assert load(PretrainConfig, [ranking.best_config]) == expected
    saved = json.loads((folder / "ranking.json").read_text())
    assert saved == ranking.rows
    keys_of = {trial.name: (trial.optimizer.lr, trial.tokens_per_batch) for trial in c.trials()}
    for row in saved:
        assert (row["lr"], row["tokens_per_batch"]) == keys_of[row["run"]]


def test_a_sweep_without_a_trial_that_ended_well_says_the_first_reason(tmp_path: Path) -> None:
    c = sweep_of(tmp_path)
    plan = rehearse(c, 1, lambda segment: None)
    first = c.trials()[0].name
    with pytest.raises(SweepError, match=f"no trial of sweep sweep ended well; {first}: failed"):
        conclude(plan)
    rows = json.loads((tmp_path / "runs" / "sweep" / "ranking.json").read_text())
    assert [row["why"] for row in rows] == ["failed"] * 6


def test_the_table_names_settings_with_their_seeds_and_failed_ones_last() -> None:
    c = config(lr=[1e-3, 2e-3, 64.0], tokens_per_batch=[1024], repeats=2)
    head, *lines = table(groups(simulated(c, Truth(diverges_from=64.0)))).lines
    assert head.split() == [
        "rank",
        "lr",
        "tokens_per_batch",
        "val",
        "loss",
        "seeds",
        "tokens",
        "run",
    ]
    assert [line.split()[:3] for line in lines] == [
        ["1", "0.002", "1,024"], ["2", "0.001", "1,024"], ["3", "64", "1,024"],
    ]  # fmt: skip
    assert re.fullmatch(
        r" *1 +0.002 +1,024  2\.\d{4} ± 0\.\d{4}  +2  65,536  s/lr0.002-batch1024", lines[0]
    )
    assert lines[2].split()[3] == "-"
    assert lines[2].endswith("s/lr64-batch1024  (2 of 2 seeds: failed)")


def test_a_table_of_single_runs_has_no_column_of_seeds() -> None:
    head, *lines = table(groups(simulated(config(lr=[1e-3, 2e-3]), Truth()))).lines
    assert "seeds" not in head
    assert all("±" not in line for line in lines)


@pytest.mark.parametrize("text", [
    "step 10/40 | loss 2.3 | lr 1e-3", "saved step 10 to /home (0.1 s)", "step 4 sample: The|cat",
    "resuming at step 10 from /home", "starting on 1 thread, fp32",
])  # fmt: skip
def test_a_sweep_passes_on_what_is_not_routine(text: str) -> None:
    assert ROUTINE.match(text)
    for news in ("step 10/40 | val loss 2.3", "out of memory (x)", "rank 0 has made no progress"):
        assert not ROUTINE.match(news)


def test_the_reason_of_a_failure_is_one_line_without_numbers_of_processes() -> None:
    raised = WorkersFailed("Traceback\n  File x\nray.Error: (pid=17, ip=10.0.0.1) no room\n")
    assert reason(raised) == "ray.Error: (pid=..., ip=...) no room"
    assert reason(TrainingError("two\n  lines")) == "two lines"
