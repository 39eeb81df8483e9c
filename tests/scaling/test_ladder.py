"""The ladder without Ray: its runs, their rates, the order of training, and what is left."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checkpoints import model_of, save
from helpers.datasets import write_dataset
from manta import layout
from manta.config import from_dict, load, to_dict, to_yaml
from manta.errors import ConfigError, DataError
from manta.scaling.climbing import Climb, left, trained_tokens
from manta.scaling.fit import Law
from manta.scaling.ladder import cost, nearest, shape
from manta.scaling.points import Point, counted
from manta.scaling.recommend import _reach
from manta.scaling.settings import ScalingConfig
from manta.scaling.study import study
from manta.scaling.training import require_data
from manta.sweep.plan import Result, Segment
from manta.text import tokenizer as tokenizers
from manta.train.settings import PretrainConfig
from manta.train.step.schedule import lr_at, warmup_steps

BATCH = 256
MODEL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "context_length": 32}
few = settings(deadline=None, max_examples=30)


def ladder(home: Path | str = "/nowhere", keys: dict[str, Any] | None = None, **more: Any) -> Any:
    """A study with a ladder of three sizes and three budgets."""
    given = {"sizes": [32, 64, 96], "tokens": [40_960, 81_920, 163_840], "grow": "width"}
    tree = {"name": "s", "home": str(home), "tokens_per_batch": BATCH, "model": MODEL}
    return from_dict(ScalingConfig, {**tree, "ladder": {**given, **(keys or {})}, **more})


@few
@given(
    st.lists(st.integers(40, 3000), min_size=3, max_size=5, unique=True),
    st.floats(0.02, 0.6), st.integers(1, 10), st.sampled_from(["sqrt", "linear"]),
)  # fmt: skip
def test_the_rate_of_a_budget_is_that_of_a_run_of_its_own(
    steps: list[int], decay: float, warm: int, curve: str
) -> None:
    """What the stable run trains up to a budget's start, a run of that budget alone would, too."""
    keys = {"tokens": [BATCH * n for n in steps], "warmup_tokens": BATCH * warm}
    schedule = {"decay": decay, "decay_shape": curve, "min_lr_ratio": 0.0}
    try:
        stems = cost(ladder(keys=keys, schedule=schedule)).stems
    except ConfigError as e:
        assert "too near each other" in str(e)
        return
    for stem in stems:
        stable, before = stem.stable, 0
        for rung in stem.rungs:
            total, start = rung.run.total_steps, rung.start // BATCH
            assert warmup_steps(total, rung.run.schedule) == warm <= start
            assert before < start < total and rung.tokens == BATCH * total
            alone = [lr_at(s, total, 1.0, rung.run.schedule) for s in range(total)]
            stem_rates = [lr_at(s, stable.total_steps, 1.0, stable.schedule) for s in range(start)]
            assert stem_rates == alone[:start]
            assert max(alone[start + 1 :], default=0.0) < 1.0
            before = start


def test_runs_differ_in_size_and_length_alone() -> None:
    c = ladder(
        keys={"lr": [1e-3, 2e-3], "tokens_per_parameter": [], "tokens_per_batch": [256, 512]}
    )
    stems = cost(c).stems
    assert len(stems) == 3 * 2 * 2
    names = [rung.run.name for stem in stems for rung in stem.rungs]
    assert len(set(names)) == len(names) == 36
    for stem in stems:
        for run in (stem.stable, *(rung.run for rung in stem.rungs)):
            assert run.schedule.kind == "wsd" and run.seed == c.seed
            assert run.model.n_embd // run.model.n_head == 16 and run.model.n_layer == 2
            assert from_dict(PretrainConfig, to_dict(run)) == run
            assert run.name.startswith("s/")


@few
@given(st.floats(5e9, 1e12), st.sampled_from(["all", "no_embeddings"]))
def test_the_runs_of_a_ladder_with_most_flops_are_those_of_at_most_so_many(
    most: float, count: str
) -> None:
    def taken(**keys: Any) -> set[tuple[str, float]]:
        return {
            (rung.run.name, 6 * stem.parameters * rung.tokens)
            for stem in cost(ladder(keys=keys, count=count)).stems
            for rung in stem.rungs
        }

    expected = {(name, flops) for name, flops in taken() if flops <= most}
    try:
        assert taken(most_flops=most) == expected
    except ConfigError as e:  # a size without a run, or too few runs for a law
        assert "leave this size out" in str(e) or "too few runs" in str(e)


