"""Plans of sweeps: what is trained next, whatever the order of results and wherever a kill came."""

import dataclasses
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sweeps import Truth, config, simulated
from manta.config import load, to_yaml
from manta.errors import SweepError
from manta.sweep.journal import Journal, Notes, Record
from manta.sweep.plan import Plan, Result
from manta.sweep.rehearsal import cost, foreseen, rehearse
from manta.sweep.schedulers import Segment
from manta.sweep.settings import SweepConfig

few = settings(deadline=None, max_examples=20)
RATES = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 0.5, 100.0]
TRUTH = Truth(diverges_from=0.4)
DRAWN = {"lr": None, "tokens_per_batch": None, "trials": 10, "search": "random"}
RANGE = {"optimizer.lr": {"log_uniform": [1e-4, 1.0]}}
SWEEPS: dict[str, dict[str, Any]] = {
    "grid": {"lr": RATES, "tokens_per_batch": [512, 1024]},
    "repeats": {"lr": RATES[2:5], "tokens_per_batch": None, "repeats": 3},
    "random": {**DRAWN, "space": {**RANGE, "model.n_layer": [1, 2]}},
    "asha": {"lr": RATES, "tokens_per_batch": [512, 1024], "scheduler": "asha"},
    "thirds": {
        "lr": RATES, "tokens_per_batch": [512, 1024], "scheduler": "asha", "reduction_factor": 3,
        "rungs": 3,
    },
    "sizes": {"space": {"optimizer.lr": RATES, "model.n_layer": [1, 3]}, "scheduler": "asha"},
    "asha-repeats": {
        "lr": RATES, "tokens_per_batch": None, "scheduler": "asha", "repeats": 2,
    },
    "asha-contenders": {
        "lr": RATES, "tokens_per_batch": None, "scheduler": "asha", "repeats": 3,
        "repeat": "contenders", "contenders": 2,
    },
    "pbt": {"lr": RATES, "tokens_per_batch": None, "scheduler": "pbt", "exchanges": 5},
    "pbt-random": {**DRAWN, "space": RANGE, "scheduler": "pbt"},
    "replay": {"replay": {0: {"optimizer.lr": 1e-3}, 20_000: {"optimizer.lr": 2e-3}}},
}  # fmt: skip
sweeps = st.sampled_from(sorted(SWEEPS))
lanes = st.integers(1, 6)


def at(path: Path) -> Journal:
    return Journal(str(path / "decisions.jsonl"))


def continued(c: SweepConfig, journal: Notes, order: int, at_once: int) -> Plan:
    return simulated(c, TRUTH, lanes=at_once, order=order, notes=journal)


@few
@given(sweeps, lanes, st.integers(0, 99), st.floats(0, 1), st.integers(1, 6))
def test_a_sweep_cut_anywhere_ends_with_the_journal_of_one_that_was_not(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    at_once: int,
    order: int,
    share: float,
    others: int,
) -> None:
    """The cut may be within a line, and another number of lanes may go on, whose results come in
    another order."""
    whole, cut = (tmp_path_factory.mktemp(name) for name in ("whole", "cut"))
    c = config(**SWEEPS[name])
    plan = continued(c, at(whole), order, at_once)
    data = (whole / "decisions.jsonl").read_bytes()
    head = data.index(b"\n") + 1  # it has the number of lanes
    at_byte = max(head, int(share * len(data)))
    (cut / "decisions.jsonl").write_bytes(data[:at_byte])
    again = continued(c, at(cut), order + 1, others)
    assert (cut / "decisions.jsonl").read_bytes() == data
    assert again.standings() == plan.standings()
    assert again.is_over
    assert Plan(c, at(cut), 1).ready() == []
    assert (cut / "decisions.jsonl").read_bytes() == data


