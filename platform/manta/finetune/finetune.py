"""Fine-tuning: the data are prepared with the checkpoint's tokenizer, then a run trains on them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from manta.cluster import connection
from manta.data import mixture
from manta.data.manifest import Manifest
from manta.finetune.settings import FinetuneConfig
from manta.train.pretrain import Outcome, pretrain
from manta.train.settings import PretrainConfig

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
    connection.connect(name=c.name)
    (dataset,) = mixture.open_datasets(run.data, run.home_folder, say, run.wait_seconds)
    if dataset.labels:
        run = dataclasses.replace(run, model=run.model.classifying(dataset.labels))
    tokens = math.ceil(c.epochs * dataset.tokens("train"))
    run = dataclasses.replace(run, total_tokens=max(tokens, run.tokens_per_batch))
    say(f"{c.epochs:g} epochs of {dataset.tokens('train'):,} tokens: {run.total_steps} steps")
    if c.kind == "preference" and refer is not None:
        run = refer(run, dataset, say)
    return run, pretrain(run, say, **arguments)
