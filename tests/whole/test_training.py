"""Training for real: Ray Train workers, DeepSpeed on gloo, Ray Data, checkpoints, resume."""

import contextlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from helpers.common import DATA, tiny, tiny_model_arguments
from manta import layout
from manta.config import load
from manta.data import manifest as manifests
from manta.data import mixture, stream
from manta.errors import CheckpointError, ClusterError, ConfigError, DataError
from manta.messages import Decided
from manta.model.gpt import GPT
from manta.train.checkpoints import checkpoint
from manta.train.plan import order_of, with_vocabulary
from manta.train.pretrain import Outcome, outcome, pretrain, summary
from manta.train.records.logbook import read_metrics
from manta.train.resume import is_finished
from manta.train.settings import PretrainConfig
from manta.train.step.optimizer import make_optimizer
from manta.train.step.schedule import lr_at
from manta.train.supervise import fit

pytestmark = pytest.mark.usefixtures("ray_session")


# Ray's workers cannot import this file, so its objects are sent by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def silent(line: Any) -> None:
    """Takes the log lines of a run and drops them."""


def ended(c: PretrainConfig) -> Outcome:
    return outcome(c, checkpoint.find(c.run_folder)[-1])


def steps(c: PretrainConfig) -> list[dict[str, Any]]:
    """The run's records of steps, in order."""
    return [r for r in read_metrics(f"{c.run_folder}/metrics.jsonl") if "loss" in r]


def losses(c: PretrainConfig) -> list[float]:
    """The run's training losses, in order of steps."""
    return [r["loss"] for r in steps(c)]


def plain_losses(c: PretrainConfig) -> list[float]:
    """The losses of the same training in plain PyTorch: AdamW, clipping, the order read without
    Ray."""
    manifest = manifests.load(c.data.folder(c.home_folder))
    model_config = with_vocabulary(c.model, manifest.load_tokenizer())
    torch.manual_seed(c.seed)
    torch.set_num_threads(1)
    model = GPT(model_config)
    optimizer = make_optimizer(model, c.optimizer)
    order = order_of(c, (manifest,))
    reader = stream.Reader((manifest,), order)
    starts = [window.first_batch for window in order.windows(0, c.total_steps)]
    rows = np.concatenate([reader.read(start)[0] for start in starts]).astype(np.int64)
    per_batch = c.tokens_per_batch // c.sequence_length
    found = []
    for step in range(c.total_steps):
        batch = rows[step * per_batch : (step + 1) * per_batch]
        tokens = torch.from_numpy(batch)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, c.total_steps, c.optimizer.lr, c.schedule)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


STAGES = [0, 1, 2, 3]
RESUMED = ["total_tokens=2048", "model.dropout=0.1", "checkpoint.every=3"]  # 8 steps


def resumed_arguments(dtype: str) -> list[str]:
    return [*RESUMED, "num_workers=2", "zero_stage=2", f"dtype={dtype}"]


# The cases for which the order is tested, 60 steps of 12 sequences each. All of them take minutes:
# only the first is always trained; the others, also on three workers, if their tests are selected.
STREAMS = {
    "pulse": ["data.mix={animals-bpe300: 0.7, verses: 0.3}", "document_mask=true"],
    "mix-masked": ["data.mix={animals-bpe300: 0.7, verses: 0.3}", "document_mask=true"],
    "one": ["data.name=animals-bpe300"],
    "masked": ["data.name=animals-bpe300", "document_mask=true"],
    "mix": ["data.mix={animals-bpe300: 0.7, verses: 0.3}"],
}
FIRST, *LONG = STREAMS


FAR = ["name=far", "num_workers=2", "zero_stage=1", "eval.every=2"]
RAMP = ["batch_ramp={128: 512, 256: 1024}", "tokens_per_batch=512", "total_tokens=3072"]


