"""Times training steps, logs them, and looks for loss spikes."""

import math
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from manta.data.fingerprint import fingerprint
from manta.data.order import stage_of
from manta.errors import TrainingError
from manta.model.cost import flops_per_token
from manta.model.targets import IGNORED
from manta.train.objectives.next_token import Batch, Figures
from manta.train.records.logbook import Logbook, duration
from manta.train.run import Rollback, Run
from manta.train.step.device import Device, gpu_memory, host_memory, reserved_memory


class Meter:
    """Times steps and logs them. The time between `record` and `restart` (logging, evaluation,
    saving) does not count as part of a step."""

    def __init__(self, run: Run):
        self.run = run
        self._records: list[dict[str, Any]] = []  # steps to log; their losses are on the device
        c = run.config
        flops = flops_per_token(run.model, c.sequence_length, c.trainable, c.lora)
        self._peak_rate = run.device.peak * c.workers / flops
        self._measured_rate = run.device.measured * c.workers / flops
        self._waited = 0.0
        self._micro_batches = self._fingerprint = self._skipped = 0
        self._started = time.perf_counter()

    def next_batch(self) -> Batch:
        asked = time.perf_counter()
        batch = next(self.run.batches)
        self._waited += time.perf_counter() - asked
        c = self.run.config
        if self.run.log_fingerprint:
            slots = stage_of(c.stages, self.run.state.step).sequences_per_batch // c.workers
            first = dist.get_rank() * slots + self._micro_batches * len(batch.ids)
            self._fingerprint += fingerprint(batch.ids, first)
        if self.run.may_skip:
            self._skipped += int((batch.ids[:, 1:] == IGNORED).sum())
        self._micro_batches += 1
        return batch

    def record(self, figures: list[Figures], grad_norm: Tensor | float | None, lr: float) -> None:
        """Keeps the record of the step that just ended, with the figures of each of its micro
        batches. Figures and norm stay on the device until they are logged, so that the step does
        not wait for them."""
        now = time.perf_counter()
        seconds = now - self._started
        state, c = self.run.state, self.run.config
        state.train_seconds += seconds
        self.run.ledger.add("productive", seconds - self._waited)
        self.run.ledger.add("data wait", self._waited)
        total = c.tokens_before(state.step)
        speed = (total - c.tokens_before(state.step - 1)) / seconds
        record = {
            "step": state.step,
            "tokens": total,
            **{name: torch.stack([f[name] for f in figures]).mean() for name in figures[0]},
            "lr": lr,
            "grad_norm": grad_norm,
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "mfu": speed / self._peak_rate,
            "mfu_of_measured": speed / self._measured_rate,
            "data_wait_seconds": self._waited,
            "fingerprint": self._fingerprint % 2**64,
            "skipped_tokens": self._skipped,
        }
        self._records.append(record)
        self.restart()

    def restart(self) -> None:
        """Starts the clock of the next step."""
        self._started, self._waited = time.perf_counter(), 0.0
        self._micro_batches = self._fingerprint = self._skipped = 0

    def log(self) -> None:
        """Writes the records of the steps since the last call, combined over all ranks, and one
        line with the mean loss of those steps.

        Raises:
            Rollback, TrainingError: see `_look_for_spikes`.
        """
        if not self._records:
            return
        run, records = self.run, self._records
        self._records = []
        names = run.objective.logged
        figures = torch.stack([record[name] for record in records for name in names])
        dist.all_reduce(figures)
        # A sum of int64s wraps modulo 2^64 (two's complement), just as the fingerprint does.
        counts = [[record["fingerprint"], record["skipped_tokens"]] for record in records]
        signed = np.array(counts, dtype=np.uint64).view(np.int64)
        totals = torch.from_numpy(signed).to(figures.device)
        if run.log_fingerprint or run.may_skip:
            dist.all_reduce(totals)
        means = (figures / dist.get_world_size()).view(len(records), len(names)).tolist()
        for record, values in zip(records, means, strict=True):
            record.update(zip(names, values, strict=True), grad_norm=float(record["grad_norm"]))
        if run.logbook is not None:
            _write(run, run.logbook, records, totals)
        run.publish(of_rank(run.device.torch_device, records[-1]))
        run.ledger.write()
        _look_for_spikes(run, records)


