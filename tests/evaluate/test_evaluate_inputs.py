"""A person's inputs to an evaluation: files of rows, suites, a share of a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from helpers.evaluation import hellaswag_rows
from manta.config import from_dict
from manta.errors import ConfigError, DataError
from manta.evaluate import catalog, core, report, suites
from manta.evaluate.documents import read_hellaswag
from manta.evaluate.files import read_text
from manta.evaluate.settings import EvaluateConfig

few = settings(deadline=None, max_examples=10)


def test_hellaswag_rows_are_read_as_written(tmp_path: Path) -> None:
    file = tmp_path / "val.jsonl"
    rows = hellaswag_rows()
    file.write_text("".join(json.dumps({**row, "ind": 1, "split": "val"}) + "\n" for row in rows))
    # Labels as text: the hub has only these, files have both.
    assert read_hellaswag(str(file)) == [{**row, "label": str(row["label"])} for row in rows]


@pytest.mark.parametrize(
    "bad",
    ["{", "", "[1, 2]", "3", '"text"', "null", '{"ctx_a": "The cat"}', "\udcff"],
    ids=ascii,
)
def test_a_row_that_is_not_hellaswags_is_named_by_its_line(tmp_path: Path, bad: str) -> None:
    good = [json.dumps(row) for row in hellaswag_rows()]
    file = tmp_path / "val.jsonl"
    text = "\n".join([*good[:6], bad, *good[6:]])
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"val\.jsonl, line 7: not a row of HellaSwag "):
        read_hellaswag(str(file))


@pytest.mark.parametrize("key", ["activity_label", "ctx_a", "ctx_b", "endings", "label"])
def test_a_missing_key_of_a_hellaswag_row_is_named(tmp_path: Path, key: str) -> None:
    rows = hellaswag_rows()
    del rows[2][key]
    file = tmp_path / "val.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=rf"line 3: .*{key}"):
        read_hellaswag(str(file))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label", ""),
        ("label", None),
        ("label", 4),
        ("endings", "a"),
        ("endings", ["a", "b"]),
        ("ctx_a", 3),
    ],
)
def test_a_wrong_value_in_a_hellaswag_row_is_named_by_its_line(
    tmp_path: Path, key: str, value: Any
) -> None:
    rows = hellaswag_rows()
    rows[2][key] = value
    file = tmp_path / "val.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match="line 3: not a row of HellaSwag "):
        read_hellaswag(str(file))


def test_an_empty_or_missing_hellaswag_file_is_said_so(tmp_path: Path) -> None:
    file = tmp_path / "val.jsonl"
    with pytest.raises(DataError, match="no such file"):
        read_hellaswag(str(file))
    file.touch()
    with pytest.raises(DataError, match="the file is empty"):
        read_hellaswag(str(file))


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"suite": "hellaswags"}, "did you mean hellaswag?"),
        ({"suite": "arc_easy"}, "valid are core, hellaswag, lambada, perplexity, quick, wikitext"),
        ({"suite": ["quick", "cores"]}, "suite=cores: valid are"),
        ({"tasks": ["piqa"], "evals": {"text_path": "a"}}, "is for suite=perplexity, not piqa"),
        ({"num_fewshot": 3}, "num_fewshot is for tasks=[...]"),
        ({"seed": 3}, "seed is for tasks=[...]"),
        ({"evals": {"text_path": "a", "dataset": "b"}}, "give one of them"),
        ({"evals": {"hellaswag_path": "val.jsonl"}}, "evals.hellaswag_path is for suite=hellaswag"),
        ({"suite": "hellaswag", "evals": {"text_path": "a.txt"}}, "is for suite=perplexity"),
    ],
    ids=str,
)
def test_a_wrong_suite_or_file_is_refused(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_dict(EvaluateConfig, tree)
    assert said in str(refused.value)


@pytest.mark.parametrize("gpus", [0, 0.01, 0.25, 0.5, 1])
def test_a_worker_has_a_gpu_a_share_of_one_or_none(gpus: float) -> None:
    assert from_dict(EvaluateConfig, {"gpus": gpus}).gpus == gpus


@pytest.mark.parametrize("gpus", [2, 1.5, 0.001])
def test_more_than_one_gpu_for_a_worker_is_refused(gpus: float) -> None:
    with pytest.raises(ConfigError, match=rf"^gpus={gpus}: a worker has .* raise num_workers$"):
        from_dict(EvaluateConfig, {"gpus": gpus})


@pytest.mark.long
def test_workers_that_share_a_gpu_each_see_one_card() -> None:
    """This runs in a Ray of its own that is told of two GPUs, whether or not they exist."""
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", SHARED], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["fit"] == {"0": 6, "0.25": 6, "0.4": 4, "0.7": 2, "1": 2}
    assert "num_workers=5 workers of 1 CPU and 0.4 GPU each do not fit" in said["refused"]
    assert said["seen"] == ["0", "0", "1", "1"]
    if not torch.cuda.is_available():
        assert "device=cuda" in said["without"]


SHARED = """
import json, os, ray
from manta.cluster import capacity, connection
from manta.errors import ClusterError, MantaError
from manta.evaluate import farm

