"""Fine-tuning: the data are prepared with the checkpoint's tokenizer, then a run trains on them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from manta import layout, storage
from manta.cluster import connection
from manta.data import mixture
from manta.data.manifest import Manifest
from manta.finetune.settings import FinetuneConfig
from manta.train.checkpoints import checkpoint as checkpoints
from manta.train.pretrain import Outcome, pretrain, results
from manta.train.settings import PretrainConfig

ENOUGH_STEPS = 100  # fewer steps than this are worth a word
Refer = Callable[[PretrainConfig, Manifest, Callable[[str], None]], PretrainConfig]


def finetune(
    c: FinetuneConfig, say: Callable[[str], None], refer: Refer | None = None, **arguments: Any
) -> tuple[PretrainConfig, Outcome]:
    """Trains from the checkpoint, or resumes, as the config says; returns the run and how it ended.

    Args:
        say: receives each line meant for a person.
        refer: returns the config of a run on pairs with its reference (`evaluate.reference`).
        arguments: those of `train.pretrain.pretrain`.

    Raises:
        MantaError: the run cannot work; raised before anything starts.
    """
    run = dataclasses.replace(c.run(), home=c.home_folder)
    keep_tokenizer(run)
    connection.connect(name=c.name)
    datasets = mixture.open_datasets(run.data, run.home_folder, say, run.wait_seconds)
    if labels := datasets[0].labels:
        run = dataclasses.replace(run, model=run.model.classifying(labels))
    tokens = math.ceil(c.epochs * sum(dataset.tokens("train") for dataset in datasets))
    run = dataclasses.replace(run, total_tokens=max(tokens, run.tokens_per_batch))
    say(f"{c.epochs:g} epochs of {tokens / c.epochs:,.0f} tokens: {run.total_steps} steps")
    if advice := few_steps(run):
        say(advice)
    if c.kind == "preference" and refer is not None:
        run = refer(run, datasets[0], say)
    return run, pretrain(run, say, datasets=datasets, **arguments)


USES = {
    "chat": ("chat.py checkpoint={}", "evaluate.py checkpoint={}"),
    "preference": ("chat.py checkpoint={}", "evaluate.py checkpoint={}"),
    "classify": ('classify.py checkpoint={} text="..."',),
    "text": ('generate.py checkpoint={} prompt="..."', "evaluate.py checkpoint={}"),
}
"""Jobs that take what a fine-tuning of each kind makes."""


def summary(c: FinetuneConfig, run: PretrainConfig, done: Outcome) -> str:
    """The lines that a person reads at the end of a fine-tuning."""
    first, *others = (f"python jobs/{use.format(run.name)}" for use in USES[c.kind])
    lines = [*results(run, done), f"next         {first}"]
    lines += [f"             {other}" for other in others]
    if done.stopped_by is None:
        patience = " eval.patience=null" if done.state.stopped_early else ""
        lines.append(f"extend       the same command with epochs={2 * c.epochs:g}{patience}")
    lines.append("start over   the same command with another name=")
    return "\n".join(lines)


def few_steps(run: PretrainConfig) -> str | None:
    """Advice for a run of too few steps to learn much; None if it has enough, or could not have
    more."""
    whole = run.sequence_length * run.most_workers
    if isinstance(run.micro_batch_size, int):
        whole *= run.micro_batch_size
    size = max(1, run.total_tokens // ENOUGH_STEPS // whole) * whole
    if run.total_steps >= ENOUGH_STEPS or size >= run.tokens_per_batch:
        return None
    steps = dataclasses.replace(run, tokens_per_batch=size).total_steps
    return (
        f"{run.total_steps} step(s) are few to learn from: tokens_per_batch={size} would make "
        f"{steps}, and more epochs= more"
    )


def keep_tokenizer(run: PretrainConfig) -> None:
    """Copies the tokenizer of the run's base to the home, where it stays when the base is deleted.
    Does nothing if the copy is there, or if the run's data have a tokenizer of their own."""
    base, file = str(run.init.checkpoint), run.data.tokenizer
    is_copy = file.startswith(layout.tokenizers_folder(run.home_folder))
    if is_copy and not storage.exists(file):
        storage.write_bytes(file, checkpoints.load_tokenizer(base).serialized)