def of_rank(device: torch.device, record: dict[str, Any]) -> dict[str, float]:
    """A rank's own figures, to be published as metrics, with its record of a step."""
    return {
        "host_memory_bytes": host_memory(),
        "device_memory_bytes": reserved_memory(device),
        "rank_data_wait_seconds": record["data_wait_seconds"],
    }


def _write(
    run: Run,
    logbook: Logbook,
    records: list[dict[str, Any]],
    totals: Tensor,
) -> None:
    goodput, memory = run.ledger.goodput, gpu_memory(run.device.torch_device)
    for record, (mark, skipped) in zip(records, totals.tolist(), strict=True):
        record.update(memory, goodput=goodput)
        record["fingerprint"], record["skipped_tokens"] = f"{mark % 2**64:016x}", skipped
        if not run.log_fingerprint:
            del record["fingerprint"]
        if not run.may_skip:
            del record["skipped_tokens"]
    logbook.log_metrics(records)
    c, last = run.config, records[-1]
    seconds = sum(r["step_seconds"] for r in records)
    waited = sum(r["data_wait_seconds"] for r in records)
    speed = (last["tokens"] - c.tokens_before(records[0]["step"] - 1)) / seconds
    left = (c.tokens_before(c.total_steps) - last["tokens"]) / speed
    means = {n: sum(r[n] for r in records) / len(records) for n in run.objective.logged}
    mfu = sum(r["mfu"] * r["step_seconds"] for r in records) / seconds
    skipped = sum(r.get("skipped_tokens", 0) for r in records)
    logbook.say(
        f"step {last['step']}/{c.total_steps} | {figures_line(means)} | lr {last['lr']:.2e} | "
        f"grad norm {last['grad_norm']:.2f} | {speed:,.0f} tok/s | "
        f"{_utilisation(run.device, mfu)} | data wait {waited / seconds:.1%} | "
        f"ETA {duration(left)}" + (f" | {skipped:,} tokens skipped" if skipped else "")
    )


def figures_line(figures: dict[str, float]) -> str:
    """An objective's figures as text, in their order."""
    return " | ".join(f"{name} {value:.4f}" for name, value in figures.items())


def _utilisation(device: Device, mfu: float) -> str:
    """The MFU as text. If it is relative to a data sheet's peak, also the share of the speed that a
    matrix product reached on this very GPU, at its clocks, its power and its temperature."""
    if device.data_sheet is None:
        return f"MFU {mfu:.1%}"
    return f"MFU {mfu:.1%} ({mfu * device.peak / device.measured:.1%} of the measured peak)"


def _look_for_spikes(run: Run, records: list[dict[str, Any]]) -> None:
    """Checks the steps' losses and norms. All ranks see the same numbers, so they decide alike.

    Raises:
        Rollback: the run has to go back, and `spikes.action` allows it.
        TrainingError: too many steps in a row were not taken, and the run may not go back.
    """
    action = run.config.spikes.action
    for record in records:
        anomaly = run.detector.look(record["step"], record["loss"], record["grad_norm"])
        if anomaly is None:
            continue
        if action == "rollback" and anomaly.kind != "skipped":
            raise Rollback(anomaly)
        if anomaly.kind == "stuck":
            raise TrainingError(f"{anomaly.why}: lower optimizer.lr, or set spikes.action=rollback")
        if run.logbook is not None:
            taken = math.isfinite(record["grad_norm"])
            run.logbook.say(anomaly.why + ("" if taken else "; that step was not taken"))
