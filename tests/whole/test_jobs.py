"""The pulse of each job: its real main function, once, on a tiny model."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from helpers.common import ROOT, SECRET, tiny, tiny_arguments, tiny_model_arguments
from manta import layout
from manta.bench.settings import BenchConfig
from manta.config import load
from manta.errors import CheckpointError, DataError
from manta.evaluate.inference_settings import GenerateConfig
from manta.evaluate.settings import EvaluateConfig
from manta.export.convert import ExportConfig, ImportConfig
from manta.finetune.settings import FinetuneConfig
from manta.monitor.metrics import Metrics
from manta.plan.settings import PlanConfig
from manta.scaling.settings import ScalingConfig
from manta.sweep.settings import SweepConfig
from manta.train.checkpoints import checkpoint
from manta.train.pretrain import pretrain, start_of
from manta.train.records.logbook import read_metrics
from manta.train.resume import is_finished
from manta.train.settings import PretrainConfig

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def trained(load_job: Callable[[str], Any], prepared: Path, corpus: Path) -> tuple[Path, str]:
    """A home with a run named first/pulse, which was planned, and the output of both jobs."""
    planned = load(PlanConfig, [*tiny_arguments(prepared, corpus), "name=first/pulse"])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert load_job("plan").main(planned) == 0
        load_job("pretrain").main(tiny(prepared, corpus, "name=first/pulse"))
    return prepared, out.getvalue()


def test_prepare(
    load_job: Callable[[str], Any],
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load(PretrainConfig, tiny_arguments(tmp_path, corpus))
    load_job("prepare").main(config)
    assert (tmp_path / "data" / "animals-bpe300" / "MANIFEST.json").exists()
    assert "bytes per token" in capsys.readouterr().out
    load_job("prepare").main(config)
    assert "existed already" in capsys.readouterr().out


def test_pretrain(trained: tuple[Path, str]) -> None:
    home, out = trained
    for words in ("step 4/4 | loss", "val bpb", "sample: The cat", "saved step", "extend", "next"):
        assert words in out, out
    run = home / "runs" / "first" / "pulse"
    assert (run / "loss.png").exists()
    assert "memory       fits:" in out and "plan         peak memory in GB" in out, out
    assert json.loads((run / layout.PLAN).read_text())["run"] == "first/pulse"
    files = [file for folder in (run, home / "ray") for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10 and SECRET not in out
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_a_run_leaves_what_a_person_looks_at(trained: tuple[Path, str]) -> None:
    home, out = trained
    folder = home / "runs" / "first" / "pulse"
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "loss.png"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").iterdir())
    assert not list(folder.glob(".ray*")) and not (home / "ray").exists()  # Ray's own
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(0, "The cat"), (4, "The cat")]
    records = read_metrics(f"{folder}/metrics.jsonl")
    assert [r["step"] for r in records if "val_loss" in r] == [0, 2, 4]
    lines = out.splitlines()
    assert any("tok/s" in line and "data wait" in line and "ETA" in line for line in lines)
    # On a CPU, MFU is a share of the measured peak.
    steps = [r for r in records if "loss" in r]
    assert all(r["mfu"] == r["mfu_of_measured"] and "memory_peak" not in r for r in steps)


def test_evaluate(
    load_job: Callable[[str], Any],
    trained: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        {
            "activity_label": "Swimming",
            "ctx_a": "A ray swims.",
            "ctx_b": "it",
            "endings": ["dives.", "flies off.", "reads.", "sings a song."],
            "label": str(i % 4),
        }
        for i in range(8)
    ]
    hellaswag = tmp_path / "hellaswag.jsonl"
    hellaswag.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wikitext = tmp_path / "wikitext.txt"
    wikitext.write_text(" \n = Ray = \n \n A ray is a fish . \n = Cat = \n \n A cat is not . \n")
    local = [f"evals.hellaswag_path={hellaswag}", f"evals.wikitext_path={wikitext}"]
    suites = {"perplexity": "bits_per_byte", "hellaswag": "acc", "wikitext": "word_perplexity"}
    keys = [f"home={trained[0]}", "checkpoint=first/pulse", f"suite=[{','.join(suites)}]"]
    load_job("evaluate").main(load(EvaluateConfig, [*keys, "threads=1", *local]))
    out = capsys.readouterr().out
    for suite, figure in suites.items():
        file = trained[0] / "runs" / "first" / "pulse" / "evals" / "step-00000004" / f"{suite}.json"
        result = json.loads(file.read_text())["results"][suite]
        documents = {"hellaswag": 8, "wikitext": 2}.get(suite, result["samples"])
        assert result["samples"] == documents > 0
        assert figure in result
        assert f"written to {file}" in out


def test_any_number_of_workers_gives_the_same_scores(
    load_job: Callable[[str], Any], trained: tuple[Path, str], corpus: Path
) -> None:
    """Scores are equal to the last bit: they do not depend on which requests are batched
    together."""
    keys = [f"home={trained[0]}", "checkpoint=first/pulse", "threads=1", "cpus=0.5"]
    keys += ["suite=[perplexity,quick]"]
    found = []
    for workers in (1, 3):
        config = load(EvaluateConfig, [*keys, f"num_workers={workers}"])
        load_job("evaluate").main(config)
        folder = trained[0] / "runs/first/pulse/evals/step-00000004"
        files = [folder / "perplexity.json", folder / "quick.json"]
        found.append([json.loads(file.read_text())["results"] for file in files])
    assert found[0] == found[1]


def test_generate(
    load_job: Callable[[str], Any],
    trained: tuple[Path, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"home={trained[0]}", "checkpoint=first/pulse", "prompt=The cat", "max_tokens=8"]
    texts = []
    for keys in ([], [], ["device=cpu", "dtype=bf16"], ["num_samples=2"]):
        load_job("generate").main(load(GenerateConfig, [*arguments, *keys]))
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("The cat") and len(text) > len("The cat") for text in texts)
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def exported(
    load_job: Callable[[str], Any],
    trained: tuple[Path, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """The folder of the exported model, which is imported again as `back`, and the output of both
    jobs."""
    home, out = trained[0], tmp_path_factory.mktemp("exported") / "model"
    keys = [f"home={home}", "checkpoint=first/pulse", f"out={out}"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        load_job("export").main(load(ExportConfig, keys))
        keys = [f"home={home}", "from=hf", f"path={out}", "name=back"]
        load_job("import_model").main(load(ImportConfig, keys))
    return out, said.getvalue()


def test_a_model_is_exported_imported_and_evaluated(
    load_job: Callable[[str], Any],
    trained: tuple[Path, str],
    exported: tuple[Path, str],
    corpus: Path,
) -> None:
    home, (out, said) = trained[0], exported
    assert f"written to {out}" in said and "init.checkpoint=back" in said
    card = (out / "README.md").read_text()
    assert "animals-bpe300" in card and "1,024 tokens" in card and str(home) not in card
    assert (out / "loss.png").exists()
    results = []
    for name in ("first/pulse", "back"):
        keys = [f"home={home}", f"checkpoint={name}", f"evals.text_path={corpus}", "limit=1"]
        load_job("evaluate").main(load(EvaluateConfig, keys))
        step = "step-00000004" if name != "back" else "step-00000000"
        file = home / "runs" / name / "evals" / step / "perplexity.limit-1.json"
        results.append(json.loads(file.read_text())["results"]["perplexity"])
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    with pytest.raises(DataError, match=r"was imported.*evals\.text_path=FILE"):
        load_job("evaluate").main(load(EvaluateConfig, [f"home={home}", "checkpoint=back"]))


@pytest.mark.long
def test_an_imported_model_is_trained_further(
    trained: tuple[Path, str], exported: tuple[Path, str], corpus: Path
) -> None:
    home = trained[0]
    keys = ["name=more", "init.checkpoint=back", "model.n_layer=1"]
    more = pretrain(tiny(home, corpus, *keys), print)
    before = [r for r in read_metrics(f"{home}/runs/first/pulse/metrics.jsonl") if "val_loss" in r]
    assert more.metrics[0]["val_loss"] == pytest.approx(before[-1]["val_loss"], rel=1e-6)
    assert checkpoint.load_model_config(more.checkpoint).n_layer == 2
    assert more.state.step == 4


def test_sweep_trains_runs_like_pretrain_and_goes_on_from_its_journal(
    load_job: Callable[[str], Any],
    trained: tuple[Path, str],
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One lane trains three trials up to a rung of asha, then the best one from its pause on: its
    weights are those of the same run by jobs/pretrain.py, to the bit."""
    prepared = trained[0]
    arguments = [
        *tiny_arguments(prepared, corpus),
        "sweep.lr=[1e-7,1e-6,2e-3]",
        "sweep.tokens_per_batch=[256]",
        "sweep.scheduler=asha",
        "sweep.rungs=2",
        "sweep.max_concurrent=1",
    ]
    assert load_job("sweep").main(load(SweepConfig, arguments)) == 0
    out = capsys.readouterr().out
    assert "sweep sweep: 3 trials, at most 2,048 tokens; 1 at a time" in out, out
    assert "sweep/lr1e-07-batch256 done at 512 tokens: val loss" in out and "(4 done)" in out
    folder = prepared / "runs" / "sweep"
    ranking = json.loads((folder / "ranking.json").read_text())
    assert (ranking[0]["lr"], ranking[0]["tokens"]) == (2e-3, 1024)
    assert {row["tokens"] for row in ranking[1:]} == {512}
    winner, alone = (
        Path(checkpoint.newest(str(prepared / "runs" / name)), "model.safetensors").read_bytes()
        for name in (ranking[0]["run"], "first/pulse")
    )
    assert winner == alone
    for row in ranking:
        state = checkpoint.load_state(checkpoint.newest(str(prepared / "runs" / row["run"])))
        assert (state.step, state.total_steps, state.val_loss) == (
            row["tokens"] // 256, 4, row["val_loss"],
        )  # fmt: skip
        assert (prepared / "runs" / row["run"] / "config.yaml").exists()
    assert not list(folder.rglob(".ray*"))  # Ray's own records
    best = load(PretrainConfig, [str(folder / "best.yaml")])
    assert pretrain(best, print).finished_before
    # With more tokens it goes on from there.
    longer = dataclasses.replace(best, total_tokens=2048)
    start = start_of(longer)
    assert start == checkpoint.newest(str(prepared / "runs" / ranking[0]["run"]))
    assert not is_finished(longer, start)

    before = (folder / "ranking.json").read_bytes(), (folder / "decisions.jsonl").read_bytes()
    assert load_job("sweep").main(load(SweepConfig, arguments)) == 0
    assert "sweep sweep is finished; nothing was trained" in capsys.readouterr().out
    after = (folder / "ranking.json").read_bytes(), (folder / "decisions.jsonl").read_bytes()
    assert after == before


