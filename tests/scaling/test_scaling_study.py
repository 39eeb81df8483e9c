"""A study of scaling: what it reads and refuses, its pictures, and predictions that stay filed."""

import io
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from helpers.checkpoints import model_of, save
from manta import layout, storage
from manta.config import from_dict, to_yaml
from manta.errors import ConfigError, DataError, MantaError
from manta.model.cost import parameters
from manta.scaling.fit import Law
from manta.scaling.misfit import misfit
from manta.scaling.points import Point, best_of_each, check, from_csv, from_run
from manta.scaling.settings import ColumnsConfig, ScalingConfig
from manta.scaling.study import study
from manta.text import tokenizer as tokenizers
from manta.train.records import history
from manta.train.settings import PretrainConfig

LAW = Law(1.7, 400.0, 2000.0, 0.34, 0.37)
TOKENS = 7 * 2048  # of the run that helpers.checkpoints.save makes


def survey(folder: Path, head: str = "parameters,tokens,loss", extra: str = "") -> str:
    """A CSV file with 25 runs, with a little noise."""
    generator = np.random.default_rng(1)
    lines = [head]
    for n in np.geomspace(1e5, 1e7, 5):
        for d in np.geomspace(1e4, 1e7, 5):
            loss = float(LAW.loss(n, d)) * np.exp(0.003 * generator.standard_normal())
            lines.append(f"{n:.0f},{d:.0f},{loss:.6f}{extra}")
    path = folder / "points.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def settings(home: Path, **keys: Any) -> ScalingConfig:
    return from_dict(ScalingConfig, {"home": str(home), "samples": 100, **keys})


def a_run(home: Path, name: str, val_loss: float, began: float, total: int = TOKENS) -> Path:
    """A run of seven steps that reached its end with this val loss."""
    model = model_of({"family": "modern"}, 300)
    run = Path(save(model, tokenizers.train(["some text of no weight"], 260), home, name)).parents[
        1
    ]
    keys = {"home": str(home), "name": name, "total_tokens": total, "tokens_per_batch": 2048}
    (run / layout.RUN_CONFIG).write_text(to_yaml(from_dict(PretrainConfig, keys)))
    record = {"step": 7, "tokens": TOKENS, "val_loss": val_loss, "val_bpb": 1.0}
    (run / layout.METRICS).write_text(json.dumps(record) + "\n")
    (run / layout.HISTORY).write_text(json.dumps({"event": "command", "time": began}) + "\n")
    return run


def size(home: Path) -> int:
    """The parameters of such a run."""
    a_run(home, "size", 1.0, 1.0)
    return round(from_run("size", str(home), "all").point.n)


def test_a_study_recommends_for_a_budget_and_draws(tmp_path: Path) -> None:
    budget = {"hours": 2.0, "peak_flops": 1e12, "mfu": 0.4, "price_per_hour": 3.0}
    lines, folder = study(settings(tmp_path, points=survey(tmp_path), budget=budget))
    text = "\n".join(lines)
    assert folder is not None
    assert "from 25 runs" in text and "that is its bias" in text
    assert "for 2.88e+15 FLOPs (2 hours, 6.00 dollars)" in text
    assert "best learning rate: not measured" in text
    for name in ("fit.png", "residuals.png", "isoflop.png", "frontier.png"):
        Image.open(io.BytesIO((Path(folder) / name).read_bytes())).load()
    facts = json.loads((Path(folder) / layout.LAW).read_text())
    assert facts["law"]["alpha"]["low"] < LAW.alpha < facts["law"]["alpha"]["high"]
    assert len(facts["points"]) == 25 and all(facts["inputs"].values())