@few
@given(sweeps, lanes, st.integers(0, 99))
def test_every_sweep_ends_and_trains_no_token_of_a_trial_twice(
    name: str, at_once: int, order: int
) -> None:
    c = config(**SWEEPS[name])
    plan = continued(c, Notes(), order, at_once)
    reached: dict[str, int] = {}
    for segment in plan.segments:
        assert segment.start < segment.until <= c.total_tokens
        if segment.source:
            assert segment.trial not in reached, "a copy is a run of its own"
            assert segment.start == reached[segment.source], "its source has not gone on yet"
        else:
            assert segment.start == reached.get(segment.trial, 0)
        reached[segment.trial] = segment.until
        run = plan.config_of(segment)
        assert (run.name, run.seed, run.total_tokens) == (
            segment.trial, segment.seed, c.total_tokens
        )  # fmt: skip
    ends = Counter((segment.trial, segment.until) for segment in plan.segments)
    assert set(ends.values()) == {1}
    standings = plan.standings()
    assert {standing.trial.name for standing in standings} == set(reached)
    assert standings[0].is_complete
    ranks = [standing.rank for standing in standings]
    assert ranks == sorted(ranks)
    for standing in standings:
        diverged = standing.trial.settings.get("optimizer.lr", 0) >= TRUTH.diverges_from
        assert bool(standing.why) == diverged
        assert standing.tokens == (0 if diverged and standing.source is None else standing.tokens)