@pytest.mark.long
def test_bench_overhead_writes_its_figures(
    load_job: Callable[[str], Any], prepared: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = [
        *tiny_arguments(prepared, corpus),
        "what=overhead",
        "rounds=1",
        "steps_per_round=2",
        "num_workers=2",
        f"json={tmp_path / 'overhead.json'}",
    ]
    load_job("bench").main(load(BenchConfig, arguments))
    figures = json.loads((tmp_path / "overhead.json").read_text())
    for key in ("bare_tokens_per_second", "platform_tokens_per_second", "ratio"):
        assert figures[key] > 0
    assert figures["peak_memory_bytes"] > 1 << 20
    assert not (prepared / "runs" / "bench-overhead").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("keys", "figures"),
    [
        (
            ["what=data", "tokens=2097152"],
            ["ratio", "first_batch_seconds", "seek_middle_seconds", "memory_bytes"],
        ),
        (["what=tokenize", "text_bytes=100000"], ["tokenizing_ratio", "preparing_ratio"]),
    ],
)
def test_bench_of_data_writes_its_figures(
    load_job: Callable[[str], Any],
    prepared: Path,
    corpus: Path,
    tmp_path: Path,
    keys: list[str],
    figures: list[str],
) -> None:
    file = tmp_path / "figures.json"
    arguments = [*tiny_arguments(prepared, corpus), "rounds=1", f"json={file}", *keys]
    load_job("bench").main(load(BenchConfig, arguments))
    found = json.loads(file.read_text())
    for key in figures:
        assert key in found and (key == "memory_bytes" or found[key] > 0)  # memory may shrink
    assert not list(prepared.glob("bench-*"))


