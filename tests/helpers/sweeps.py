"""Simulated sweeps: a known loss for all settings, with noise for each seed."""

import dataclasses
import math
import zlib
from typing import Any

import numpy as np

from manta.config import from_dict
from manta.sweep.journal import Notes
from manta.sweep.plan import Plan
from manta.sweep.rehearsal import rehearse
from manta.sweep.schedulers import Segment
from manta.sweep.settings import SweepConfig


@dataclasses.dataclass(frozen=True)
class Truth:
    """What settings reach: a parabola over log2 of the rate, which falls with the tokens.

    The `noise` is the standard deviation over seeds; it is drawn once for a run, so that a run's
    losses go up or down together, and depends on `world`, the settings and the seed alone.
    """

    best_lr: float = 2e-3
    curvature: float = 0.02
    noise: float = 0.01
    diverges_from: float = math.inf
    """A rate from which on trials diverge."""
    world: int = 0

    def mean(self, settings: dict[str, Any], tokens: int) -> float:
        """The loss at a number of tokens, without noise; infinite: it diverges."""
        lr = settings.get("optimizer.lr", self.best_lr)
        if lr >= self.diverges_from:
            return math.inf
        steps = tokens / settings.get("tokens_per_batch", 2048)
        penalty = self.curvature * math.log2(lr / self.best_lr) ** 2
        return 2.0 + 8.0 / math.log2(2 + tokens) + 0.5 / math.sqrt(1 + steps) + penalty

    def loss(self, settings: dict[str, Any], tokens: int, seed: int) -> float:
        """The loss that a run with this seed has at a number of tokens."""
        drawn = np.random.default_rng([self.world, seed, _digest(settings)])
        return self.mean(settings, tokens) + self.noise * float(drawn.standard_normal())

    def answer(self, segment: Segment) -> float | None:
        found = self.loss(dict(segment.settings), segment.until, segment.seed)
        return found if math.isfinite(found) else None


def _digest(settings: dict[str, Any]) -> int:
    return zlib.crc32(repr(sorted(settings.items())).encode())


def config(**sweep: Any) -> SweepConfig:
    """A sweep of these keys of `sweep`, with a small model."""
    keys = {"name": "s", "home": "/nowhere", "total_tokens": 65_536, "tokens_per_batch": 1024}
    model = {"n_layer": 1, "n_embd": 32, "n_head": 2, "context_length": 64}
    return from_dict(SweepConfig, {**keys, "model": model, "sweep": sweep})


def simulated(
    c: SweepConfig,
    truth: Truth,
    *,
    lanes: int = 2,
    order: int = 0,
    notes: Notes | None = None,
) -> Plan:
    """The plan of a sweep at its end. `order` decides which of the lanes' segments end first."""
    random = np.random.default_rng(order)
    return rehearse(
        c, lanes, truth.answer, lambda ready: ready[int(random.integers(min(lanes, len(ready))))],
        notes,
    )  # fmt: skip
