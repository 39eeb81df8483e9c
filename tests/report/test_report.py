"""Reports: each number in them is in a file, they tell nothing private, nothing in them runs."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checkpoints import model_of, save
from helpers.datasets import GROUP, random_ids, write_dataset
from manta import layout, storage
from manta.config import from_dict, to_yaml
from manta.errors import MantaError
from manta.model.families import num_parameters
from manta.report.report import Report, ReportConfig, build, report
from manta.text import tokenizer as tokenizers
from manta.train.records import history
from manta.train.settings import PretrainConfig

VOCABULARY = 300


def a_run(home: Path, name: str = "run", **keys: Any) -> str:
    """A run with all that a run has, and a dataset; returns its checkpoint's path."""
    model = model_of({"family": "modern"}, VOCABULARY)
    path = save(model, tokenizers.train(["some text of no weight"], 260), home, name)
    run = Path(path).parents[1]
    dataset = write_dataset(
        home / "data" / "texts",
        [random_ids(0, 3 * GROUP), random_ids(1, GROUP)],
        [random_ids(2, GROUP)],
    )
    state = json.loads((Path(path) / layout.STATE).read_text())
    state |= {"datasets": [dataset.path], "train_seconds": 75.0}
    (Path(path) / layout.STATE).write_text(json.dumps(state))
    manifest = json.loads((Path(path) / layout.MANIFEST).read_text())
    file = f"{path}/{layout.STATE}"
    of_state = {"size": Path(file).stat().st_size, "sha256": storage.sha256(file)}
    manifest["files"][layout.STATE] = of_state
    (Path(path) / layout.MANIFEST).write_text(json.dumps(manifest))
    settings = {"home": str(home), "name": name, "total_tokens": 20_480, **keys}
    (run / layout.RUN_CONFIG).write_text(to_yaml(from_dict(PretrainConfig, settings)))
    records: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "val_loss": 5.5, "val_bpb": 2.5}]
    for step in range(1, 8):
        tokens = step * 2048
        speed = 900.0 + step
        records.append(
            {"step": step, "tokens": tokens, "loss": 5 - step / 10, "lr": 1e-3, "grad_norm": 0.9,
             "tokens_per_second": speed, "mfu": speed / 3000}
        )  # fmt: skip
    records.append({"step": 7, "tokens": 14_336, "val_loss": 4.25, "val_bpb": 1.75})
    write_lines(run / layout.METRICS, records)
    samples = [{"step": s, "prompt": "a", "completion": f"text {s}"} for s in (0, 7)]
    write_lines(run / layout.SAMPLES, samples)
    seconds = {"productive": 75.0, "start": 20.0, "down": 5.0, "other": 0.0}
    goodput = {"seconds": seconds, "updated": 1e9, "starts": 2}
    (run / layout.GOODPUT).write_text(json.dumps(goodput))
    rollback = [{"first": 3, "last": 5, "why": "loss spike"}]
    (run / layout.ROLLBACKS).write_text(json.dumps(rollback))
    history.note(str(run), "command", **history.command())
    history.note(
        str(run), "started", step=0, resumed_from=None, workers=2, device="CPU", dtype="fp32"
    )
    history.note(str(run), "failed", why=f"no room in {home}/elsewhere", step=4)
    history.note(str(run), "memory", bytes=900_000_000, step=7)
    history.note(str(run), "ended", step=7)
    plan = {
        "run": "run", "made": "2026-11-27", "tokens": 14_336, "config": {}, "hours": 0.025,
        "train_hours": 0.02,
        "tokens_per_second": 1130.0, "peak_memory_bytes": 1_000_000_000, "loss": 4.0,
        "time": {"source": "probe"},
    }  # fmt: skip
    (run / layout.PLAN).write_text(json.dumps(plan))
    scores = {
        "suite": "quick", "checkpoint": path, "step": 7, "tokens": 14_336,
        "results": {"hellaswag": {"acc": 0.3, "acc_stderr": 0.05, "samples": 84}},
    }  # fmt: skip
    storage.write_json(layout.scores_file(str(run), "step-00000007", "quick"), scores)
    return path


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def facts_in(tree: Any) -> list[dict[str, Any]]:
    """All facts of a report's tree, wherever in it."""
    if isinstance(tree, dict):
        if "formula" in tree:
            return [tree]
        return [fact for value in tree.values() for fact in facts_in(value)]
    return [fact for value in tree for fact in facts_in(value)] if isinstance(tree, list) else []