@few
@given(st.sampled_from(["asha", "thirds", "sizes", "asha-repeats"]), lanes)
def test_asha_promotes_no_more_than_its_share_and_pauses_the_others(
    name: str, at_once: int
) -> None:
    c = config(**SWEEPS[name])
    plan = continued(c, Notes(), 0, at_once)
    factor, seeds = c.sweep.reduction_factor, c.sweep.repeats
    rungs = [c.total_tokens // factor**n for n in reversed(range(c.sweep.rungs))]
    assert {segment.until for segment in plan.segments} <= set(rungs)
    for here, above in itertools.pairwise(rungs):
        reached = {s.trial for s in plan.segments if s.until == here}
        promoted = {s.trial for s in plan.segments if s.until == above}
        assert promoted <= reached
        share = len(reached) // seeds // factor
        # A lane that would have to wait promotes the best so far, which may not stay the best.
        assert share * seeds <= len(promoted) <= max(1, share + at_once - 1) * seeds
    done = cost(plan)
    assert done.tokens <= foreseen(c, at_once).tokens + at_once * c.total_tokens


def test_on_one_lane_asha_promotes_exactly_the_best_of_each_rung() -> None:
    c = config(**SWEEPS["asha"])
    plan = continued(c, Notes(), 0, 1)
    losses = {s.trial.name: s.losses for s in plan.standings()}
    rungs = [c.total_tokens // 2**n for n in (3, 2, 1, 0)]
    for here, above in itertools.pairwise(rungs):
        known = [name for name in losses if here in losses[name]]
        best = sorted(known, key=lambda name: losses[name][here])
        reached = 16 if here == rungs[0] else len(known)
        assert {n for n in known if above in losses[n]} == set(best[: reached // 2])
    assert cost(plan).tokens == 5 * c.total_tokens  # 16/8 + 8/8 + 4/4 + 2/2
    assert foreseen(c, 1).tokens == cost(plan).tokens


def test_what_no_result_can_change_is_ready_before_its_lane_is_free() -> None:
    """Lanes that are faster or slower than the plan's own do not wait while a rung fills."""
    plan = Plan(config(**SWEEPS["asha"]), Notes(), 2)
    assert len(plan.ready()) == 16
    for segment in plan.ready()[::-1]:
        assert len(plan.journal.records) == 3  # the head, and two starts: results wait their turn
        if segment == plan.ready()[0]:
            break
        plan.tell(Result(segment.trial, segment.until, 2.0))
    plan.tell(Result(segment.trial, segment.until, 2.0))
    assert [s.until for s in plan.ready()] == [16_384] * 8


def test_all_results_may_be_failures() -> None:
    for name, keys in SWEEPS.items():
        plan = rehearse(config(**keys), 2, lambda _: None)
        assert plan.is_over, name
        assert all(s.why == "failed" and s.loss == math.inf for s in plan.standings())
        assert not any(s.is_complete for s in plan.standings())


@pytest.mark.parametrize("name", ["asha", "thirds", "asha-repeats"])
def test_if_the_best_fail_at_the_end_the_next_best_is_trained_to_the_end(name: str) -> None:
    c = config(**SWEEPS[name])
    failing = {2e-3, 4e-3, 1e-3, 5e-4}

    def answer(segment: Segment) -> float | None:
        is_failing = segment.settings["optimizer.lr"] in failing
        return None if is_failing and segment.until == c.total_tokens else TRUTH.answer(segment)

    best = rehearse(c, 2, answer).standings()[0]
    assert best.is_complete
    assert best.trial.settings["optimizer.lr"] not in failing


def test_a_loss_that_is_no_number_is_a_failure_with_a_reason() -> None:
    plan = Plan(config(**SWEEPS["grid"]), Notes(), 1)
    (first, *_) = plan.ready()
    plan.tell(Result(first.trial, first.until, math.nan))
    assert plan.standings()[-1].why == "its loss is not a finite number"
    plan.tell(Result(plan.ready()[0].trial, first.until, math.inf, "diverged at step 3"))
    assert {s.why for s in plan.standings()[-2:]} >= {"diverged at step 3"}


def test_contenders_alone_get_the_repeats_and_are_trained_to_the_end() -> None:
    c = config(**SWEEPS["asha-contenders"])
    plan = continued(c, Notes(), 0, 2)
    by_group: dict[str, list[int]] = {}
    for standing in plan.standings():
        by_group.setdefault(standing.trial.group, []).append(standing.trial.seed)
    repeated = {group for group, seeds in by_group.items() if len(seeds) > 1}
    assert len(repeated) == 2
    assert all(len(by_group[group]) == 3 for group in repeated)
    finished = [s for s in plan.standings() if s.trial.group in repeated]
    assert all(s.is_complete for s in finished)
    assert {s.trial.seed for s in finished} == {1337, 1338, 1339}


def test_a_lucky_seed_does_not_win_and_contenders_win_over_what_has_one_seed() -> None:
    losses = {
        ("s/lr0.0005", 1337): 2.00, ("s/lr0.0005", 1338): 2.50, ("s/lr0.0005", 1339): 2.50,
        ("s/lr0.001", 1337): 2.10, ("s/lr0.001", 1338): 2.20, ("s/lr0.001", 1339): 2.15,
        ("s/lr0.002", 1337): 2.11, ("s/lr0.002", 1338): 2.60, ("s/lr0.002", 1339): 2.60,
    }  # fmt: skip

    def answer(segment: Segment) -> float:
        return losses[segment.trial.partition("-")[0], segment.seed]

    keys = {"lr": [5e-4, 1e-3, 2e-3], "tokens_per_batch": None, "repeats": 3}
    lucky = rehearse(config(**keys), 2, answer)
    assert lucky.standings()[0].trial.name == "s/lr0.0005"
    winner = lucky.winner()
    assert winner is not None
    assert winner.trial.name == "s/lr0.001"
    losses["s/lr0.002", 1337] = 2.2  # below the contenders' means, and not a contender
    c = config(**keys, repeat="contenders", contenders=2)
    winner = rehearse(c, 2, answer).winner()
    assert winner is not None
    assert winner.trial.name == "s/lr0.001"
    assert rehearse(c, 2, lambda _: None).winner() is None
    assert Plan(c, Notes(), 2).winner() is None


# Extension


@few
@given(st.sampled_from(["grid", "asha", "thirds", "random"]), lanes, st.floats(0, 1))
def test_a_value_added_to_the_space_runs_only_the_new_trials(
    name: str, at_once: int, share: float
) -> None:
    """Whether the sweep was over or not."""
    c = config(**SWEEPS[name])
    notes = Notes()
    continued(c, notes, 0, at_once)
    before = notes.records[: max(1, int(share * len(notes.records)))]
    keys = dict(SWEEPS[name])
    if name == "random":
        keys["trials"] = 14
    else:
        keys["lr"] = [*RATES, 3e-3]
    wider = config(**keys)
    notes = Notes(before)
    plan = continued(wider, notes, 1, at_once)
    assert notes.records[: len(before)] == before
    known = {record.trial for record in before if record.what == "start"}
    after = notes.records[len(before) :]
    assert not known & {record.trial for record in after if record.what == "start"}
    everything = continued(wider, Notes(), 0, at_once)
    if name != "random" or share == 1:  # draws that have not begun are of the new space
        names = {standing.trial.name for standing in everything.standings()}
        assert {standing.trial.name for standing in plan.standings()} == names
    again = Notes(notes.records)
    assert Plan(wider, again, 1).is_over
    assert again.records == notes.records


def test_more_seeds_for_all_run_only_the_new_seeds() -> None:
    keys = SWEEPS["repeats"]
    notes = Notes()
    continued(config(**{**keys, "repeats": 1}), notes, 0, 2)
    count = len(notes.records)
    continued(config(**keys), notes, 0, 2)
    starts = [r for r in notes.records[count:] if r.what == "start"]
    assert sorted(r.seed for r in starts) == [1338] * 3 + [1339] * 3  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lr": RATES[1:]}, "optimizer.lr: 0.00025 is missing now"),
        ({"tokens_per_batch": None}, "it also varies tokens_per_batch=[512, 1024]"),
        ({"space": {"model.n_layer": [1, 2]}}, "it does not vary model.n_layer"),
        ({"scheduler": "asha"}, "sweep.scheduler was none, and now is asha"),
        ({"repeats": 1}, "sweep.repeats was 2, and now is 1; more is possible"),
    ],
    ids=str,
)
def test_another_space_is_refused_with_what_differs(keys: dict[str, Any], said: str) -> None:
    had = {**SWEEPS["grid"], "repeats": 2}
    notes = Notes()
    Plan(config(**had), notes, 2)
    with pytest.raises(SweepError) as refused:
        Plan(config(**{**had, **keys}), notes, 2)
    assert said in str(refused.value)
    assert "keep all of its values and add to them" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_base_is_refused_and_what_changes_nothing_is_free() -> None:
    notes = Notes()
    c = config(**SWEEPS["grid"])
    Plan(c, notes, 2)
    Plan(dataclasses.replace(c, threads_per_worker=3, max_failures=1, num_workers=2), notes, 5)
    Plan(dataclasses.replace(c, sweep=dataclasses.replace(c.sweep, max_concurrent=3)), notes, 5)
    with pytest.raises(SweepError, match="document_mask was the default, and now is true"):
        Plan(dataclasses.replace(c, document_mask=True), notes, 2)
    with pytest.raises(SweepError, match="total_tokens was 65536, and now is 131072"):
        Plan(dataclasses.replace(c, total_tokens=131_072), notes, 2)


def test_asha_that_ranked_by_the_mean_of_its_seeds_gets_no_more_of_them() -> None:
    keys, notes = SWEEPS["asha-repeats"], Notes()
    Plan(config(**keys), notes, 2)
    with pytest.raises(SweepError, match="ranks by the mean of all seeds"):
        Plan(config(**{**keys, "repeats": 3}), notes, 2)


def test_the_population_of_pbt_cannot_grow() -> None:
    keys, notes = SWEEPS["pbt"], Notes()
    Plan(config(**keys), notes, 2)
    with pytest.raises(SweepError, match="a sweep with scheduler=pbt cannot get more values"):
        Plan(config(**{**keys, "lr": [*RATES, 3e-3]}), notes, 2)


# Damaged journals


@few
@given(st.sampled_from(["asha", "pbt"]), st.integers(1, 1000), st.sampled_from("dse"))
def test_a_journal_that_was_changed_is_refused_with_the_line(
    name: str, number: int, how: str
) -> None:
    """A line dropped, two swapped, or a loss edited so that the decisions would be others."""
    c, notes = config(**SWEEPS[name]), Notes()
    continued(c, notes, 0, 2)
    records = list(notes.records)
    place = 1 + number % (len(records) - 2)
    if how == "d":
        del records[place]
    elif how == "s":
        records[place : place + 2] = reversed(records[place : place + 2])
    else:
        results = [n for n, record in enumerate(records) if record.loss is not None]
        place = results[number % len(results)]
        records[place] = dataclasses.replace(records[place], loss=-100.0 - place)
    try:
        plan = Plan(c, Notes(records), 2)
    except SweepError as e:
        assert "line " in str(e)
        assert "give the sweep another name=" in str(e)
    else:
        assert how == "e"
        assert plan.is_over


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"what": "end"}\n', "line 1: no beginning of a sweep"),
        ("3\n", "line 1: 3: "),
        ('{"what": "sweep", "when": 3}\n', "line 1: when: unknown key"),
        ('{"what": "result", "tokens": "7"}\n', "line 1: tokens='7': "),
        ('{"what": "result", "loss": NaN}\n', "line 1: loss=nan: "),
    ],
)
def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "decisions.jsonl").write_text(text)
    with pytest.raises(SweepError) as refused:
        Plan(config(**SWEEPS["grid"]), at(tmp_path), 2)
    assert said in str(refused.value)
    assert (tmp_path / "decisions.jsonl").read_text() == text


