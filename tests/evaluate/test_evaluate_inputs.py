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
from manta.evaluate.documents import read_hellaswag
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