def there(home: Path, made: Report, file: str, key: str) -> Any:
    """What a reader finds who opens the file and follows the key, without Manta's code."""
    if file == layout.REPORT_FACTS:
        content = made.facts
    elif file.endswith(".yaml"):
        content = yaml.safe_load((home / file).read_text())
    elif file.endswith(".jsonl"):
        content = [json.loads(line) for line in (home / file).read_text().splitlines()]
    else:
        content = json.loads((home / file).read_text())
    before, star, after = key.partition("/*/")
    for part in before.split("/")[1:]:
        content = content[int(part)] if isinstance(content, list) else content[part]
    return [item[after] for item in content if after in item] if star else content


def test_every_number_is_that_of_its_files_and_keys(tmp_path: Path) -> None:
    path = a_run(tmp_path)
    made = build(path, price_per_hour=36.0)
    facts = facts_in(made.facts)
    parameters = num_parameters(model_of({"family": "modern"}, VOCABULARY).config)
    names = {"median": statistics.median, "numbers": list, "num_parameters": lambda _: parameters}
    for fact in facts:
        assert fact["from"], fact
        v = [there(tmp_path, made, source["file"], source["key"]) for source in fact["from"]]
        expected = eval(fact["formula"], names, {"v": v})
        if isinstance(fact["value"], int | float):
            assert fact["value"] == pytest.approx(expected, rel=1e-12), fact
        assert fact["shown"] in made.page.replace("&#x27;", "'").replace("&quot;", '"'), fact
    found = {fact["name"]: fact["value"] for fact in facts}
    assert found["the bill"] == pytest.approx(1.0)  # 100 s of 36 an hour
    assert found["goodput: steps that were kept"] == pytest.approx(0.75)
    assert found["tokens to train on"] == 4 * GROUP
    assert found["lowest val loss"] == 4.25
    assert found["tokens a second, median"] == 904.0
    assert len(facts) > 40
    (plan,) = [s for s in made.facts["sections"] if s["title"] == "Plan against outcome"]
    off = {row[0]: row[3]["value"] for row in plan["rows"]}
    assert off == pytest.approx(  # measured: 100 s, 904 tokens a second, 0.9 GB, a loss of 4.25
        {
            "hours": 1 / 0.9 - 1,
            "hours of steps": 1 / 24,
            "tokens a second": -0.2,
            "peak memory, GB": -0.1,
            "val loss": 0.0625,
        }
    )


def test_a_plan_that_knew_no_start_is_compared_without_it(tmp_path: Path) -> None:
    path = a_run(tmp_path)
    file = tmp_path / "runs" / "run" / layout.PLAN
    file.write_text(json.dumps({**json.loads(file.read_text()), "counts_start": False}))
    (plan,) = [s for s in build(path).facts["sections"] if s["title"] == "Plan against outcome"]
    measured = {row[0]: row[2]["value"] for row in plan["rows"]}
    assert measured["hours after the start"] == pytest.approx(80 / 3600)
    assert "hours" not in measured


def test_numbers_of_the_page_are_facts(tmp_path: Path) -> None:
    """A number that a reader sees in a list or in a table's column of numbers has a source."""
    made = build(a_run(tmp_path))
    shown = re.findall(r"<dd>(.*?)</dd>|<td class=\"number\">(.*?)</td>", made.page)
    assert len(shown) > 30
    assert all((a or b).startswith('<span title="') for a, b in shown)


def test_made_again_it_is_the_same_and_small(tmp_path: Path) -> None:
    path = a_run(tmp_path)
    first, second = build(path), build(path)
    assert first.page == second.page and first.facts == second.facts
    assert len(first.page.encode()) <= 1_000_000


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    path = a_run(tmp_path)
    rng = np.random.default_rng(0)
    records = [
        {"step": s, "tokens": s * 1000, "loss": float(rng.random()), "lr": float(rng.random()),
         "grad_norm": float(rng.random()), "tokens_per_second": float(rng.random())}
        for s in range(20_000)
    ]  # fmt: skip
    write_lines(Path(path).parents[1] / layout.METRICS, records)
    assert len(build(path).page.encode()) <= 1_000_000


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    made = build(a_run(tmp_path))
    assert "<script" not in made.page and "default-src 'none'" in made.page
    loaded = re.findall(r"(?:\b(?:src|href)=|url\()[\"']?([^\"'>)]*)", made.page)
    assert loaded and all(address.startswith("data:image/png;base64,") for address in loaded)


