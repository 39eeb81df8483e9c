"""What a sweep varies: the values of its keys, the trials that follow, and what is refused."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sweeps import config
from manta.config import from_dict, load, name_of_run, to_dict
from manta.errors import ConfigError
from manta.sweep import space as spaces
from manta.sweep.settings import SweepConfig
from manta.sweep.space import Dimension

few = settings(deadline=None, max_examples=25)
numbers = st.floats(1e-6, 1e6)


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(SweepConfig, ["home=/nowhere", *arguments])
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweep.space.model.n_layr=[2]"], "unknown key; did you mean model.n_layer?"),
        (["sweep.space.lr=[1]"], "sweep.space.lr: unknown key; did you mean optimizer.lr?"),
        (["sweep.space.model.n_layer=[a]"], "sweep.space.model.n_layer='a': should be a valid int"),
        (["sweep.space.model.n_layer=[2,2.5]"], "sweep.space.model.n_layer=2.5: should be"),
        (["sweep.space.optimizer.lr=[-1]"], "sweep.space.optimizer.lr=-1: should be greater"),
        (["sweep.space.model.n_layer=[]"], "sweep.space.model.n_layer=[]: it needs a value"),
        (["sweep.space.model.n_layer=[1,2,1]"], "1 is there twice: omit one"),
        (["sweep.space.model.n_layer=3"], "sweep.space.model.n_layer=3: a list is expected"),
        (["sweep.space=5"], "sweep.space=5: should be a valid dictionary"),
        (["sweep.space.optimizer.lr={log_unifor: [1,2]}"], "expected; did you mean log_uniform?"),
        (["sweep.space.optimizer.rl={log_uniform: [1,2]}"], "unknown key; did you mean optimizer."),
        (["sweep.lr=1e-3"], "sweep.lr=0.001: should be a list, as [1, 2]"),
        (["sweep.space.model=[a]"], "sweep.space.model='a': should be a group of keys: give"),
        (["sweep.space.optimizer.lr={log_uniform: [1,2]}"], "search=grid needs lists: set sweep."),
        (["sweep.space.optimizer.lr={log_uniform: [2,1]}"], "first number has to be below"),
        (["sweep.space.optimizer.lr={log_uniform: [0,1]}"], "above 0, or use uniform"),
        (["sweep.space.optimizer.lr={uniform: [1]}"], "two numbers are expected"),
        (["sweep.space.model.n_layer={int_uniform: [1.5,3]}"], "two whole numbers"),
        (["sweep.lr=[1e-3]", "sweep.space.optimizer.lr=[1e-3]"], "are the same key: omit one"),
        (["sweep.space.model.n_head=[2,5]"], "no trial can take 5: model.n_embd=256 does not"),
        (["sweep.tokens_per_batch=[300]"], "no trial of the sweep is possible; sweep/lr0.001-b"),
        (
            [
                *(f"sweep.space.{k}=[1,2,3,4,5,6,7,8,9,10]" for k in ("model.n_layer", "seed")),
                *(f"sweep.space.optimizer.{k}=[1,2,3,4,5,6,7,8,9,10]" for k in ("lr", "head_lr")),
                "sweep.space.model.n_embd=[32,64]",
            ],
            "the grid has 20,000 combinations, and at most 10,000 can be tried",
        ),
        (["sweep.search=random", "sweep.trials=10001"], "at most 10,000 is valid"),
        (["sweep.space.total_tokens=[1]"], "trials compare at equal tokens"),
        (["sweep.space.data.vocab_size=[512]"], "trials compare on one dataset; omit it"),
        (["sweep.space.eval.tokens=[5]"], "trials compare by the same measure"),
        (["sweep.space.checkpoint.every=[5]"], "does not change what a trial learns"),
        (["sweep.space.seed=[1,2]", "sweep.repeats=2"], "varies the seed too"),
        (["sweep.search=random"], "sweep.search=random needs the number of trials"),
        (["sweep.trials=4"], "trials=4 is for search=random or search=optuna: omit it"),
        (["sweep.rungs=3"], "sweep.rungs=3 is for scheduler=asha: omit it, or set that"),
        (["sweep.exchanges=3"], "sweep.exchanges=3 is for scheduler=pbt"),
        (["sweep.contenders=2"], "sweep.contenders=2 is for repeat=contenders"),
        (["sweep.scheduler=pbt", "sweep.search=optuna", "sweep.trials=4"], "set search=random"),
        (["sweep.scheduler=pbt", "sweep.repeats=2"], "repeats=2 is not for scheduler=pbt"),
        (["sweep.replay={0: {optimizer.lr: 1}}", "sweep.repeats=2"], "one run: omit repeats=2"),
        (["sweep.repeat=contenders"], "needs repeats=2 or more"),
        (["sweep.scheduler=pbt"], "sweep.tokens_per_batch: scheduler=pbt changes settings"),
        (["sweep.scheduler=asha", "sweep.rungs=9"], "1,600 tokens, less than a batch of 4,096"),
        (["sweep.scheduler=asha", "sweep.reduction_factor=1"], "at least 2 is valid"),
        (["sweep.replay={5: {optimizer.lr: 1}}"], "the first have to be from 0 on"),
        (
            ["sweep.replay={0: {model.n_layer: 1}, 2048: {model.n_layer: 2}}"],
            "sweep.replay.2048: model.n_layer cannot change while a run trains",
        ),
        (["sweep.replay={0: {optimizer.lr: x}}"], "sweep.replay.0: optimizer.lr='x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_a_space_cannot_have_is_refused_in_one_line(arguments: list[str], said: str) -> None:
    message = refused(*arguments)
    assert said in message
    assert "\n" not in message


def test_a_space_may_be_given_with_dots_or_in_groups_and_in_any_order() -> None:
    nested = load(SweepConfig, ["sweep.space.model.n_layer=[1,2]", "sweep.space.optimizer.lr=[1]"])
    dotted = load(SweepConfig, ["sweep.space={optimizer.lr: [1], model.n_layer: {choice: [1, 2]}}"])
    short = load(SweepConfig, ["sweep.lr=[1]", "sweep.space.model.n_layer=[1,2]"])
    names = ["sweep/lr1-n_layer1", "sweep/lr1-n_layer2"]
    for c in (nested, dotted, short):
        assert [trial.name for trial in c.grid[0]] == names
        assert [run.model.n_layer for run in c.trials()] == [1, 2]
        assert from_dict(SweepConfig, to_dict(c)).grid == c.grid


def test_a_range_may_be_given_without_quotes_and_as_a_whole() -> None:
    search = ["sweep.search=random", "sweep.trials=3"]
    plain = load(SweepConfig, [*search, "sweep.space.optimizer.lr.log_uniform=[1e-4,1e-2]"])
    whole = load(SweepConfig, [*search, "sweep.space={optimizer.lr: {log_uniform: [1e-4, 1e-2]}}"])
    assert plain.dimensions == whole.dimensions
    assert plain.dimensions == (Dimension("optimizer.lr", "log_uniform", (), 1e-4, 1e-2),)


def test_a_space_replaces_the_stock_case_and_null_omits_a_part_of_it() -> None:
    stock = itertools.product(("0.001", "0.002", "0.004"), (2048, 4096))
    names = [f"sweep/lr{lr}-batch{batch}" for lr, batch in stock]  # as of earlier versions
    assert [trial.name for trial in load(SweepConfig).grid[0]] == names
    layers = load(SweepConfig, ["sweep.space.model.n_layer=[1,2]"])
    assert [trial.settings for trial in layers.grid[0]] == [
        {"model.n_layer": 1},
        {"model.n_layer": 2},
    ]
    rates = load(SweepConfig, ["sweep.tokens_per_batch=null"])
    assert [trial.name for trial in rates.grid[0]] == [f"sweep/lr{lr}" for lr in (1e-3, 2e-3, 4e-3)]


def test_a_preset_of_a_trial_fills_in_what_the_sweep_does_not_say() -> None:
    c = load(SweepConfig, ["sweep.space.model.preset=[gpt2-124m,gpt2-350m]", "model.n_head=8"])
    assert [(run.model.n_layer, run.model.n_head) for run in c.trials()] == [(12, 8), (24, 8)]


def test_a_value_that_is_a_dict_is_replaced_as_a_whole() -> None:
    c = config(space={"batch_ramp": [{512: 1024}, {256: 2048}]})
    assert [run.batch_ramp for run in c.trials()] == [{512: 1024}, {256: 2048}]
    assert len({run.name for run in c.trials()}) == 2


def test_combinations_that_no_run_can_have_are_passed_over_with_their_reason() -> None:
    c = config(space={"model.n_embd": [32, 48], "model.n_head": [2, 3]})
    assert [trial.name for trial in c.grid[0]] == [
        "s/n_embd32-n_head2", "s/n_embd48-n_head2", "s/n_embd48-n_head3"
    ]  # fmt: skip
    assert list(c.grid[1]) == ["s/n_embd32-n_head3"]
    assert "does not divide by n_head=3" in c.grid[1]["s/n_embd32-n_head3"]


values = st.one_of(
    st.lists(numbers | st.integers(0, 99), max_size=5, unique=True),
    st.lists(st.text(max_size=60), max_size=5, unique=True),
    st.lists(st.lists(st.integers(0, 9)), max_size=5, unique_by=tuple),
)


@few
@given(values, st.sampled_from([["a.x"], ["a.x", "b.x"], ["optimizer.lr", "a"]]))
def test_names_of_trials_tell_all_settings_apart_and_are_names_of_runs(
    values: list[Any], keys: list[str]
) -> None:
    combinations = list(itertools.product(values, repeat=len(keys)))
    labels = {spaces.label(dict(zip(keys, chosen, strict=True))) for chosen in combinations}
    assert len(labels) == len(combinations)
    for label in labels:
        assert name_of_run(f"s/{label}-part10-10-seed{1 << 62}")


def test_two_values_with_one_name_are_the_same_value() -> None:
    assert "1.0 is there twice" in refused("sweep.space.optimizer.lr=[1,1.0]")
    assert "1 is there twice" in refused("sweep.space.model.preset=['1',1]")


ranges = st.tuples(st.sampled_from(spaces.RANGES), st.integers(1, 50), st.integers(1, 1000))


@few
@given(ranges, st.integers(0, 1 << 40), st.integers(0, 1000))
def test_draws_are_in_their_range_and_depend_on_seed_and_number_alone(
    given_range: tuple[Any, int, int], seed: int, index: int
) -> None:
    kind, low, width = given_range
    d = spaces.parse("k", {kind: [low, low + width]})
    other = Dimension("l", "choice", ("a", None, 3))
    found = spaces.drawn((d, other), seed, index)
    assert low <= found["k"] <= low + width
    assert found["l"] in other.values
    assert isinstance(found["k"], int) == (kind == "int_uniform")
    assert found == spaces.drawn((d, other), seed, index)
    assert spaces.parse("k", d.spec()) == d


@pytest.mark.parametrize("kind", spaces.RANGES)
def test_draws_cover_their_range_evenly(kind: Any) -> None:
    d = spaces.parse("k", {kind: [1, 1000]})
    found = sorted(d.at(index / 999) for index in range(1000))
    middle = 31.6 if kind == "log_uniform" else 500
    assert found[0] == 1
    assert found[-1] == 1000
    assert found[500] == pytest.approx(middle, rel=0.03)


def test_a_dry_run_shows_the_trials_and_what_they_cost() -> None:
    c = config(space={"model.n_embd": [32, 48], "model.n_head": [2, 3]}, scheduler="asha")
    found = c.derived()
    assert found["trials"] == "3"
    assert found["tokens of all trials"] == f"{65_536 * (3 + 1 + 2 + 4) // 8:,}"
    assert "s/n_embd32-n_head3 (" in found["combinations that no run can have"]
    assert found["steps, of s/n_embd32-n_head2"] == 64
    (flops,) = {c.flops_per_token(trial) for trial in c.grid[0][:1]}
    assert float(found["FLOPs of all trials"]) > flops * 65_536
