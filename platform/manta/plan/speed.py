"""How fast a run will train: measured by a probe or a calibration, or by a stated MFU."""

import dataclasses
import math
from typing import Literal

from manta.errors import MantaError
from manta.model.cost import flops_per_token
from manta.model.memory import Setup
from manta.plan import calibration, work
from manta.plan.machines import Machine
from manta.plan.probe import Probed
from manta.train.settings import PretrainConfig

Source = Literal["probe", "calibration", "mfu"]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of a run's parts."""

    source: Source
    text: str
    """The source of the seconds, and what is doubtful about them."""
    step_seconds: float
    evaluated_token_seconds: float
    """Seconds of an evaluation, for each token of a worker's share."""
    sample_seconds: float | None
    """Seconds to complete all prompts once; None: not known."""


def of_probe(found: Probed) -> Speed:
    text = f"{found.steps} steps on this machine, median {found.step_seconds:.3f} s"
    if found.busy > 1.1:
        text += f"; the machine was busy (wall time {found.busy:.2f} times its threads' CPU time)"
        if found.quiet_step_seconds is not None:
            text += f", and alone would take {found.quiet_step_seconds:.3f} s"
    return Speed(
        "probe", text, found.step_seconds, found.evaluated_token_seconds, found.sample_seconds
    )


def of_mfu(c: PretrainConfig, s: Setup, mfu: float, peak: float) -> Speed:
    """The speed of an MFU. An evaluation's pass is reckoned as a third of a training pass."""
    rate = mfu * peak / flops_per_token(s.model, c.sequence_length, c.trainable, c.lora)
    step = c.tokens_per_batch / (rate * c.most_workers)
    text = f"mfu={mfu:g} of {peak / 1e12:,.3g} TFLOP/s a device"
    return Speed("mfu", text, step, 1 / (3 * rate), None)


def of_calibration(
    c: PretrainConfig, s: Setup, machine: Machine, home: str
) -> tuple[Speed | None, str]:
    """The speed by the home's calibration; None, with the reason, if it has none for this run, is
    damaged, or is another machine's."""
    command = calibration.MEASURE
    command += f" num_workers={c.most_workers}" if c.most_workers > 1 else ""
    command += f" gpus_per_worker={c.gpus_per_worker}" if c.gpus_per_worker else ""
    command += f" threads_per_worker={c.threads_per_worker}" if c.threads_per_worker else ""
    if c.dtype != "auto":
        command += f" dtype={c.dtype}"
    try:
        found = calibration.load(home)
    except MantaError as e:
        return None, str(e)
    if found is None:
        return None, f"this machine is not calibrated: {command}"
    if s.model.is_recurrent or c.document_mask:
        what = "LSTMs" if s.model.is_recurrent else "document_mask"
        return None, f"the calibration does not cover {what}: give probe=20"
    layout = found.find(c.most_workers, machine.device, machine.dtype)
    if layout is None:
        has = ", ".join(f"{x.workers} x {x.device}, {x.dtype}" for x in found.layouts)
        return None, (
            f"the calibration has no {c.most_workers} x {machine.device}, {machine.dtype} (it has "
            f"{has}): {command}"
        )
    size = s.micro_batch_size
    once = work.of_micro_batch(c, s.model, size, s.dtype, s.device)
    sampled = dataclasses.replace(c, seq_len=1, tokens_per_batch=c.most_workers)
    count = len(c.sample.prompts)
    one_token = work.of_micro_batch(sampled, s.model, max(1, count), s.dtype, s.device)
    text = (
        f"calibration of {layout.measured[:10]}, {layout.workers} x {layout.device}, "
        f"{layout.dtype}; it misses its own shapes by {layout.median_error:.0%} in the median, "
        f"{layout.worst_error:.0%} at worst"
    )
    by_cpu_time = (layout.workers, layout.device) == (1, "CPU, 1 threads")
    if layout.busy > 1.1 and not by_cpu_time:
        text += f"; the machine was busy then ({layout.busy:.2f} times its CPU time)"
    if s.compiled:
        text += "; the run is compiled, which the calibration is not"
    if found.machine.torch != calibration.here().torch:
        text += f"; measured with torch {found.machine.torch}"
    forward = layout.forward
    made = Speed(
        "calibration",
        text,
        calibration.seconds(layout.step, work.of_step(c, s.model, size, s.dtype, s.device)),
        calibration.seconds(forward, once) / (size * c.sequence_length),
        c.sample.tokens * calibration.seconds(forward, one_token) if count else 0.0,
    )
    if not math.isfinite(made.step_seconds) or made.step_seconds <= 0:
        return None, f"the calibration gives no time for this run: measure again: {command}"
    return made, ""