def test_it_tells_no_place(tmp_path: Path) -> None:
    """A report goes into exports, which are published."""
    data = {"val_source": "/secret/val.txt", "license": "CC BY 4.0"}
    made = build(a_run(tmp_path, data=data))
    whole = made.page + json.dumps(made.facts)
    assert str(tmp_path) not in whole and "/secret" not in whole and f"{Path.home()}/" not in whole
    assert "CC BY 4.0" in whole and "val.txt" in whole


hostile = st.text(max_size=20) | st.text(alphabet="<>&\"'`/\x1b\u202e scriptonerror=", max_size=30)


@settings(max_examples=15, deadline=None)
@given(text=hostile)
def test_no_text_of_a_run_becomes_html(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = a_run(tmp_path_factory.mktemp("home"), sample={"prompts": [text]})
    run = Path(path).parents[1]
    sample = {"step": 7, "prompt": text, "completion": f"<script>{text}</script>"}
    write_lines(run / layout.SAMPLES, [sample])
    history.note(str(run), "failed", why=f"<img src=x onerror=alert(1)>{text}")
    page = build(path).page
    assert "<script" not in page and "<img src=x" not in page
    assert "\x1b" not in page and "\u202e" not in page


PARTS = (
    layout.METRICS, layout.SAMPLES, layout.GOODPUT, layout.HISTORY, layout.ROLLBACKS,
    layout.RUN_CONFIG, layout.PLAN, "evals/step-00000007/quick.json",
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_run_that_lacks_a_part_has_a_report_of_the_rest(tmp_path: Path, part: str) -> None:
    path = a_run(tmp_path)
    (Path(path).parents[1] / part).unlink()
    assert "parameters" in {fact["name"] for fact in facts_in(build(path).facts)}


@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_part_is_said(tmp_path: Path, part: str) -> None:
    path = a_run(tmp_path)
    (Path(path).parents[1] / part).write_text('{"seconds": [')
    made = build(path)
    if part != "evals/step-00000007/quick.json":  # which the job says on its way
        assert any(part in problem for problem in made.facts["problems"])
    assert "parameters" in {fact["name"] for fact in facts_in(made.facts)}


def test_a_figure_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    path = a_run(tmp_path)
    record = {"step": 7, "tokens": 14_336, "val_loss": "nan"}
    write_lines(Path(path).parents[1] / layout.METRICS, [record])
    found = {fact["name"]: fact["shown"] for fact in facts_in(build(path).facts)}
    assert found["val loss, nats a token, at the end"] == "nan"


def test_without_its_dataset_it_says_so(tmp_path: Path) -> None:
    path = a_run(tmp_path)
    (tmp_path / "data" / "texts" / layout.MANIFEST).unlink()
    assert "The dataset texts is not there any more." in build(path).page


def test_a_page_of_a_persons_stays(tmp_path: Path) -> None:
    a_run(tmp_path)
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    c = from_dict(ReportConfig, {"home": str(tmp_path), "run": "run", "out": str(mine)})
    with pytest.raises(MantaError, match="already exists"):
        report(c)
    assert mine.read_text() == "mine"
    (tmp_path / "other.json").write_text("mine")
    other = {"home": str(tmp_path), "run": "run", "out": str(tmp_path / "other.html")}
    with pytest.raises(MantaError, match=r"other\.json"):
        report(from_dict(ReportConfig, other))
    assert not (tmp_path / "other.html").exists()


def test_in_the_home_a_report_is_made_again(tmp_path: Path) -> None:
    a_run(tmp_path)
    c = from_dict(ReportConfig, {"home": str(tmp_path), "run": "run"})
    out, made = report(c)
    again, _ = report(c)
    assert again == out and out.read_text() == made.page
    assert json.loads((out.parent / layout.REPORT_FACTS).read_text()) == made.facts


def test_the_history_names_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["/x/jobs/pretrain.py", "home=s3://me:secret@bucket/x", "name=a b"]
    )
    command = history.command()["command"]
    assert "secret@" not in command
    assert command.startswith("python jobs/pretrain.py ") and "'name=a b'" in command