@few
@given(st.randoms(use_true_random=False), st.integers(1, 3), st.booleans())
def test_each_part_is_trained_once_and_copies_before_the_stable_run_goes_on(
    random: Any, lanes: int, fails: bool
) -> None:
    whole = cost(ladder())
    climb = Climb(whole.stems)
    place: dict[str, int] = {}
    trained: list[Segment] = []
    running: list[Segment] = []
    broken = random.choice(whole.stems).stable.name if fails else ""
    while ready := climb.ready():
        for segment in ready:
            if len(running) < lanes and segment not in running:
                here = place.setdefault(segment.source or segment.trial, 0)
                assert here == segment.start, "the checkpoint that it starts from is the newest"
                running.append(segment)
        done = running.pop(random.randrange(len(running)))
        trained.append(done)
        place[done.trial] = done.until
        is_broken = done.trial == broken and done.start > 0
        climb.tell(Result(done.trial, done.until, None if is_broken else 2.0, "broken"))
    assert climb.is_over
    assert len({(s.trial, s.until) for s in trained}) == len(trained)
    if not fails:
        assert sum(s.until - s.start for s in trained) == whole.tokens
        assert not climb.failed
    else:  # the budgets beyond the failure
        assert set(climb.failed) == {
            broken, *(r.run.name for stem in whole.stems if stem.stable.name == broken
                      for r in stem.rungs[1:])
        }  # fmt: skip


def a_checkpoint(home: Path, run: PretrainConfig) -> None:
    """A checkpoint of a run at step 7."""
    model = model_of({"family": "modern"}, 300)
    save(model, tokenizers.train(["some text of no weight"], 260), home, run.name)
    Path(run.run_folder, layout.RUN_CONFIG).write_text(to_yaml(run))


def finished(home: Path, run: PretrainConfig) -> None:
    """The same of a run whose length it is."""
    a_checkpoint(home, run)
    folder = Path(run.run_folder, "checkpoints", "step-00000007")
    state = json.loads((folder / layout.STATE).read_text())
    state["data"] = {"tokens_per_batch": run.tokens_per_batch}
    (folder / layout.STATE).write_text(json.dumps(state))


def short_ladder(home: Path, **keys: Any) -> Any:
    """One whose smallest budget is 7 steps."""
    given = {"tokens": [7 * BATCH, 14 * BATCH, 28 * BATCH], "warmup_tokens": BATCH}
    return ladder(home, {**given, **keys})


def test_what_is_trained_is_not_trained_again(tmp_path: Path) -> None:
    stems = cost(short_ladder(tmp_path)).stems
    finished(tmp_path, stems[0].rungs[0].run)
    todo = left(stems)
    assert [len(stem.rungs) for stem in todo] == [2, 3, 3]
    assert {s.trial for s in Climb(todo).ready()} == {stem.stable.name for stem in stems}
    own = trained_tokens(stems)
    assert own[stems[0].rungs[0].run.name] == 7 * BATCH - stems[0].rungs[0].start
    assert sum(own.values()) == own[stems[0].rungs[0].run.name]


def test_a_ladder_grows_and_never_changes(tmp_path: Path) -> None:
    before = cost(short_ladder(tmp_path)).stems
    finished(tmp_path, before[0].rungs[0].run)
    a_checkpoint(tmp_path, before[0].stable)
    more = short_ladder(
        tmp_path, tokens=[7 * BATCH, 14 * BATCH, 28 * BATCH, 280 * BATCH], sizes=[32, 64, 96, 128]
    )
    assert [len(stem.rungs) for stem in left(cost(more).stems)] == [3, 4, 4, 4]
    budgets = {"tokens": [7 * BATCH, 14 * BATCH, 28 * BATCH], "warmup_tokens": BATCH}
    other = ladder(tmp_path, budgets, optimizer={"lr": 9e-3})
    with pytest.raises(ConfigError, match=r"optimizer\.lr was 0\.002, and now is 0\.009"):
        left(cost(other).stems)
    with pytest.raises(ConfigError, match="its warm-up was 1 steps, and now is 2"):
        left(cost(short_ladder(tmp_path, warmup_tokens=2 * BATCH)).stems[:1])
    between = short_ladder(tmp_path, tokens=[6 * BATCH, 14 * BATCH, 28 * BATCH])
    with pytest.raises(ConfigError, match=r"leave the stable run at step 4, .* at step 7"):
        left(cost(between).stems)