@pytest.mark.parametrize("store", ["", "memory://manta-test-journal"])
def test_the_lines_of_a_journal_are_read_back_equal(tmp_path: Path, store: str) -> None:
    path = f"{store or tmp_path}/sweep/decisions.jsonl"
    journal = Journal(path)
    made = [
        Record("start", trial="ü\u2028", settings={"a": [1, None, {"b": 0.1}]}, seed=1, start=0),
        Record("result", trial="x", tokens=1 << 40, loss=0.1 + 0.2, why='"\\\n'),
    ]
    for record in made:
        journal.append(record)
    assert Journal(path).records == made == journal.records


# PBT


@few
@given(st.sampled_from(["pbt", "pbt-random"]), st.integers(0, 20), lanes)
def test_the_schedule_that_pbt_found_replays_as_one_run(
    tmp_path_factory: pytest.TempPathFactory, name: str, seed: int, at_once: int
) -> None:
    c = config(**SWEEPS[name], seed=seed)
    plan = continued(c, Notes(), 0, at_once)
    best = plan.standings()[0].trial.name
    found = plan.replay(best)
    wanted: dict[int, Any] = {}  # the lineage of the best run, part by part
    for segment in reversed([s for s in plan.segments if s.until <= c.total_tokens]):
        if segment.trial == best and segment.start not in wanted:
            wanted[segment.start] = dict(segment.settings)
            best = segment.source or best
    file = tmp_path_factory.mktemp("replay") / "replay.yaml"
    file.write_text(to_yaml(plan.replay_config(plan.standings()[0].trial.name)))
    replayed = simulated(load(SweepConfig, [str(file)]), TRUTH)
    assert replayed.c == dataclasses.replace(config(replay=found), name="s-replay")
    got: dict[int, Any] = {}
    for start in sorted(wanted):
        (part,) = (s for s in replayed.segments if s.start <= start < s.until)
        got[start] = dict(part.settings)
    assert got == wanted
    assert len({segment.trial for segment in replayed.segments}) == 1
    assert replayed.standings()[0].is_complete


