"""The learning rate at a step: pure arithmetic."""

import dataclasses
import math
from typing import ClassVar, Literal

from manta.config import Fraction, config


@config
class ScheduleConfig:
    only_for: ClassVar = (("decay_shape", "kind", ("wsd",)),)

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
    extend: Literal["rewarm", "continue"] = "rewarm"
    """What the rate does when a run resumes with another length (total_tokens). rewarm: it jumps to
    where a run that had this length from the start would be; continue: it goes on from where it is.
    Then warm-up ends as planned before, cosine and linear fall from there to the new end, and wsd
    stays there until its decay before the new end."""

    def problems(self) -> list[str]:
        if self.kind != "wsd" and self.decay_shape != "sqrt":
            return [f"decay_shape={self.decay_shape} is for kind=wsd: omit it"]
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            return [f"warmup + decay = {self.warmup + self.decay:g}: more than the whole run (1)"]
        return []


@dataclasses.dataclass(frozen=True)
class Extension:
    """The point at which a run got another length while its rate went on from where it was."""

    step: int
    """The steps that the run had taken."""
    share: float
    """The rate of the last of them, as a share of the peak."""
    warmup_steps: int
    """The steps of warm-up that were planned before."""


def warmup_steps(total_steps: int, c: ScheduleConfig, extension: Extension | None = None) -> int:
    """The steps over which the rate climbs."""
    if extension is not None:
        return extension.warmup_steps
    return math.ceil(c.warmup * total_steps)


def lr_at(
    step: int,
    total_steps: int,
    peak: float,
    c: ScheduleConfig,
    extension: Extension | None = None,
) -> float:
    """The learning rate of step `step` (0 is the first) of `total_steps`.

    Warm-up is linear and never zero; the last step's rate is `min_lr_ratio * peak`. After an
    extension, the rate falls from the one that the run had there.
    """
    low = c.min_lr_ratio * peak
    begin = warmup_steps(total_steps, c, extension)  # of the fall, where the rate is `peak`
    if step < begin:
        return peak * (step + 1) / begin
    if extension is not None and extension.step > begin:
        begin, peak = extension.step - 1, extension.share * peak
    decay_steps = total_steps - begin
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