@pytest.mark.parametrize(
    ("keys", "more", "said"),
    [
        ({"sizes": [32, 64]}, {}, "1 more model sizes .* are missing"),
        ({"tokens": [40_960]}, {}, "5 more runs .* and 2 more numbers of tokens"),
        ({"tokens": []}, {}, "ladder.sizes need budgets"),
        ({"tokens_per_parameter": [20.0]}, {}, "both given"),
        ({"sizes": [32, 64, 64]}, {}, "sizes: 64 is there twice"),
        ({"most_flops": 1e8}, {}, r"s/w32: .* takes .* FLOPs, more than ladder\.most_flops=1e\+08"),
        ({"most_flops": 1e12}, {"what": "transfer"}, "most_flops is for what=law"),
        ({"sizes": [32, 64, 40]}, {}, r"s/w40: .* multiples of 16 do"),
        ({"sizes": [32, 64, {"n_layers": 3}]}, {}, "unknown key; did you mean .*n_layer"),
        ({"tokens": [200, 40_960, 81_920]}, {}, r"is 1 step\(s\), .* larger budget"),
        ({"tokens": [40_960, 40_961, 81_920]}, {}, "too near each other"),
        ({}, {"total_tokens": 5000}, "ladder.tokens sets the lengths"),
        ({}, {"schedule": {"kind": "linear"}}, "the runs of a ladder have wsd"),
        ({}, {"batch_ramp": {128: 1024}}, "one batch from start to end"),
        ({}, {"schedule": {"decay": 0.0}}, "at least one step each"),
        ({"sizes": []}, {"points": "x"}, "tokens_per_batch, model.* only a ladder trains runs"),
        ({}, {"what": "transfer"}, "set ladder.lr to at least 3"),
        ({}, {"what": "coordinates"}, "ladder.tokens: what=coordinates takes a few steps"),
        ({}, {"coordinates": {"steps": 3}}, "coordinates is for what=coordinates"),
        ({}, {"predict": {"name": "a", "size": 50, "tokens": 9e5}}, "multiples of 16"),
    ],
    ids=str,
)  # fmt: skip
def test_what_no_ladder_can_be_is_refused_in_one_line(
    keys: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        ladder(keys=keys, **more)


def test_data_that_would_repeat_is_refused(tmp_path: Path) -> None:
    ids = np.arange(40_000, dtype=np.uint16) % 250
    manifest = write_dataset(tmp_path / "data" / "made", [ids], [ids[:100]], 1000)
    keys: dict[str, Any] = {"data": {"mix": {"made": 1.0}}}
    c = ladder(tmp_path, **keys)
    with pytest.raises(DataError, match=r"163,840 tokens, .* 40,000: .*ladder\.epochs=4\.1$"):
        require_data(c, cost(c), (manifest,))
    c = ladder(tmp_path, {"epochs": 4.2}, **keys)
    require_data(c, cost(c), (manifest,))
    c = ladder(tmp_path, {"epochs": 4.2}, predict={"name": "a", "size": 128, "tokens": 9e5}, **keys)
    with pytest.raises(DataError, match="reads 900,000 tokens"):
        require_data(c, cost(c), (manifest,))


@few
@given(st.floats(1e3, 1e9), st.sampled_from(["width", "width_and_depth"]))
def test_the_nearest_width_is_nearest(n: float, grow: str) -> None:
    c = ladder(keys={"grow": grow})

    def off(width: int) -> float:
        model = from_dict(
            type(c.model), {**MODEL, "vocab_size": 4096, **shape(c.model, width, grow)}
        )
        return abs(math.log(counted(model, "all") / n))

    width = nearest(c, n)
    assert width % 16 == 0
    assert off(width) == min(off(w) for w in (width, width + 16, width - 16) if w > 0)


def test_the_run_of_a_prediction_is_filed_with_its_config(tmp_path: Path) -> None:
    law = Law(1.7, 400.0, 2000.0, 0.34, 0.37)
    rows = ["parameters,tokens,loss"]
    for n, d in itertools.product(np.geomspace(1e5, 1e7, 5), np.geomspace(1e4, 1e7, 5)):
        rows.append(f"{n:.0f},{d:.0f},{float(law.loss(n, d)):.6f}")
    (tmp_path / "points.csv").write_text("\n".join(rows))
    c = ladder(
        tmp_path, samples=100, points=str(tmp_path / "points.csv"),
        predict={"name": "large", "size": 128, "tokens": 1_000_000.0},
    )  # fmt: skip
    lines, folder = study(c)
    assert folder is not None
    run = load(PretrainConfig, [layout.predicted_config(folder, "large")])
    filed = json.loads(Path(layout.prediction_file(folder, "large")).read_text())
    assert run.threads_per_worker is None  # all of the machine's, as it trains alone
    assert run.name == "large" and run.model.n_embd == 128 and run.model.n_head == 8
    assert filed["parameters"] == counted(run.expected_model, "all")
    assert filed["tokens"] == run.tokens_before(run.total_steps) == 1_000_192
    assert run.schedule.kind == "wsd" and warmup_steps(run.total_steps, run.schedule) == 16
    text = "\n".join(lines)
    assert "train it:  python jobs/pretrain.py" in text and "check=large" in text
    assert "beware" not in text  # it is within the sizes and the tokens of the points


def test_a_prediction_beyond_all_sizes_or_tokens_is_said(tmp_path: Path) -> None:
    law = Law(1.7, 400.0, 2000.0, 0.34, 0.37)
    points = [
        Point(f"{n:.0f}-{d:.0f}", n, d, float(law.loss(n, d)))
        for n, d in itertools.product((1e5, 3e5, 1e6), (1e6, 3e6, 1e7))
    ]
    assert not [*_reach(1e6, 1e7, points, "a")]
    (line,) = _reach(3e6, 1e7, points, "a")
    assert "a has 3 times the parameters" in line and "ladder.most_flops" in line
    (line,) = _reach(1e5, 4e7, points, "a")
    assert "4 times the tokens of the longest" in line
