"""A preference tuning through Ray: the reference, the run, how it goes on, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import model_of, save
from helpers.pairs import chat_tokenizer, some_pairs
from manta.config import load
from manta.data import manifest as manifests
from manta.data import reference
from manta.errors import CheckpointError, ConfigError, DataError
from manta.evaluate.reference import refer
from manta.finetune.finetune import finetune
from manta.finetune.settings import FinetuneConfig
from manta.text.tokenizer import Tokenizer
from manta.train.kinds import check_kind
from manta.train.pretrain import Outcome, pretrain, summary
from manta.train.settings import PretrainConfig, load_run_config

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS = 384  # tokens of a row


def silent(line: Any) -> None:
    pass


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a chat model, `chat`, one without a template, `base`, and `pairs.jsonl`."""
    folder, made = tmp_path_factory.mktemp("preference"), chat_tokenizer()
    model = model_of({"context_length": ROWS}, made.vocab_size)
    save(model, made, folder, "chat")
    bare = dataclasses.replace(made.extras, chat_template=None)
    save(model, Tokenizer("bare", made.pattern, made.ranks, made.eot, bare), folder, "base")
    rows = "".join(json.dumps(row) + "\n" for row in some_pairs(60))
    (folder / "pairs.jsonl").write_text(rows)
    return folder


def config(home: Path, *arguments: str) -> FinetuneConfig:
    common = [
        f"home={home}", "kind=preference", "base=chat", f"data.source={home}/pairs.jsonl",
        "data.val_fraction=0.2", f"tokens_per_batch={4 * ROWS}", "optimizer.lr=1e-3",
        "eval.every=2", "checkpoint.every=1", "threads_per_worker=1", "dtype=fp32", "log_every=1",
        "data.log_fingerprint=true", "sample.prompts=[sea]", "sample.tokens=4",
        "micro_batch_size=2", "schedule.min_lr_ratio=1", "schedule.warmup=0",
    ]  # fmt: skip
    return load(FinetuneConfig, [*common, *arguments])


@pytest.fixture(scope="module")
def tuned(home: Path) -> tuple[PretrainConfig, Outcome]:
    return finetune(config(home, "name=whole"), silent, refer)


def test_a_run_begins_at_ln_2_and_learns_which_answers_are_chosen(
    home: Path, tuned: tuple[PretrainConfig, Outcome]
) -> None:
    run, done = tuned
    first, *_, last = [r for r in done.metrics if "val_loss" in r]
    assert first["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["val_loss"] < first["val_loss"] and last["val_margin"] > 0.01
    steps = [r for r in done.metrics if "loss" in r]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    names = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp")
    assert all(isinstance(r[name], float) for r in steps for name in names)
    assert "val loss" in summary(run, done) and "bits per byte" not in summary(run, done)
    assert (Path(run.run_folder) / "loss.png").stat().st_size > 10_000
    again, same = finetune(config(home, "name=whole"), silent, refer)
    assert same.finished_before and again == run


def test_a_reference_is_computed_once_and_completed_if_a_part_is_missing(
    home: Path, tuned: tuple[PretrainConfig, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = tuned
    data, name = manifests.load(run.data.folder(run.home_folder)), str(run.dpo.reference)
    before = reference.read(data, name)
    file = Path(reference.file_of(data, name, data.shards[1]))
    file.unlink()
    assert refer(run, data, silent) == run
    after = reference.read(data, name)
    assert (after.keys == before.keys).all()
    assert after.log_probabilities == pytest.approx(before.log_probabilities, abs=1e-4)
    with monkeypatch.context() as patch:  # nothing is missing: no worker is started
        patch.setattr("manta.evaluate.reference._compute", None)
        fresh = dataclasses.replace(run, dpo=dataclasses.replace(run.dpo, reference=None))
        assert refer(fresh, data, silent) == run
    moved = dataclasses.replace(run, init=dataclasses.replace(run.init, checkpoint=f"{home}/gone"))
    assert refer(moved, data, silent).dpo == run.dpo
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(DataError, match=r"is missing, and .*/gone, .* is gone or has other weig"):
        refer(moved, data, silent)
    file.write_bytes(content)


def test_what_would_train_another_thing_is_refused(
    home: Path, tuned: tuple[PretrainConfig, Outcome]
) -> None:
    run, _ = tuned
    for keys, words in (
        (["dpo.reference=x"], "dpo.reference=x: a fine-tuning takes base=; omit it|omit dpo.refer"),
        (["kind=chat", "dpo.beta=0.2"], "dpo.beta is for data.kind=preference: omit it"),
        (["data.template=alpaca"], "template is for kind=chat: omit it"),
        (["dpo.label_smoothing=0.5"], "dpo.label_smoothing=0.5: it has to be below 0.5"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(home, *keys)
    with pytest.raises(ConfigError, match="base=base has no chat template, so it has no answers"):
        config(home, "base=base", "name=other").run()
    for keys, words in (
        (["dpo.beta=0.2"], r"trained with another dpo\.beta \(0\.1; now 0\.2\): it would learn"),
        (["dpo.sft_weight=1"], r"another dpo\.sft_weight \(0\.0; now 1\.0\)"),
    ):
        with pytest.raises(CheckpointError, match=words):
            finetune(config(home, "name=whole", "epochs=3", *keys), silent, refer)
    data = (manifests.load(run.data.folder(run.home_folder)),)
    lacking = dataclasses.replace(run, dpo=dataclasses.replace(run.dpo, reference=None))
    with pytest.raises(ConfigError, match=r"needs the log-probabilities .*: jobs/finetune\.py kin"):
        check_kind(lacking, data)
    other = dataclasses.replace(run.dpo, reference="reference-0-fp32")
    longer = dataclasses.replace(run, dpo=other, total_tokens=2 * run.total_tokens)
    with pytest.raises(CheckpointError, match=r"another dpo\.reference \(reference-"):
        pretrain(longer, silent)


@pytest.mark.long
def test_it_reads_the_same_batches_when_it_goes_on_with_another_number_of_workers(
    home: Path, tuned: tuple[PretrainConfig, Outcome]
) -> None:
    def fingerprints(run: PretrainConfig) -> dict[int, str]:
        lines = (Path(run.run_folder) / "metrics.jsonl").read_text().splitlines()
        return {r["step"]: r["fingerprint"] for r in map(json.loads, lines) if "fingerprint" in r}

    finetune(config(home, "name=parts", "epochs=1"), silent, refer)
    more = ["name=parts", "num_workers=2", "zero_stage=3", "micro_batch_size=1"]
    run, done = finetune(config(home, *more), silent, refer)
    assert fingerprints(run) == fingerprints(tuned[0])
    ours, theirs = ([r["loss"] for r in o.metrics if "loss" in r] for o in (done, tuned[1]))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert load_run_config(run.run_folder) == run
