"""How long a run takes: steps, evaluations, samples, saves, its start, and what failures cost."""

import dataclasses
import math

from manta.model.activations import FP32
from manta.model.cost import adapters, learning, weights
from manta.model.memory import Setup
from manta.plan.goodput import Losses, daly, losses
from manta.plan.speed import Speed
from manta.train.settings import PretrainConfig

# Bytes a second at which training pauses to copy what is saved: an H100 paused for 0.4 to 0.6 s
# for 1 GB (bench/README.md, 2026-11-26).
COPIED = 2e9
DAY = 86400.0


@dataclasses.dataclass(frozen=True)
class Saves:
    """The checkpoints of a run."""

    bytes_each: int
    count: int
    kept: int
    """How many are on the disk at the end, at most."""
    copied: int
    """Bytes of the copy that the first worker makes, and holds in the host's memory for a while."""
    pause: float
    """Seconds that training pauses for one."""
    write: float | None
    """Seconds until one is on the disk; None: the disk's speed is not known."""

    @property
    def kept_bytes(self) -> int:
        return self.kept * self.bytes_each


@dataclasses.dataclass(frozen=True)
class Duration:
    """Seconds of a run, expected."""

    train: float
    evaluation: float
    samples: float | None
    start: float | None
    """None: not known, and not counted."""
    finish: float
    """The last save, which the run waits for."""
    losses: Losses
    interval: float
    """Seconds of steps between saves."""
    best_interval: float | None
    """The interval of Daly 2006; None without failures."""

    @property
    def total(self) -> float:
        known = (self.train, self.evaluation, self.samples, self.start, self.finish)
        return sum(seconds or 0.0 for seconds in known) + self.losses.total

    @property
    def goodput(self) -> float:
        return self.train / self.total


def saves(c: PretrainConfig, s: Setup, write_speed: float | None) -> Saves:
    """The checkpoints of a run; `write_speed`: of its disk, bytes a second."""
    every = sum(w.total for w in weights(s.model) + adapters(s.model, s.lora))
    learnt = learning(s.model, s.trainable, s.lora)
    is_muon = s.optimizer_kind == "muon"
    state = sum(w.total * (1 if is_muon and w.group == "matrices" else 2) for w in learnt)
    size = FP32 * (every + state)
    steps, tokens = c.total_steps, c.tokens_before(c.total_steps)
    count = 1  # at the end
    if c.checkpoint.every is not None:
        count += (steps - 1) // c.checkpoint.every
    if c.checkpoint.every_tokens is not None:
        count += tokens // c.checkpoint.every_tokens
    if c.eval.suites:
        count += (steps - 1) // c.eval.every
    kept = min(count, c.checkpoint.keep + (1 if c.checkpoint.keep_best else 0))
    if c.checkpoint.keep_every is not None:
        kept += steps // c.checkpoint.keep_every
    mine = FP32 * (every + state // c.most_workers)  # the first worker's: all weights, its share
    write = None if write_speed is None else size / write_speed
    return Saves(size, count, min(kept, count), mine, mine / COPIED, write)


def evaluations(c: PretrainConfig) -> int:
    """How often the val loss is measured: at step 0, along the way, at the end."""
    return 2 + (c.total_steps - 1) // c.eval.every


def samplings(c: PretrainConfig) -> int:
    """How often the prompts are completed."""
    if not c.sample.prompts:
        return 0
    return 2 + ((c.total_steps - 1) // c.sample.every if c.sample.every else 0)


def duration(
    c: PretrainConfig,
    speed: Speed,
    kept: Saves,
    start: float | None,
    failures_per_day: float,
    val_tokens: int,
) -> Duration:
    """How long the run takes. `val_tokens`: tokens of an evaluation, over all datasets."""
    train = c.tokens_before(c.total_steps) / c.tokens_per_batch * speed.step_seconds
    share = math.ceil(val_tokens / c.sequence_length / c.most_workers) * c.sequence_length
    evaluation = evaluations(c) * share * speed.evaluated_token_seconds
    samples = None
    if speed.sample_seconds is not None:
        samples = samplings(c) * speed.sample_seconds
    write = kept.write or 0.0
    interval = _interval(c, speed.step_seconds, kept, train)
    rate = failures_per_day / DAY
    lost = losses(train, interval, kept.pause, write, start or 0.0, rate)
    best = daly(kept.pause, 1 / rate) if rate else None
    return Duration(train, evaluation, samples, start, write, lost, interval, best)


def _interval(c: PretrainConfig, step: float, kept: Saves, train: float) -> float:
    """Seconds of steps between two saves: the shortest that the config asks for."""
    k = c.checkpoint
    found = [train]
    if k.every is not None:
        found.append(k.every * step)
    if k.every_tokens is not None:
        found.append(k.every_tokens / c.tokens_per_batch * step)
    by_time = k.seconds_between(kept.pause + (kept.write or 0.0))
    if by_time is not None:
        found.append(by_time)
    return min(found)