def test_pbt_replaces_the_worst_quarter_by_changed_copies_of_the_best() -> None:
    c = config(**SWEEPS["pbt"])
    plan = continued(c, Notes(), 0, 2)
    first = [s for s in plan.segments if s.start == 0]
    second = [s for s in plan.segments if s.start == first[0].until]
    assert len(first) == len(second) == 8
    losses = {s.trial: TRUTH.answer(s) for s in first}
    alive = sorted((n for n in losses if losses[n] is not None), key=lambda n: losses[n] or 0.0)
    copies = [s for s in second if s.source]
    assert {s.trial for s in first} - {s.trial for s in second} == losses.keys() - set(alive)
    assert len(copies) == 2
    assert {s.source for s in copies} <= set(alive[:2])
    assert all(s.settings["optimizer.lr"] in RATES for s in copies)


# Trials that failed


@few
@given(st.sampled_from(["grid", "asha", "asha-repeats", "asha-contenders", "replay"]), lanes)
def test_what_failed_is_tried_again_where_asked_and_the_sweep_is_as_if_it_had_not(
    name: str, at_once: int
) -> None:
    c, notes = config(**SWEEPS[name]), Notes()
    broken = lambda segment: None if segment.until > 40_000 else TRUTH.answer(segment)  # noqa: E731
    before = rehearse(c, at_once, broken, notes=notes)
    assert not before.standings()[0].is_complete
    assert Plan(c, Notes(notes.records), 1).ready() == []
    again = dataclasses.replace(c, sweep=dataclasses.replace(c.sweep, retry_failed=True))
    length = len(notes.records)
    plan = rehearse(again, at_once, TRUTH.answer, notes=notes)
    assert "retry" in {record.what for record in notes.records[length:]}
    assert plan.standings()[0].is_complete
    rates = [s.trial.settings["optimizer.lr"] for s in plan.standings() if s.why]
    assert all(rate >= TRUTH.diverges_from for rate in rates)
    if name == "grid":
        assert plan.standings() == simulated(c, TRUTH).standings()
    read_again = Plan(c, Notes(notes.records), 1)
    assert read_again.standings() == plan.standings()
    assert read_again.is_over


def test_what_diverged_is_not_tried_again() -> None:
    c, notes = config(**SWEEPS["grid"], retry_failed=True), Notes()
    plan = Plan(c, notes, 1)
    for number, segment in enumerate(plan.ready()):
        loss = [2.0, math.nan, None][number % 3]
        plan.tell(Result(segment.trial, segment.until, loss))
    assert plan.is_over
    failed = [s.trial.name for s in plan.standings() if s.why and not s.diverged]
    assert [s.trial for s in Plan(c, notes, 1).ready()] == failed