def test_the_model_bench_runs_where_ray_is_not_installed(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    arguments = [*tiny_model_arguments(tmp_path), "what=model", "profile=true", f"json={file}"]
    arguments += ["rounds=1", "steps_per_round=2", "activation_checkpointing=selective"]
    arguments += ["num_workers=2"]
    blocked = "ray", "lm_eval", "datasets", "transformers"
    job = str(ROOT / "jobs" / "bench.py")
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.path.insert(0, ''); runpy.run_path({job!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["parameters"] > 0 and found["mfu"] > 0 and found["loss"] > 0
    assert found["workers"] == 2 and found["communication_seconds"] > 0
    assert set(found["part_seconds"]) == {"data", "forward", "backward", "optimizer"}
    assert "traceEvents" in json.loads(Path(found["trace"]).read_text())
    for line in ("MFU", "forward", "communication", "peak memory", "trace"):
        assert line in done.stdout
    command[3:] = [*tiny_model_arguments(tmp_path), "what=checkpoint", f"json={file}", "rounds=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["copy_seconds"] > 0 and found["save_steps"] > 0 and found["bytes"] > 10_000
    assert not (tmp_path / "bench-checkpoint").exists()


@pytest.mark.parametrize(
    ("keys", "figures"),
    [
        (
            ["what=generate", "new_tokens=20"],
            ["cached_ratio", "batched_ratio", "large_batch_tokens_per_second"],
        ),
        (["what=generate", "new_tokens=9", "dtype=bf16"], ["uncached_tokens_per_second"]),
        (["what=evaluate", "dtype=auto"], ["ratio", "requests_per_second"]),
        (["what=evaluate", "dtype=bf16"], ["ratio"]),
    ],
)
def test_a_bench_without_ray_writes_its_figures(
    load_job: Callable[[str], Any], tmp_path: Path, keys: list[str], figures: list[str]
) -> None:
    file = tmp_path / "figures.json"
    arguments = [*tiny_model_arguments(tmp_path), "rounds=1", f"json={file}", *keys]
    load_job("bench").main(load(BenchConfig, arguments))
    found = json.loads(file.read_text())
    assert all(found[key] > 0 for key in figures)
    assert found["dtype"] == ("bf16" if "dtype=bf16" in keys else "fp32")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["checkpoint=nothing"], CheckpointError, "runs with one: .*pulse"),
        (["suite=hellaswag", "evals.hellaswag_path=no.jsonl"], DataError, "no.jsonl: no such file"),
        (["evals.text_path=no.txt"], DataError, "no.txt: no such file"),
    ],
)
def test_evaluate_says_what_is_missing(
    load_job: Callable[[str], Any],
    trained: tuple[Path, str],
    arguments: list[str],
    error: type[Exception],
    words: str,
) -> None:
    config = load(EvaluateConfig, [f"home={trained[0]}", "checkpoint=first/pulse", *arguments])
    with pytest.raises(error, match=words):
        load_job("evaluate").main(config)


def test_a_runs_numbers_are_metrics_of_rays_dashboard() -> None:
    record = {"loss": 2.5, "goodput": 0.97, "val_loss/a-b": 3.5, "fingerprint": "00ff"}
    metrics = Metrics("some/run")
    metrics.publish(record)
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    lines: list[str] = []
    found: dict[str, float] = {}
    while len(found) < 3 and time.monotonic() < deadline:  # Ray gathers them every ten seconds
        time.sleep(1)
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10) as page:
            lines = page.read().decode().splitlines()
        ours = [
            line for line in lines if line.startswith("ray_manta_") and 'run="some/run"' in line
        ]
        found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in ours}
    assert found == {
        "ray_manta_loss": 2.5,
        "ray_manta_goodput": 0.97,
        "ray_manta_val_loss_a_b": 3.5,
    }


