"""Fine-tuning through Ray: a base run, conversations, a longer run on another number of workers."""

import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from faults.kills import kill_all, start
from helpers.checkpoints import save_untrained
from helpers.common import tiny
from manta import storage
from manta.config import load
from manta.data import conversations, mixture, shards
from manta.data import manifest as manifests
from manta.errors import CheckpointError, ConfigError
from manta.evaluate.adapter import in_process
from manta.evaluate.documents import Documents
from manta.evaluate.inference_settings import GenerateConfig
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.suites import run_suite
from manta.finetune.finetune import few_steps, finetune, summary
from manta.finetune.settings import FinetuneConfig
from manta.model.gpt import IGNORED
from manta.text.templates import Template
from manta.train.checkpoints import checkpoint, fragments
from manta.train.kinds import check_kind
from manta.train.objectives.answers import Answers
from manta.train.pretrain import Outcome
from manta.train.settings import PretrainConfig

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS = 96  # tokens of a row
MORE_WORKERS = ("num_workers=2", "zero_stage=2")


def silent(line: Any) -> None:
    pass


def fingerprints(run: PretrainConfig) -> dict[int, str]:
    lines = (Path(run.run_folder) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["fingerprint"] for r in map(json.loads, lines) if "fingerprint" in r}


@pytest.fixture(scope="module")
def base(prepared: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of an untrained run, `base`, and a file of conversations, `chats.jsonl`."""
    home = tmp_path_factory.mktemp("finetune")
    data = home / "data" / "animals-bpe300"
    storage.make_folder(str(data.parent))
    data.symlink_to(prepared / "data" / "animals-bpe300")
    c = tiny(home, corpus, "name=base", f"model.context_length={ROWS}", "tokens_per_batch=768")
    save_untrained(c, manifests.load(str(data)).load_tokenizer())
    rng, animals = random.Random(5), ("cat", "dog", "ray", "bird")
    rows = []
    for number in range(300):
        who = rng.choice(animals)
        turns = [("user", f"Who is {number}?"), ("assistant", f"The {who}.")]
        rows.append({"messages": [{"role": r, "content": text} for r, text in turns]})
    (home / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def arguments_of(home: Path) -> list[str]:
    return [
        f"home={home}", "base=base", f"data.source={home}/chats.jsonl", "data.val_fraction=0.1",
        "tokens_per_batch=384", "optimizer.lr=3e-3", "eval.every=20", "eval.tokens=200",
        "checkpoint.every=5", "threads_per_worker=1", "dtype=fp32", "log_every=1",
        "data.log_fingerprint=true", "sample.prompts=[Who is 7?]", "sample.tokens=4",
    ]  # fmt: skip


def config(home: Path, *arguments: str) -> FinetuneConfig:
    return load(FinetuneConfig, [*arguments_of(home), *arguments])


@pytest.fixture(scope="module")
def tuned(base: Path) -> tuple[PretrainConfig, Outcome]:
    return finetune(config(base, "name=whole", "epochs=2"), silent)


def test_a_fine_tuning_learns_the_answers_and_is_a_run_like_any_other(
    base: Path, tuned: tuple[PretrainConfig, Outcome], load_job: Callable[[str], Any]
) -> None:
    run, done = tuned
    evaluations = [r["val_loss"] for r in done.metrics if "val_loss" in r]
    assert evaluations[-1] < evaluations[0] / 2
    made = checkpoint.load_tokenizer(done.checkpoint)
    theirs = checkpoint.load_tokenizer(str(run.init.checkpoint))
    assert made.extends(theirs)
    assert Template.of(made).end in made.ends
    assert checkpoint.load_model(done.checkpoint).config.vocab_size >= made.vocab_size
    again, same = finetune(config(base, "name=whole", "epochs=2"), silent)
    assert same.finished_before and again == run
    text = summary(config(base, "name=whole", "epochs=2"), again, same)
    assert "next         python jobs/chat.py checkpoint=whole\n" in text
    assert "extend       the same command with epochs=4\n" in text
    job = load_job("generate")
    job.main(load(GenerateConfig, [f"home={base}", "checkpoint=whole", "prompt=Who is 7?"]))


def test_a_fine_tuning_is_evaluated_on_its_conversations(
    base: Path, tuned: tuple[PretrainConfig, Outcome]
) -> None:
    """It finds its own val split likelier than the base does, whose tokenizer reads it as text."""
    found = {}
    for name in ("whole", "base"):
        keys = [f"home={base}", f"checkpoint={name}", "suite=[perplexity,quick]"]
        keys += ["evals.dataset=" + Path(tuned[0].data.folder(str(base))).name]
        c = load(EvaluateConfig, keys)
        path = checkpoint.resolve(name, str(base))
        documents, made = Documents(c, path), checkpoint.load_tokenizer(path)
        lm = in_process(checkpoint.load_model(path), made)
        for suite in c.suites:
            scores = run_suite(lm, suite, documents, tokenizer=made, say=silent)
            found[name, suite] = scores.results
    bits = [found[name, "perplexity"]["perplexity"]["bits_per_byte"] for name in ("whole", "base")]
    assert bits[0] < bits[1]
    assert found["whole", "quick"]["quick_continuation"]["samples"] > 3


@pytest.mark.long
def test_suites_run_while_a_fine_tuning_goes_on(
    base: Path, load_job: Callable[[str], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    keys = ["name=watched", "epochs=1", "eval.every=10", "eval.suites=[quick]"]
    load_job("finetune").main(config(base, *keys, "eval.arguments=[threads=1,cpus=0.5]"))
    assert "| quick_perplexity bits_per_byte" in capfd.readouterr().out
    assert len(list((base / "runs" / "watched").glob("evals/step-*/quick.json"))) > 1


def test_a_run_of_few_steps_is_told_of_smaller_batches() -> None:
    few = PretrainConfig(total_tokens=8448, tokens_per_batch=8192)
    assert few_steps(few) == (
        "2 step(s) are few to learn from: tokens_per_batch=256 would make 33, and more epochs= more"
    )
    assert few_steps(dataclasses.replace(few, tokens_per_batch=256)) is None
    assert few_steps(dataclasses.replace(few, total_tokens=819_200)) is None


@pytest.mark.long
def test_texts_are_trained_on_as_in_pretraining(base: Path, corpus: Path) -> None:
    keys = ["kind=text", "name=text", f"data.source={corpus}", "data.document_bytes=500"]
    run, done = finetune(config(base, *keys, "epochs=0.1"), silent)
    assert not run.document_mask and run.data.kind == "text" and done.state.step == run.total_steps


@pytest.mark.long
def test_killed_in_the_middle_it_reads_the_same_batches_with_another_number_of_workers(
    base: Path, tuned: tuple[PretrainConfig, Outcome]
) -> None:
    keys = [*arguments_of(base), "epochs=20"]
    metrics = base / "runs" / "killed" / "metrics.jsonl"
    job = start(base, "killed", keys, "finetune.py")
    for _ in range(6000):
        if job.poll() is not None or (metrics.exists() and b'"step": 23' in metrics.read_bytes()):
            break
        time.sleep(0.02)
    assert job.poll() is None, (base / "killed.log").read_text()[-2000:]
    kill_all(job)
    run, done = finetune(load(FinetuneConfig, [*keys, *MORE_WORKERS, "name=killed"]), silent)
    found, expected = fingerprints(run), fingerprints(tuned[0])
    assert done.state.step == run.total_steps == len(found) > len(expected) > 20
    assert {step: found[step] for step in expected} == expected


def test_a_packed_conversation_has_the_loss_that_it_has_alone(
    tuned: tuple[PretrainConfig, Outcome],
) -> None:
    run, done = tuned
    (data,) = mixture.open_datasets(run.data, run.home_folder, silent)
    model, made = checkpoint.load_model(done.checkpoint).eval(), data.load_tokenizer()
    rule = conversations.rule_of(data)
    objective = Answers(made, True, rule)

    def losses(row: np.ndarray) -> torch.Tensor:
        """The loss of each trained target of one row."""
        ids = row[None].astype(np.int64)
        mask = objective.batch(ids).trained
        assert mask is not None
        tokens = torch.from_numpy(ids[:, :-1])
        targets = torch.from_numpy(np.where(mask, ids[:, 1:], IGNORED))
        documents = objective.documents(tokens)
        with torch.no_grad():
            found = model(tokens, targets, documents=documents, reduction="none")
        return found.flatten()[torch.from_numpy(mask.flatten())]

    whole = shards.split_tokens(data, "train")
    compared = 0
    for row in whole[: len(whole) // ROWS * ROWS].reshape(-1, ROWS)[:20]:
        borders = np.flatnonzero(row == rule.start)
        pieces = [p for p in np.split(row, borders[1:]) if len(p) > 1]
        alone = [losses(np.append(piece, rule.start)) for piece in pieces]
        together = losses(np.append(row, rule.start))
        assert torch.allclose(torch.cat(alone), together, atol=1e-5)
        compared += len(pieces)
    assert compared > 20


def test_what_would_train_conversations_wrongly_is_refused(
    base: Path, tuned: tuple[PretrainConfig, Outcome]
) -> None:
    run, _ = tuned
    data = (manifests.load(run.data.folder(run.home_folder)),)
    check_kind(run, data)
    with pytest.raises(ConfigError, match="would see each other: set document_mask=true"):
        check_kind(dataclasses.replace(run, document_mask=False), data)
    with pytest.raises(ConfigError, match=f"rows of {ROWS} tokens, .* set seq_len={ROWS}"):
        check_kind(dataclasses.replace(run, seq_len=24), data)
    texts = manifests.load(str(base / "data" / "animals-bpe300"))
    with pytest.raises(ConfigError, match=r"data\.mix: .* differ in kind"):
        check_kind(run, (*data, texts))
    for keys, words in (
        (["base=null"], "base is missing: give the run to start from"),
        (["total_tokens=999"], "total_tokens=999: a fine-tuning takes epochs="),
        (["init.checkpoint=x"], "init.checkpoint=x: a fine-tuning takes base="),
    ):
        with pytest.raises(ConfigError, match=words):
            config(base, *keys)


@pytest.mark.long
def test_adapters_learn_and_the_run_goes_on_and_opens_like_any_other(
    base: Path, load_job: Callable[[str], Any]
) -> None:
    keys = ["name=adapted", "lora.rank=4", "optimizer.lr=1e-2"]
    said: list[str] = []
    run, done = finetune(config(base, *keys, "epochs=1"), said.append)
    evaluations = [r["val_loss"] for r in done.metrics if "val_loss" in r]
    assert evaluations[-1] < evaluations[0] - 0.1
    assert any("of which 0.0" in line and "learn" in line for line in said)
    theirs = checkpoint.own_weights(str(run.init.checkpoint))
    ours, adapter = (
        checkpoint.own_weights(done.checkpoint),
        checkpoint.load_adapter(done.checkpoint),
    )
    same = {name for name, weight in theirs.items() if torch.equal(weight, ours[name])}
    assert same == theirs.keys() and adapter is not None
    assert fragments.read_index(done.checkpoint).keys() == adapter.weights.keys()
    with pytest.raises(CheckpointError, match=r"with lora\.rank=4, the config says lora\.rank=2"):
        finetune(config(base, *keys, "epochs=2", "lora.rank=2"), silent)
    with pytest.raises(CheckpointError, match="with trainable=all, the config says trainable=last"):
        finetune(config(base, "name=adapted", "epochs=2", "trainable=last_block"), silent)
    _, more = finetune(config(base, *keys, "epochs=1.2", "zero_stage=3"), silent)
    assert more.state.step > done.state.step
    later = checkpoint.load_adapter(more.checkpoint)
    assert later is not None and later.config == adapter.config
    assert not any(torch.equal(later.weights[n], w) for n, w in adapter.weights.items())
    job = load_job("generate")
    job.main(load(GenerateConfig, [f"home={base}", "checkpoint=adapted", "prompt=Who is 7?"]))


def test_a_run_is_found_without_its_base_and_is_no_other_fine_tuning(
    base: Path, tuned: tuple[PretrainConfig, Outcome]
) -> None:
    run, _ = tuned
    for keys, words in (
        (["base=nosuch"], "name=whole: the run of this name started from .*, not from base=nosuch"),
        (["data.source=other.jsonl"], r"trains on data\.source=.*chats\.jsonl, not .*other\.jsonl"),
        (["data.train_on=all"], r"trains on data\.train_on=assistant, not all; give another name="),
        (["name=base"], "name=base: the run of this name did not start from a checkpoint"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(base, "name=whole", "epochs=2", *keys).run()
    folder = base / "runs" / "base"
    folder.rename(base / "runs" / "elsewhere")
    try:
        found = config(base, "name=whole", "epochs=2").run()
    finally:
        (base / "runs" / "elsewhere").rename(folder)
    assert (found.init, found.data) == (run.init, run.data)


@pytest.mark.long
def test_a_run_goes_on_without_its_base(base: Path, tuned: tuple[PretrainConfig, Outcome]) -> None:
    folder = base / "runs" / "base"
    folder.rename(base / "runs" / "elsewhere")
    try:
        _, done = finetune(config(base, "name=whole", "epochs=2.2"), silent)
    finally:
        (base / "runs" / "elsewhere").rename(folder)
    assert done.state.step > tuned[0].total_steps
