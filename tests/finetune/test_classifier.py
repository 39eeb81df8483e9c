"""A classifier through Ray: a base run, a CSV of labelled texts, a test at the end, and a run that
goes on with another number of workers."""

import csv
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import save_untrained
from helpers.common import tiny
from manta import storage
from manta.config import load
from manta.data import manifest as manifests
from manta.errors import CheckpointError, ConfigError
from manta.evaluate import exam
from manta.evaluate.classify import ClassifyConfig
from manta.evaluate.compare import CompareConfig, compare
from manta.finetune.finetune import finetune
from manta.finetune.settings import FinetuneConfig
from manta.train.checkpoints import checkpoint
from manta.train.pretrain import Outcome
from manta.train.settings import PretrainConfig

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS = 96  # tokens of a row


def silent(line: Any) -> None:
    pass


@pytest.fixture(scope="module")
def base(prepared: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of an untrained run, `base`, and a file of labelled texts, `animals.csv`."""
    home = tmp_path_factory.mktemp("classify")
    data = home / "data" / "animals-bpe300"
    storage.make_folder(str(data.parent))
    data.symlink_to(prepared / "data" / "animals-bpe300")
    c = tiny(home, corpus, "name=base", f"model.context_length={ROWS}", "tokens_per_batch=768")
    save_untrained(c, manifests.load(str(data)).load_tokenizer())
    rng = random.Random(5)
    with (home / "animals.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(300):
            label = rng.choice(["bird", "fish"])
            does = {"bird": "flies", "fish": "swims"}[label]
            writer.writerow([f'It {does}, "number {number}"\nsays so', label])
    return home


def config(home: Path, *arguments: str) -> FinetuneConfig:
    common = [
        f"home={home}", "base=base", "kind=classify", f"data.source={home}/animals.csv",
        "tokens_per_batch=768", "optimizer.lr=3e-3", "eval.every=20", "checkpoint.every=5",
        "threads_per_worker=1", "dtype=fp32", "log_every=1", "data.log_fingerprint=true",
    ]  # fmt: skip
    return load(FinetuneConfig, [*common, *arguments])


@pytest.fixture(scope="module")
def tuned(base: Path) -> tuple[PretrainConfig, Outcome]:
    return finetune(config(base, "name=whole", "epochs=2"), silent)


def fingerprints(run: PretrainConfig) -> dict[int, str]:
    lines = (Path(run.run_folder) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["fingerprint"] for r in map(json.loads, lines) if "fingerprint" in r}


def test_a_classifier_learns_and_is_tested(
    base: Path,
    tuned: tuple[PretrainConfig, Outcome],
    load_job: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sklearn")
    run, done = tuned
    assert done.last_eval["val_accuracy"] > 0.9 and done.last_eval["val_macro_f1"] > 0.9
    assert all("accuracy" in r for r in done.metrics if "loss" in r)
    found = exam.examine(done.checkpoint)
    assert found.split == "test" and len(found.model.truth) == 60
    assert found.model.accuracy.value > 0.9
    lines = list(exam.publish(done.folder, run.name, found))
    assert lines[0].startswith("test split: 60 texts (") and "McNemar" in lines[-2]
    record = json.loads((Path(done.folder) / "labels.json").read_text())
    assert record["model"]["texts"] == 60 and record["baseline"]["accuracy"]["value"] > 0.9
    assert (Path(done.folder) / "confusion.png").read_bytes().startswith(b"\x89PNG")
    load_job("classify").main(
        load(ClassifyConfig, [f"home={base}", "checkpoint=whole", "text=It swims, says so"])
    )
    assert capsys.readouterr().out.startswith("fish\tbird 0.")
    compare(load(CompareConfig, [f"home={base}", "runs=[whole,base]", "references=false"]))


def test_what_a_classifier_is_not_for_is_refused(
    base: Path, tuned: tuple[PretrainConfig, Outcome]
) -> None:
    with pytest.raises(CheckpointError, match="a classifier of texts"):
        finetune(dataclasses.replace(config(base, "name=x"), base="whole", kind="text"), silent)
    with pytest.raises(ConfigError, match="a classifier writes no text"):
        config(base, "sample.prompts=[Hi]")
    with pytest.raises(ConfigError, match=r"labels=.* are for kind=classify"):
        load(FinetuneConfig, ["base=base", "labels=[a,b]"])
    with pytest.raises(CheckpointError, match="was trained with another class_weights"):
        finetune(config(base, "name=whole", "epochs=4", "class_weights=balanced"), silent)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_reads_the_same_batches_when_it_goes_on_with_another_number_of_workers(
    base: Path, tuned: tuple[PretrainConfig, Outcome], stage: int
) -> None:
    finetune(config(base, f"name=parts{stage}", "epochs=1"), silent)
    more = [f"name=parts{stage}", "epochs=2", "num_workers=2", f"zero_stage={stage}"]
    run, done = finetune(config(base, *more), silent)
    assert fingerprints(run) == fingerprints(tuned[0])
    assert done.state.step == tuned[1].state.step


@pytest.mark.long
def test_a_head_alone_learns(base: Path) -> None:
    keys = ["name=head", "epochs=4", "trainable=head", "optimizer.lr=1e-2"]
    run, done = finetune(config(base, *keys), silent)
    before = checkpoint.load_model(str(run.init.checkpoint)).state_dict()
    after = checkpoint.load_model(done.checkpoint, classifies=True).state_dict()
    moved = {n for n in after if n != "head.weight" and not before[n].equal(after[n])}
    assert moved == {n for n in after if n.startswith("norm.")}
    assert done.last_eval["val_accuracy"] > 0.6
