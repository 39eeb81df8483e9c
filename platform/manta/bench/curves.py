"""Curves of val loss of a grid of small runs, recorded without Ray, for replays of sweeps.

The curves in `curves.json`, next to this file, are of 108 runs on tiny Shakespeare:

    python jobs/bench.py what=sweeps curves=NEW_FILE data.source=tinyshakespeare.txt
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manta import config as configs
from manta.errors import DataError
from manta.sweep.settings import SweepConfig, Trial
from manta.text import sources, tokenizer
from manta.text.sources import Source
from manta.train.alone import together
from manta.train.build import build
from manta.train.objectives.next_token import Batch, NextToken
from manta.train.settings import PretrainConfig
from manta.train.step.device import find_device
from manta.train.step.schedule import lr_at

RECORDED = Path(__file__).with_name("curves.json")
SEEDS = 3
POINTS = 16  # of each curve, equally far from each other in tokens
VOCAB_SIZE = 512
VAL_SHARE, VAL_TOKENS = 0.1, 32_768
GRID: dict[str, Any] = {
    "name": "grid",
    "total_tokens": 393_216,
    "model": {
        "n_embd": 64, "n_head": 4, "context_length": 64, "vocab_size": VOCAB_SIZE,
    },
    "dtype": "fp32",
    "compile": "none",
    "sweep": {
        "lr": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 6.4e-2],
        "tokens_per_batch": [512, 1024, 2048],
        "space": {"model.n_layer": [1, 2]},
        "repeats": SEEDS,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Curve:
    """The val loss of a run along its way."""

    settings: dict[str, Any]
    seed: int
    tokens: list[int]
    losses: list[float | None]
    """Nats a token at each of `tokens`; None from where it is no number."""


@dataclasses.dataclass(frozen=True)
class Curves:
    """The curves of a grid, and the config with which they were recorded."""

    config: dict[str, Any]
    curves: list[Curve]

    @property
    def sweep(self) -> SweepConfig:
        return configs.from_dict(SweepConfig, self.config)


def record(source: Source, threads: int, say: Callable[[str], None]) -> Curves:
    """Trains every run of the grid on a corpus, one after the other, in this process. Raises
    DataError if the text is too short for a pass."""
    c = configs.from_dict(SweepConfig, {**GRID, "threads_per_worker": threads})
    text = "".join(t for part in sources.parts(source) for t in sources.documents(part))
    return Curves(GRID, together(1, "gloo", _record, c, text, say))


def _record(c: SweepConfig, text: str, say: Callable[[str], None]) -> list[Curve]:
    made = tokenizer.train([text], VOCAB_SIZE)
    ids = made.encode_array(text)
    cut = int(len(ids) * (1 - VAL_SHARE))
    train, val = ids[:cut], ids[cut : cut + VAL_TOKENS + 1]
    if len(train) < c.total_tokens:
        raise DataError(
            f"the text has {len(train):,} tokens to train on, and a run takes {c.total_tokens:,}: "
            "give a longer one"
        )
    objective, found = NextToken(made, document_mask=False), []
    for trial, repeat in itertools.product(c.grid[0], range(c.sweep.repeats)):
        mine = c.trial(trial.settings, repeat)
        found.append(_curve(c.config_of(mine), mine, objective, train, val))
        say(f"{mine.name} | {found[-1].losses[-1]}")
    return found


def _curve(
    c: PretrainConfig, trial: Trial, objective: NextToken, train: np.ndarray, val: np.ndarray
) -> Curve:
    device = find_device("fp32", False, c.threads_per_worker or 1)
    size, steps = c.micro_batch, c.grad_accum_steps(0)
    engine = build(c, c.model, device, size=size, steps=steps, compiled=False)
    rows = _windows(train, c.sequence_length, c.seed)
    tokens: list[int] = []
    losses: list[float | None] = []
    for step in range(c.total_steps):
        engine.set_lr(lr_at(step, c.total_steps, 1.0, c.schedule))
        for index in range(steps):
            batch = Batch(np.stack(list(itertools.islice(rows, size))))
            loss = engine(*batch.to(device.torch_device))
            engine.backward(loss, is_last=index == steps - 1)
        engine.step(c.optimizer.grad_clip)
        if (step + 1) % (c.total_steps // POINTS) == 0:
            tokens.append(c.tokens_before(step + 1))
            losses.append(_val_loss(engine, objective, val, c.sequence_length))
    return Curve(trial.settings, trial.seed, tokens, losses)


def _windows(ids: np.ndarray, length: int, seed: int) -> Iterator[np.ndarray]:
    """Windows of the text, in an order that the seed decides, without end."""
    starts = np.arange(0, len(ids) - length - 1, length)
    for epoch in itertools.count():
        for start in np.random.default_rng([seed, epoch]).permutation(starts):
            yield ids[start : start + length + 1]


def _val_loss(engine: Any, objective: NextToken, val: np.ndarray, length: int) -> float | None:
    rows = [val[i : i + length + 1] for i in range(0, len(val) - length - 1, length)]
    with engine.evaluating():
        sums = objective.sums(engine, *Batch(np.stack(rows)).to(torch.device("cpu")))
    loss = objective.val_figures(sums.cpu().numpy())["loss"]
    return round(loss, 5) if math.isfinite(loss) else None
