"""Watching a run: each checkpoint is evaluated once, as it lands; and workers that die."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from helpers.common import tiny
from manta.config import from_dict, load
from manta.errors import CheckpointError, ConfigError, DataError
from manta.evaluate import farm, report
from manta.evaluate.compare import CompareConfig
from manta.evaluate.rows import Pair, batches_of, rows_of
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.watch import watch
from manta.train.settings import PretrainConfig

KEEP = ["num_workers=1", "cpus_per_worker=0.5", "checkpoint.keep=9", "total_tokens=2048"]
EVAL = ["cpus=0.5", "threads=1"]


def scored(run: Path) -> dict[str, dict[str, Any]]:
    """The perplexity scores of each step."""
    files = sorted(run.glob("evals/step-*/perplexity.json"))
    return {file.parent.name: json.loads(file.read_text()) for file in files}


@pytest.fixture(scope="module")
def beside(
    load_job: Callable[[str], Any],
    prepared: Path,
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """The run `beside`, of eight steps, and what was printed by its job and by the process that
    evaluated its checkpoints."""
    suites = ["eval.suites=[perplexity,quick]", f"eval.arguments=[{','.join(EVAL)}]"]
    config = tiny(prepared, corpus, "name=beside", *KEEP, "checkpoint.every=null", *suites)
    said, before = tmp_path_factory.mktemp("said") / "lines", os.dup(1)
    with said.open("w") as file, contextlib.redirect_stdout(file):
        os.dup2(file.fileno(), 1)
        try:
            load_job("pretrain").main(config)
        finally:
            os.dup2(before, 1)
            os.close(before)
    return prepared / "runs" / "beside", said.read_text()


@pytest.fixture(scope="module")
def trained(beside: tuple[Path, str]) -> Path:
    """The run `watched`, which has ended, with four checkpoints: a copy of `beside` without the
    scores."""
    run = beside[0].with_name("watched")
    shutil.copytree(beside[0], run, ignore=shutil.ignore_patterns("evals"))
    config = (run / "config.yaml").read_text()
    assert "\nname: beside\n" in config
    (run / "config.yaml").write_text(config.replace("\nname: beside\n", "\nname: watched\n"))
    return run


def test_training_is_followed_by_a_process_of_its_own(
    load_job: Callable[[str], Any], prepared: Path, beside: tuple[Path, str]
) -> None:
    """`eval.suites` saves a checkpoint at each eval.every and evaluates it as it lands; the scores
    are those of the checkpoint evaluated by itself."""
    run, out = beside
    found = scored(run)
    assert list(found) == [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    assert [scores["tokens"] for scores in found.values()] == [512, 1024, 1536, 2048]
    assert len(list(run.glob("evals/step-*/quick.json"))) == 4
    assert out.index("step 2 | perplexity bits_per_byte") < out.index("the run has ended")
    assert (run / "evals" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard" / "evals").iterdir())
    alone = [f"home={prepared}", f"checkpoint={run}/checkpoints/step-00000006", *EVAL]
    before = found["step-00000006"]["results"]
    load_job("evaluate").main(load(EvaluateConfig, alone))
    assert scored(run)["step-00000006"]["results"] == before


def test_a_watcher_started_again_evaluates_nothing_twice(prepared: Path, trained: Path) -> None:
    c = load(EvaluateConfig, [f"home={prepared}", "checkpoint=watched", "watch=true", *EVAL])
    lines: list[str] = []
    watch(c, lines.append)
    assert len(scored(trained)) == 4 == sum("bits_per_byte" in line for line in lines)
    times = {file: file.stat().st_mtime_ns for file in trained.glob("evals/step-*/*.json")}
    gone = trained / "evals" / "step-00000004" / "perplexity.json"
    gone.unlink()
    lines.clear()
    watch(c, lines.append)
    assert [line.split(" |")[0] for line in lines if "bits_per_byte" in line] == ["step 4"]
    after = {file: file.stat().st_mtime_ns for file in times}
    assert {file for file in times if after[file] != times[file]} == {
        gone,
        gone.with_name("perplexity.documents.json"),
    }


def test_runs_are_compared_with_what_is_noise(
    load_job: Callable[[str], Any],
    prepared: Path,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = [f"home={prepared}", "runs=[beside,watched]", "price_per_hour=2"]
    load_job("compare").main(load(CompareConfig, keys))
    out, err = capsys.readouterr()
    header = out.splitlines()[0].split()
    assert header == ["beside", "watched"]
    rows = {line[:30].strip().split("  ")[0] for line in out.splitlines()}
    assert {"parameters", "tokens", "FLOPs", "hours", "cost", "val loss"} <= rows
    # The same seed, data and steps: the same model.
    assert "perplexity bits_per_byte: watched - beside = +0.0000" in out
    assert "within noise" in out and "more than noise" not in out
    assert "GPT-2 1558M" in out and "nanochat" in out
    picture = prepared / "runs" / "compare.png"
    assert f"drawn in {picture}" in err and picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="it already exists"):
        load_job("compare").main(load(CompareConfig, [*keys, f"out={picture}"]))
    with pytest.raises(CheckpointError, match=r"no checkpoint there; .*watched"):
        load_job("compare").main(load(CompareConfig, [f"home={prepared}", "runs=[nobody]"]))


def test_a_checkpoint_that_is_damaged_is_passed_over(
    prepared: Path, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "evals", ignore_errors=True)
    damaged = run / "checkpoints" / "step-00000004" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    lines: list[str] = []
    c = load(EvaluateConfig, [f"home={prepared}", f"checkpoint={run}", "watch=true", *EVAL])
    watch(c, lines.append)
    assert list(scored(run)) == [f"step-{step:08d}" for step in (2, 6, 8)]
    (said,) = [line for line in lines if "passed over" in line]
    assert "step-00000004 is damaged before it was evaluated" in said


def test_of_a_half_written_checkpoint_the_one_before_is_taken_and_named(
    load_job: Callable[[str], Any],
    prepared: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained, run)
    (run / "checkpoints" / "step-00000008" / "MANIFEST.json").unlink()
    keys = [f"home={prepared}", f"checkpoint={run}", *EVAL]
    load_job("evaluate").main(load(EvaluateConfig, keys))
    out = capsys.readouterr().out
    assert "step-00000008 is not whole: evaluating step-00000006" in out
    assert (run / "evals" / "step-00000006" / "perplexity.json").exists()


def test_what_cannot_be_watched_is_said(prepared: Path, trained: Path) -> None:
    def watching(*keys: str) -> None:
        watch(load(EvaluateConfig, [f"home={prepared}", "watch=true", *EVAL, *keys]), print)

    with pytest.raises(CheckpointError, match=r"no checkpoint there; .*watched"):
        watching("checkpoint=nothing")
    with pytest.raises(CheckpointError, match="is one checkpoint: watch=true needs a run"):
        watching(f"checkpoint={trained}/checkpoints/step-00000002")
    with pytest.raises(DataError, match=r"no.txt: no such file"):
        watching("checkpoint=watched", "evals.text_path=no.txt")


def test_wrong_arguments_of_the_evaluation_beside_a_run_end_it_at_once(
    load_job: Callable[[str], Any], prepared: Path, corpus: Path
) -> None:
    config = tiny(prepared, corpus, "name=wrong", *KEEP, "eval.suites=[quik]")
    with pytest.raises(ConfigError, match="suite=quik: valid are"):
        load_job("pretrain").main(config)
    assert not (prepared / "runs" / "wrong").exists()
    with pytest.raises(ConfigError, match=r"eval.arguments are for eval.suites"):
        from_dict(PretrainConfig, {"eval": {"arguments": ["limit=3"]}})


def test_a_worker_that_is_killed_changes_no_score(trained: Path, ray_session: None) -> None:
    pairs = [Pair((1, 2, i % 50), (i % 7, 3)) for i in range(64)]
    batches = batches_of(rows_of(pairs, 32), 8, 1000)
    path = str(trained / "checkpoints" / "step-00000008")
    with farm.workers(2, 0.5, 0, 1, "fp32") as pool:
        whole = list(pool.load(path)("score", batches))
        found = []
        for index, answer in enumerate(pool.load(path)("score", batches)):
            found.append(answer)
            if index == 3:
                ray.kill(pool._actors[0], no_restart=False)
    assert found == whole


@pytest.mark.parametrize(
    ("keys", "label"),
    [
        ([], "perplexity"),
        (["limit=5"], "perplexity.limit-5"),
        (["dtype=bf16", "limit=5"], "perplexity.limit-5.bf16"),
        (["tasks=[piqa]", "num_fewshot=3"], "task-piqa.3-shot"),
        (["tasks=[piqa]", "seed=2", "limit=5"], "task-piqa.seed-2.limit-5"),
    ],
)
def test_scores_of_a_part_do_not_take_the_place_of_the_whole(keys: list[str], label: str) -> None:
    c = load(EvaluateConfig, keys)
    unit = "task-piqa" if c.tasks else "perplexity"
    assert report.label_of(c, unit) == label