@pytest.mark.long
def test_the_quickstarts_recipe_starts_from_the_pairs(tmp_path: Path, corpus: Path) -> None:
    file = str(ROOT / "jobs" / "configs" / "quickstart.yaml")
    recipe = [file, *tiny_arguments(tmp_path, corpus), "batch_ramp={128: 256}", "total_tokens=512"]
    said: list[str] = []
    done = pretrain(load(PretrainConfig, [*recipe, "num_workers=2", "zero_stage=1"]), said.append)
    (fitted,) = [line for line in said if "pairs of tokens: loss" in line]
    start = next(m["val_loss"] for m in done.metrics if "val_loss" in m)
    # Both workers measure a half of the val split; a guess among 300 is 5.7.
    assert start < 2 and start == pytest.approx(float(fitted.split("loss ")[1].split()[0]), abs=0.5)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs" / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_config_in_the_repository_is_valid(path: Path) -> None:
    if "base=RUN" in path.read_text():  # as its comment says
        assert load(FinetuneConfig, [str(path), "base=x", "data.source=x.jsonl"]).name == path.stem
    elif "jobs/scaling.py" in path.read_text():
        assert load(ScalingConfig, [str(path)]).name == path.stem
    else:
        assert load(PretrainConfig, [str(path)]).name == path.stem