def test_a_rate_that_falls_with_compute_is_recommended(tmp_path: Path) -> None:
    rows = [line.split(",") for line in Path(survey(tmp_path)).read_text().split()[1:]]
    lines = ["N,C,L,rate"]
    for n, d, loss in rows:
        flops = 6 * float(n) * float(d)
        lines.append(f"{n},{flops},{loss},{0.5 * flops**-0.125}")
    (tmp_path / "rates.csv").write_text("\n".join(lines))
    columns = {"parameters": "N", "flops": "C", "loss": "L", "lr": "rate"}
    keys = {"points": str(tmp_path / "rates.csv"), "columns": columns, "budget": {"flops": 1e16}}
    text = "\n".join(study(settings(tmp_path, **keys))[0])
    assert "best learning rate: grows as C^-0.125" in text
    assert f"{0.5 * 1e16**-0.125:.3g}" in text


@pytest.mark.parametrize(
    ("head", "extra", "said"),
    [
        (
            "N,tokens,loss",
            "",
            r"no such column: columns\.parameters=parameters; its columns are N,",
        ),
        ("parameters,tokens,loss", "x", r"line 2: loss=\S+x: not a positive number from"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_there(
    tmp_path: Path, head: str, extra: str, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        study(settings(tmp_path, points=survey(tmp_path, head, extra)))
    assert not (tmp_path / "scaling").exists()


def test_what_is_missing_for_a_fit_is_said() -> None:
    points = [Point("p", n, d, 3.0) for n in (1e6, 2e6) for d in (1e7, 2e7, 4e7)]
    with pytest.raises(
        DataError, match=r"2 more runs \(there are 6 of at least 8\) and 1 more model"
    ):
        check(points)
    few = [Point("p", n, 1e7, 3.0) for n in np.geomspace(1e6, 1e8, 9)]
    with pytest.raises(DataError, match="2 more numbers of tokens"):
        check(few)


CELLS = ["parameters", "tokens", "loss", "1", "1e39", "-1", "", '"', "nan"]
rows = st.lists(st.lists(st.sampled_from(CELLS), max_size=4).map(",".join), max_size=5)
tables = rows.map(lambda rows: "\n".join(["parameters,tokens,loss", *rows]).encode())


@given(data=st.one_of(st.binary(max_size=60), tables))
@example(b"parameters,tokens,loss\n1,2,3,4\n")
@example(b'parameters,tokens,loss\n1,2,"' + b"x" * 200_000)
@example(b"x" * 200_000)
def test_any_file_gives_runs_or_one_line(data: bytes) -> None:
    try:
        points = from_csv(data, "x.csv", ColumnsConfig())
    except DataError as e:
        assert "\n" not in str(e) and len(str(e)) < 2000
    else:
        assert all(0 < value < 1e41 for p in points for value in (p.n, p.d, p.loss))


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_runs_that_tell_nothing_are_not_fitted_in_silence(tmp_path: Path, noise: float) -> None:
    """The losses do not depend on size and tokens: a study says so, and ends in no traceback."""
    path = Path(survey(tmp_path))
    generator = np.random.default_rng(3)
    lines = [line.rpartition(",")[0] for line in path.read_text().split()[1:]]
    rows = [f"{line},{3 + noise * generator.standard_normal():.4f}" for line in lines]
    path.write_text("\n".join(["parameters,tokens,loss", *rows]))
    try:
        text = "\n".join(study(settings(tmp_path, points=str(path)))[0])
    except DataError as e:
        text = str(e)
    assert "do not fall" in text or "hardly tell" in text


def test_a_lowest_loss_that_the_runs_do_not_tell_is_said(tmp_path: Path) -> None:
    rows = ["parameters,tokens,loss"]
    for n, d in itertools.product(np.geomspace(1e5, 1e6, 4), np.geomspace(1e6, 1e7, 4)):
        rows.append(f"{n:.0f},{d:.0f},{60 * n**-0.3 * d**-0.05:.6f}")
    (tmp_path / "points.csv").write_text("\n".join(rows))
    text = "\n".join(study(settings(tmp_path, points=str(tmp_path / "points.csv")))[0])
    assert "do not tell the loss that no model gets below" in text


@pytest.mark.parametrize(("kink", "is_said"), [(0.0, False), (0.05, True)])
def test_a_law_that_misses_the_largest_runs_is_said(
    tmp_path: Path, kink: float, is_said: bool
) -> None:
    rows, generator = ["parameters,tokens,loss"], np.random.default_rng(2)
    for n, d in itertools.product(np.geomspace(1e5, 1e7, 5), np.geomspace(1e6, 1e8, 5)):
        noise = math.exp(0.002 * generator.standard_normal())
        loss = float(LAW.loss(n, d)) * noise * (1 - kink * (n * d > 1e14))
        rows.append(f"{n:.0f},{d:.0f},{loss:.6f}")
    (tmp_path / "points.csv").write_text("\n".join(rows))
    text = "\n".join(study(settings(tmp_path, points=str(tmp_path / "points.csv")))[0])
    assert ("below the law, which is more than scatter" in text) == is_said


@pytest.mark.parametrize("bend", [0.0, -0.01])
def test_size_and_tokens_that_help_together_are_told(bend: float) -> None:
    """A misfit of this size is found, and nothing where the law holds."""
    generator, points = np.random.default_rng(4), []
    for n, d in itertools.product(np.geomspace(1e5, 1e7, 5), np.geomspace(1e6, 1e8, 5)):
        together = bend * math.log(n / 1e6) * math.log(d / 1e7)
        points.append(Point("p", n, d, float(LAW.loss(n, d)) * math.exp(together)))
    residuals = np.log([p.loss / float(LAW.loss(p.n, p.d)) for p in points])
    found = misfit(points, residuals + 0.002 * generator.standard_normal(len(points)))
    assert found.slope == pytest.approx(bend, abs=1e-3)
    expected = math.expm1(bend * math.log(100) * math.log(30)) if bend else None
    assert found.at(1e8, 3e8) == (expected and pytest.approx(expected, rel=0.1))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "nothing to fit"),
        ({"points": "x", "budget": {"hours": 1.0}}, "needs flops_per_second, or peak_flops"),
        ({"points": "x", "budget": {"flops": 1.0, "hours": 1.0}}, "both given"),
        ({"points": "x", "budget": {"dollars": 1.0, "flops_per_second": 1.0}}, "price_per_hour"),
        ({"points": "x", "predict": {"name": "a", "tokens": 1.0}}, "belong together"),
        ({"points": "x", "predict": {"name": "a"}}, "or a budget"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(
    tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(tmp_path, **keys)


def test_the_best_rate_of_a_size_is_known_only_where_others_were_tried() -> None:
    tried = [Point("a", 1e6, 1e7, 3.0, 1e-3, 64), Point("b", 1e6, 1e7, 2.9, 2e-3, 64)]
    alone = Point("c", 2e6, 1e7, 2.8, 1e-3, 64)
    best, other = best_of_each([*tried, alone])
    assert (best.name, best.lr, best.batch, best.edges) == ("b", 2e-3, None, ("lr",))
    around = [*tried, Point("d", 1e6, 1e7, 3.0, 4e-3, 64), Point("e", 1e6, 1e7, 3.2, 2e-3, 128)]
    (between,) = best_of_each(around)
    assert between.lr == pytest.approx(2e-3) and between.edges == ("batch",)
    assert between.batch == 64
    assert (other.name, other.lr) == ("c", None)


def test_both_counts_of_a_run_are_known(tmp_path: Path) -> None:
    a_run(tmp_path, "one", 3.5, 1.0)
    every = parameters(model_of({"family": "modern"}, 300).config)
    point = from_run("one", str(tmp_path), "no_embeddings").point
    assert (point.n, point.other_n) == (every.total - every.embedding, every.total)
    assert (point.d, point.loss) == (TOKENS, 3.5)


def test_a_run_that_has_not_reached_its_end_is_no_point(tmp_path: Path) -> None:
    a_run(tmp_path, "half", 3.5, 1.0, total=2 * TOKENS)
    with pytest.raises(DataError, match="at step 7 of 14"):
        from_run("half", str(tmp_path), "all")


def test_a_run_that_went_on_from_a_checkpoint_is_no_point(tmp_path: Path) -> None:
    run = a_run(tmp_path, "tuned", 3.5, 1.0)
    config = run / layout.RUN_CONFIG
    config.write_text(config.read_text().replace("checkpoint: null", "checkpoint: base", 1))
    with pytest.raises(DataError, match="it went on from a checkpoint"):
        from_run("tuned", str(tmp_path), "all")


def test_losses_of_other_texts_are_not_fitted_together(tmp_path: Path) -> None:
    run = a_run(tmp_path, "one", 3.5, 1.0)
    a_run(tmp_path, "two", 3.4, 1.0)
    folder = run / "checkpoints" / "step-00000007"
    state = json.loads((folder / layout.STATE).read_text()) | {"val_sample": {"a" * 64: 5}}
    (folder / layout.STATE).write_text(json.dumps(state))
    manifest = json.loads((folder / layout.MANIFEST).read_text())
    data = (folder / layout.STATE).read_bytes()
    manifest["files"][layout.STATE] = {"size": len(data), "sha256": storage.sha256_of(data)}
    (folder / layout.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="val losses of two were measured on another val split"):
        study(settings(tmp_path, runs=["one", "two"]))


def filed(home: Path, n: float, d: float = TOKENS, seed: int = 0) -> dict[str, Any]:
    """Files a prediction for the run `next`; returns the file."""
    predict = {"name": "next", "parameters": n, "tokens": d}
    study(settings(home, points=survey(home), predict=predict, seed=seed))
    path = layout.prediction_file(layout.scaling_folder(str(home), "scaling"), "next")
    return json.loads(Path(path).read_text())


@pytest.mark.parametrize(("times", "said"), [(1.0, "inside"), (1.5, "OUTSIDE")])
def test_a_prediction_is_filed_and_checked(tmp_path: Path, times: float, said: str) -> None:
    there = filed(tmp_path, size(tmp_path))
    a_run(tmp_path, "next", there["loss"] * times, time.time() + 60)
    lines, folder = study(settings(tmp_path, check="next"))
    assert folder is None
    assert f"is {said} the interval and {times - 1:+.2%} off" in lines[1]


def test_a_filed_prediction_is_never_replaced(tmp_path: Path) -> None:
    there = filed(tmp_path, 1e7)
    assert filed(tmp_path, 1e7) == there  # the same again: the one on file
    with pytest.raises(ConfigError, match="never replaced"):
        filed(tmp_path, 2e7)
    assert filed(tmp_path, 1e7) == there


def test_a_run_that_has_begun_tests_nothing(tmp_path: Path) -> None:
    there = filed(tmp_path, size(tmp_path))
    run = a_run(tmp_path, "next", there["loss"], there["time"] - 100)
    with pytest.raises(DataError, match="began 100 seconds before"):
        study(settings(tmp_path, check="next"))
    (run / layout.HISTORY).unlink()
    with pytest.raises(DataError, match="cannot be told"):
        study(settings(tmp_path, check="next"))
    with pytest.raises(ConfigError, match="has begun already"):
        predict = {"name": "size", "parameters": 1e7, "tokens": 1e7}
        study(settings(tmp_path, points=survey(tmp_path), predict=predict))
    assert history.read(str(run)) == ([], None)


def test_a_run_of_another_length_tests_nothing(tmp_path: Path) -> None:
    filed(tmp_path, size(tmp_path), 2 * TOKENS)
    a_run(tmp_path, "next", 3.0, time.time() + 60)
    with pytest.raises(DataError, match=r"14,336 tokens, and the prediction is for 28,672"):
        study(settings(tmp_path, check="next"))
    with pytest.raises(MantaError, match="no prediction for this run is on file"):
        study(settings(tmp_path, check="size"))