@pytest.fixture(scope="module")
def streams(request: pytest.FixtureRequest) -> list[str]:
    """The first of the streams, and those others whose tests are selected."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = {call.params.get("stream") for call in calls if call}
    return [FIRST, *(stream for stream in LONG if stream in wanted)]


def stream_runs(workers: int, streams: list[str]) -> dict[str, list[str]]:
    """Each stream on this many workers, and one that goes from two workers to one, then to
    three."""
    common = [
        "tokens_per_batch=384", "total_tokens=23040", "checkpoint.every=10", "eval.every=100",
        "sample.prompts=[]", "data.log_fingerprint=true", f"num_workers={workers}",
    ]  # fmt: skip
    stages = {f"on-{workers}": 0, "cut": workers}  # the cut run resumes at another stage
    return {
        f"{stem}-{stream}": [*common, f"zero_stage={stage}", *STREAMS[stream]]
        for stream in streams
        for stem, stage in stages.items()
    }


@pytest.fixture(scope="module")
def said() -> list[Any]:
    """What the workers of all runs say, in order."""
    return []


@pytest.fixture(scope="module")
def one_worker(
    prepared: Path,
    corpus: Path,
    streams: list[str],
    two_workers: dict[str, PretrainConfig],
    damaged: Path,
    said: list[Any],
) -> dict[str, PretrainConfig]:
    """Several runs, one after the other on one Ray Train worker, because its start costs the
    most. The last one fails on a damaged shard; what it fails with is the last that was said."""
    runs = {
        "base": ["eval.every=2"],
        "plain": ["total_tokens=5120", "micro_batch_size=4"],
        "whole": RESUMED,
        "stopped": RESUMED,
        **stream_runs(1, streams),
        "ramp": RAMP,
        "ramp-cut": [*RAMP, "checkpoint.every=3"],
        "packed": ["data.packing=best_fit", "document_mask=true"],
        "alone": ["tokens_per_batch=384", "total_tokens=3840", "data.log_fingerprint=true"],
        "damaged": ["data.name=damaged"],
    }
    deaths = {"ramp-cut": 5, **{f"cut-{stream}": 41 for stream in streams if stream != FIRST}}
    made = configs_of(prepared, corpus, runs)
    with pytest.raises(DataError) as caught:
        run_all(made, said, deaths)
    said.append(caught.value)
    return made


@pytest.fixture(scope="module")
def three_workers(
    prepared: Path, corpus: Path, streams: list[str], one_worker: dict[str, PretrainConfig]
) -> dict[str, PretrainConfig]:
    made = configs_of(prepared, corpus, stream_runs(3, [s for s in streams if s != FIRST]))
    run_all(made, [])
    return made


@pytest.fixture(scope="module")
def two_workers(
    prepared: Path,
    corpus: Path,
    streams: list[str],
    said: list[Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, PretrainConfig]:
    """The same on two workers, fp32 before bf16, because DeepSpeed keeps autocast on after a bf16
    run. The first run is in an object store, for which fsspec's local:// stands: as with s3://,
    Manta writes nothing in place, and there Ray Train has its records."""
    far = [*FAR, f"home=local://{tmp_path_factory.mktemp('far') / 'bucket'}"]
    stages = {
        f"zero{stage}": [f"zero_stage={stage}", "total_tokens=5120", "num_workers=2"]
        for stage in STAGES
    }
    runs = {
        "half": [*far, "total_tokens=512"],
        "far": far,
        **stages,
        **stream_runs(2, streams),
        "whole-fp32": resumed_arguments("fp32"),
        "stopped-fp32": resumed_arguments("fp32"),
        "whole-bf16": resumed_arguments("bf16"),
        "stopped-bf16": resumed_arguments("bf16"),
    }
    made = configs_of(prepared, corpus, runs)
    mixture.open_datasets(made["far"].data, made["far"].home_folder, silent)
    run_all(made, said, {f"cut-{stream}": 23 for stream in streams})
    return made


def configs_of(home: Path, corpus: Path, runs: dict[str, list[str]]) -> dict[str, PretrainConfig]:
    return {
        name: load(
            PretrainConfig,
            [*tiny_model_arguments(home), f"name={name}", "eval.every=10", *data_of(corpus, keys)],
        )
        for name, keys in runs.items()
    }


def run_all(
    made: dict[str, PretrainConfig], said: list[Any], deaths: dict[str, int] | None = None
) -> None:
    """Trains the runs; one named in `deaths` ends in that step and is not started again."""
    first = next(iter(made.values()))
    job = {"configs": list(made.values()), "deaths": deaths or {}}
    fit(_run_all, job, first, said.append, [])


def data_of(corpus: Path, keys: list[str]) -> list[str]:
    """The keys of a run, with those of the corpus unless it trains on a mix."""
    is_mix = any(key.startswith("data.mix") for key in keys)
    return keys if is_mix else [f"data.source={corpus}", *DATA, *keys]


def _run_all(arguments: dict[str, Any], say: Callable[[str], None]) -> None:
    """Trains each run from its start, in the worker. Those named "stopped" die in their fifth step,
    after steps that no checkpoint has, and are started again."""
    from manta.config import to_dict
    from manta.train import worker
    from manta.train.meter import Meter

    def dying(step: int) -> Callable[[Any], None]:
        def log_and_die(meter: Any) -> None:
            log(meter)
            if meter.run.state.step == step:
                raise RuntimeError("stop here")

        return log_and_die

    log = Meter.log
    for c in arguments["configs"]:
        datasets = mixture.open_datasets(c.data, c.home_folder, silent)
        job = {"config": to_dict(c), "datasets": datasets, "files": {}, "requests": None}
        is_stopped = c.name.startswith("stopped")
        death = 5 if is_stopped else arguments["deaths"].get(c.name)
        if death is not None:
            Meter.log = dying(death)  # type: ignore[method-assign]
            with contextlib.suppress(RuntimeError):
                worker.worker(job, say)
            Meter.log = log  # type: ignore[method-assign]
            last = (death - 1) // c.checkpoint.every * c.checkpoint.every
            assert checkpoint.load_state(checkpoint.find(c.run_folder)[-1]).step == last
        if death is None or is_stopped or c.name == "ramp-cut":
            worker.worker(job, say)


def test_the_engine_at_stage_0_equals_a_plain_adamw_loop(
    one_worker: dict[str, PretrainConfig],
) -> None:
    c = one_worker["plain"]
    assert c.grad_accum_steps(0) == 2 and c.total_steps == 20
    assert losses(c) == pytest.approx(plain_losses(c), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_trains_alike_on_two_workers(
    two_workers: dict[str, PretrainConfig], one_worker: dict[str, PretrainConfig], stage: int
) -> None:
    c = two_workers[f"zero{stage}"]
    assert losses(c) == pytest.approx(losses(one_worker["plain"]), rel=1e-4)
    weights = [
        checkpoint.load_model(layout.checkpoint_folder(run.run_folder, 20)).state_dict()
        for run in (c, one_worker["plain"])
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["", "-fp32", "-bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(
    one_worker: dict[str, PretrainConfig], two_workers: dict[str, PretrainConfig], kind: str
) -> None:
    """The weights are equal bit for bit, with dropout, so that randomness counts too: on one
    worker, and on two."""
    runs = two_workers if kind else one_worker
    whole, stopped = runs["whole" + kind], runs["stopped" + kind]
    assert len(losses(whole)) == 8
    assert losses(stopped) == losses(whole)
    weights = [
        Path(layout.checkpoint_folder(c.run_folder, 8), "model.safetensors").read_bytes()
        for c in (whole, stopped)
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "stream", [FIRST, *(pytest.param(stream, marks=pytest.mark.long) for stream in LONG)]
)
def test_any_workers_read_the_same_batches_also_across_resumes(
    one_worker: dict[str, PretrainConfig],
    two_workers: dict[str, PretrainConfig],
    stream: str,
    request: pytest.FixtureRequest,
) -> None:
    """60 steps on 1 and 2 workers; and on 2 until a death in step 23, then on 1. The long ones are
    also on 3, and on 1 until a death in step 41, then on 3. Each is at another ZeRO stage."""
    whole = one_worker[f"on-1-{stream}"]
    found = [two_workers[f"on-2-{stream}"], one_worker[f"cut-{stream}"]]
    if stream != FIRST:
        three = request.getfixturevalue("three_workers")
        found[1:] = [three[f"on-3-{stream}"], three[f"cut-{stream}"]]
    order = [r["fingerprint"] for r in steps(whole)]
    assert len(set(order)) == 60
    for run in found:
        assert [r["fingerprint"] for r in steps(run)] == order
    assert losses(found[-1]) == pytest.approx(losses(whole), rel=1e-3)


def test_a_mix_reads_other_batches_and_is_measured_on_each_dataset(
    one_worker: dict[str, PretrainConfig],
) -> None:
    alone, mix = (steps(one_worker[name])[:10] for name in ("alone", f"on-1-{FIRST}"))
    assert not {r["fingerprint"] for r in alone} & {r["fingerprint"] for r in mix}
    evals = ended(one_worker[f"on-1-{FIRST}"]).last_eval
    assert {"val_loss/animals-bpe300", "val_loss/verses"} <= evals.keys()


def test_a_batch_ramp_grows_the_batch_and_resumes_exactly(
    one_worker: dict[str, PretrainConfig],
) -> None:
    tokens = [r["tokens"] for r in steps(one_worker["ramp"])]
    assert tokens == [128, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072]
    assert losses(one_worker["ramp-cut"]) == losses(one_worker["ramp"])
    assert len(losses(one_worker["packed"])) == 4


@pytest.mark.long
def test_a_finished_run_says_so_and_can_be_extended(
    one_worker: dict[str, PretrainConfig], prepared: Path, corpus: Path
) -> None:
    run = Path(one_worker["base"].run_folder)
    shutil.copytree(run, run.with_name("extended"))
    c = tiny(prepared, corpus, "name=extended")
    again = pretrain(c, silent)
    assert again.finished_before
    text = summary(c, again)
    assert "is finished" in text
    assert "total_tokens=2048" in text and "name=another-name" in text
    said: list[str] = []
    longer = pretrain(tiny(prepared, corpus, "name=extended", "total_tokens=1536"), said.append)
    assert longer.state.step == 6
    (line,) = [line for line in said if "learning rate goes" in line]
    rate = [record["lr"] for record in steps(c)]
    assert "the run ends at step 6 instead of 4" in line and "schedule.extend=rewarm" in line
    assert f"from {rate[3]:.2e} (step 4) to {rate[4]:.2e}" in line and rate[4] > 2 * rate[3]
    keys = ["total_tokens=2048", "schedule.extend=continue", "eval.tokens=64"]
    longest = pretrain(tiny(prepared, corpus, "name=extended", *keys), said.append)
    assert longest.state.extension is not None and longest.state.extension.step == 6
    rate = [record["lr"] for record in steps(c)]
    assert rate[5:] == pytest.approx([rate[5]] * 3)  # it was at its lowest
    assert any("val loss is of another sample" in line for line in said)
    assert list(longest.state.val_sample.values()) == [64]
    with pytest.raises(ConfigError, match="resume=never"):
        pretrain(tiny(prepared, corpus, "name=extended", "resume=never"), silent)


def test_a_torn_or_damaged_checkpoint_is_skipped(
    one_worker: dict[str, PretrainConfig], tmp_path: Path
) -> None:
    run = str(tmp_path / "torn")
    shutil.copytree(one_worker["base"].run_folder, run)
    older, newer = checkpoint.find(run)
    with (Path(newer) / "model.safetensors").open("r+b") as f:
        f.truncate(100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        checkpoint.verify(newer)
    assert checkpoint.latest(run, say=print) == older
    (Path(older) / "MANIFEST.json").unlink()
    assert checkpoint.latest(run, say=print) is None


def test_a_home_in_an_object_store_holds_everything(
    two_workers: dict[str, PretrainConfig], said: list[Any]
) -> None:
    c = two_workers["far"]
    home = c.home_folder
    assert any(f"resuming at step 2 from {home}" in line for line in said if isinstance(line, str))
    # Rank 0 of each run tells the driver its micro batch: eight sequences, four per worker.
    assert [told for told in said if isinstance(told, Decided)][:2] == [Decided(micro_batch=4)] * 2
    done = ended(c)
    assert done.checkpoint == f"{home}/runs/far/checkpoints/step-00000004"
    checkpoint.verify(done.checkpoint)
    assert checkpoint.load_model(done.checkpoint).config.n_layer == 2
    run = Path(c.run_folder.removeprefix("local://"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4 + 3
    assert (run / "loss.png").exists() and list((run / "tensorboard").iterdir())
    assert checkpoint.find(c.run_folder) == [
        layout.checkpoint_folder(c.run_folder, step) for step in (2, 4)
    ]


@pytest.mark.long
def test_early_stopping_ends_a_run_that_no_longer_improves(prepared: Path, corpus: Path) -> None:
    keys = [
        "name=early", "eval.every=1", "optimizer.lr=9", "total_tokens=2560", "schedule.warmup=0",
        "checkpoint.every=100", "checkpoint.keep=9",
    ]  # fmt: skip
    c = tiny(prepared, corpus, *keys, "eval.patience=2")
    longer = tiny(prepared, corpus, *keys, "eval.patience=null")
    said: list[Any] = []
    fit(_run_all, {"configs": [c, longer], "deaths": {}}, c, said.append, [])
    assert any("stopping early" in line for line in said if isinstance(line, str))
    early, last = checkpoint.find(c.run_folder)
    assert layout.step_of(early) < c.total_steps == layout.step_of(last)
    done = outcome(c, early, finished_before=True)
    assert done.state.stopped_early and is_finished(c, early) and not is_finished(longer, early)
    assert "eval.patience=null" in summary(c, done)


def test_val_loss_does_not_depend_on_the_number_of_workers(
    one_worker: dict[str, PretrainConfig], two_workers: dict[str, PretrainConfig]
) -> None:
    found = [ended(runs).last_eval for runs in (one_worker["plain"], two_workers["zero0"])]
    for key in ("val_loss", "val_bpb"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["model.n_layer=3"], CheckpointError, ["another model", "model.n_layer is 2", "3"]),
        (["seed=1"], CheckpointError, ["another seed"]),
        (["tokens_per_batch=512"], CheckpointError, ["another tokens_per_batch"]),
        (["dtype=bf16"], CheckpointError, ["trained in fp32", "dtype=bf16"]),
        (["document_mask=true"], CheckpointError, ["another document_mask"]),
        (["data.vocab_size=290"], CheckpointError, ["vocab_size"]),
        (["num_workers=4", "cpus_per_worker=3"], ClusterError, ["num_workers=4", "room for 1"]),
        (["num_workers=8", "wait_seconds=1.5"], ClusterError, ["num_workers=8", "room for 4"]),
        (["model.vocab_size=260"], ConfigError, ["model.vocab_size=260", "300"]),
        (["tokens_per_batch=32000", "name=big"], DataError, ["fewer than one batch"]),
        (["data.source=nowhere.txt", "data.name=x"], DataError, ["nowhere.txt", "no such file"]),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    prepared: Path,
    corpus: Path,
    one_worker: dict[str, PretrainConfig],
    arguments: list[str],
    error: type[Exception],
    words: list[str],
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (prepared / "runs").rglob("*")}
    with pytest.raises(error) as caught:
        pretrain(tiny(prepared, corpus, "name=base", "total_tokens=2048", *arguments), silent)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert before == {path: path.stat().st_mtime_ns for path in (prepared / "runs").rglob("*")}


@pytest.fixture(scope="module")
def damaged(prepared: Path, corpus: Path) -> Path:
    """A shard of the dataset `damaged`, with one bit turned over."""
    c = tiny(prepared, corpus, "data.name=damaged")
    mixture.open_datasets(c.data, c.home_folder, silent)
    shard = next(Path(c.data.folder(str(prepared))).glob("train-*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return shard


def test_a_damaged_shard_is_named_and_not_trained_on(
    prepared: Path,
    corpus: Path,
    damaged: Path,
    one_worker: dict[str, PretrainConfig],
    said: list[Any],
) -> None:
    keys = ["name=other", "data.name=damaged", "data.verify=true"]
    with pytest.raises(DataError, match=f"{damaged.name}.*sha256"):
        pretrain(tiny(prepared, corpus, *keys), silent)
    assert not (prepared / "runs" / "other").exists()
    # Without that key it is found when it is read.
    found = re.search(f"{damaged.name}: row group 0 is damaged: its sha256", str(said[-1]))
    assert found and not checkpoint.find(one_worker["damaged"].run_folder)
