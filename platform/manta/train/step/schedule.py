"""The learning rate at a step: pure arithmetic."""

import math
from typing import Literal

from manta.config import Fraction, config


@config
class ScheduleConfig:
    kind: Literal["cosine", "linear", "wsd"] = "cosine"
    """The shape of the schedule. cosine, linear: the rate falls along that curve from the end of
    warm-up to the last step; wsd (warm-up, stable, decay): the rate stays at the peak, then falls
    over the last `decay` of the run."""
    warmup: Fraction = 0.02
    """Share of the run's steps over which the rate climbs from zero to its peak."""
    decay: Fraction = 0.2
    """Share of the run's steps over which the rate of wsd falls."""
    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    """The curve along which the rate of wsd falls. sqrt: 1 - sqrt(share of the decay that is over)
    (Hagele et al. 2024)."""
    min_lr_ratio: Fraction = 0.1
    """The rate at the last step, as a share of the peak."""

    def problems(self) -> list[str]:
        if self.kind != "wsd" and self.decay_shape != "sqrt":
            return [f"decay_shape={self.decay_shape} is for kind=wsd: omit it"]
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            return [f"warmup + decay = {self.warmup + self.decay:g}: more than the whole run (1)"]
        return []


def lr_at(step: int, total_steps: int, peak: float, c: ScheduleConfig) -> float:
    """The learning rate of step `step` (0 is the first) of `total_steps`.

    Warm-up is linear and never zero; the last step's rate is `min_lr_ratio * peak`.
    """
    warmup_steps = math.ceil(c.warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    low = c.min_lr_ratio * peak
    decay_steps = total_steps - warmup_steps
    if c.kind == "wsd":
        decay_steps = min(decay_steps, math.ceil(c.decay * total_steps))
    left = total_steps - 1 - step
    if left >= decay_steps or decay_steps < 2:
        return peak if left or decay_steps < 1 else low
    share = max(left, 0) / (decay_steps - 1)  # 1 at the start of the decay, 0 at the last step
    if c.kind == "cosine":
        share = 0.5 * (1 - math.cos(math.pi * share))
    elif c.kind == "wsd" and c.decay_shape == "sqrt":
        share = 1 - math.sqrt(1 - share)
    return low + (peak - low) * share