connection.connect(own=True, num_cpus=6, num_gpus=2)
fit = {f"{gpus:g}": capacity.workers_that_fit(1.0, gpus) for gpus in (0, 0.25, 0.4, 0.7, 1)}
try:
    capacity.require(5, 1.0, 0.4, 0)
except ClusterError as e:
    refused = str(e)
farm.Evaluator.seen = lambda self: os.environ["CUDA_VISIBLE_DEVICES"]
with farm.workers(4, 1.0, 0.4, 1, "fp32") as pool:
    seen = sorted(ray.get([actor.seen.remote() for actor in pool._actors]))
    try:
        pool.load("no checkpoint is read before the device is found")
        without = ""
    except MantaError as e:
        without = str(e)
print(json.dumps({"fit": fit, "refused": refused, "seen": seen, "without": without}))
"""


# Rows, suites and scores that somebody else may have written


DEEP = "[" * 100_000 + "]" * 100_000
ROWS = {
    "multiple_choice": {"query": "a", "choices": ["b", "c"], "gold": 1},
    "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    "language_modeling": {"context": "a", "continuation": "b"},
}
WRONG = [None, 3, ["a"], {"a": "b"}, [None], 10**400, -1, 7, DEEP]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_a_wrong_value_in_a_row_of_core_is_named_by_its_line(
    kind: str, value: Any, tmp_path: Path
) -> None:
    about = {"kind": kind, "file": "x.jsonl", "shots": 0, "delimiter": " ", "chance": 25}
    whole = ROWS[kind]
    for key in whole:
        if isinstance(value, type(whole[key])) and value not in ([None], 10**400, -1, 7, DEEP):
            continue
        if value == ["a"] and key in ("choices", "context_options"):
            continue
        if value == DEEP and isinstance(whole[key], str):
            bad = json.dumps({**whole, key: "x"}).replace('"x"', DEEP)
        else:
            bad = json.dumps({**whole, key: value})
        (tmp_path / "x.jsonl").write_text(f"{json.dumps(whole)}\n{bad}\n")
        with pytest.raises(DataError, match=r"x\.jsonl, line 2: not a row of CORE ") as caught:
            core.documents(str(tmp_path), about, None)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "- a list",
        "task: [",
        "",
        "task: 3\nmetadata: {version: 1}",
        "group: a\ntask: {b: c}",
        "group: a\ntask: [b]",
        "task: a\nmetadata: [1]",
        "include: mine.yaml",
        "include: none.yaml",
        "task: a\nmetadata: {a: 1}\nclass: !function none.Class",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ntask: 3",
        "task: " + "[" * 3000,
        "\x00",
    ],
    ids=lambda text: repr(text)[:40],
)
def test_a_damaged_suite_is_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(catalog, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=r"mine\.yaml: ") as caught:
        suites.configs_of("mine")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("change", [{"shots": "x"}, {"kind": "other"}, {"file": None}, None])
def test_a_task_of_core_without_what_it_needs_is_one_line(
    change: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"kind": "schema", "file": "x", "shots": 0, "delimiter": " ", "chance": 25}
    metadata = {**about, **change} if change else {"version": 1.0}
    text = json.dumps({"task": "core_x", "metadata": metadata})  # JSON is YAML
    (tmp_path / "core.yaml").write_text(text)
    monkeypatch.setattr(catalog, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=r"core\.yaml: not a suite \("):
        suites.configs_of("core")


def test_a_file_that_is_too_large_to_be_read_whole_is_said_so(tmp_path: Path) -> None:
    file = tmp_path / "x"
    with file.open("wb") as f:
        f.truncate(1 << 40)  # no bytes on the disk
    for read in (lambda: read_text(str(file), "text_path"), lambda: read_hellaswag(str(file))):
        with pytest.raises(DataError, match=r"1,099,511,627,776 bytes are too many"):
            read()


def test_damaged_scores_are_measured_again_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c = EvaluateConfig(suite="quick", home=str(tmp_path))
    path = str(tmp_path / "runs" / "run" / "checkpoints" / "step-00000007")
    file = tmp_path / "runs" / "run" / "evals" / "step-00000007" / "quick.json"
    file.parent.mkdir(parents=True)
    assert not report.is_there(c, path, "quick")
    file.write_text('{"suite": 3}')
    assert report.all_of(str(tmp_path / "runs" / "run")) == []
    assert not report.is_there(c, path, "quick") and not file.exists()
    assert [aside.read_text() for aside in file.parent.glob("damaged-*")] == ['{"suite": 3}']
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("quick.json: " in line for line in said)
    assert report.all_of(str(tmp_path / "runs" / "run")) == []
    assert capsys.readouterr().err == ""
