"""The training loop. There is no Ray in it: batches come in, `say` and `report` go out.

It reads top to bottom: evaluate, sample, step, log, evaluate, save. Every rank runs it alike.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from manta.config import Count, Natural, NonNegativeFloat, Seed, config
from manta.model.cost import flops_per_token
from manta.model.generate import generate
from manta.model.gpt import IGNORED, ModelConfig
from manta.text.tokenizer import Tokenizer
from manta.train import checkpoint, engine
from manta.train.checkpoint import TrainState
from manta.train.device import Device
from manta.train.logbook import Logbook, duration
from manta.train.optimizer import OptimizerConfig
from manta.train.schedule import ScheduleConfig, lr_at

MAX_DEFAULT_MICRO_BATCH = 16


@config
class EvalConfig:
    every: Count = 50
    """Steps between measurements of val loss and bits per byte; also at step 0 and at the end."""
    tokens: Count = 65536
    """Tokens of the val split to measure on, the same each time."""
    patience: Count | None = None
    """Stop early when val loss has not improved for so many evaluations; null: never."""


@config
class SampleConfig:
    prompts: tuple[str, ...] = ("import os\n", "def read(path):\n", "The ")
    """Texts to complete at step 0, along the way, and at the end."""
    every: Natural = 0
    """Steps between samples along the way; 0: at step 0 and at the end only."""
    tokens: Count = 48
    """Tokens to complete each prompt with."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature; 0: always the likeliest token."""
    top_k: Count | None = 50
    """Sample among so many likeliest tokens; null: all."""


@config
class CheckpointConfig:
    every: Count = 100
    """Steps between checkpoints; one is also saved at the end."""
    keep: Count = 2
    """Newest checkpoints to keep."""


@config
class TrainConfig:
    """What the loop needs to know, wherever it runs."""

    seed: Seed = 1337
    """Of the weights, the order of the data, dropout and samples."""
    total_tokens: Count = 1_024_000
    """Length of the run, in tokens; rounded up to whole batches."""
    tokens_per_batch: Count = 2048
    """Tokens of one optimizer step, over all workers."""
    seq_len: Count | None = None
    """Tokens in a training sequence; null: the model's context_length."""
    micro_batch_size: Count | None = None
    """Sequences that a worker computes at once; gradient accumulation follows from it. null: the
    largest number up to 16 that divides its share of the batch."""
    num_workers: Count = 1
    """Data-parallel workers; the batch is split over them."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: what is sharded over the workers. 0: nothing; 1: optimizer state; 2: and
    gradients; 3: and weights."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the matrix products (weights stay fp32). auto: bf16 where a probe finds it fast."""
    log_every: Count = 10
    """Steps between lines; metrics.jsonl has every step."""
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def problems(self) -> list[str]:
        found = []
        context = self.model.context_length
        if self.sequence_length > context:
            found.append(
                f"seq_len={self.seq_len} is beyond the model's context: use at most {context}, or "
                f"set model.context_length={self.seq_len}"
            )
        unit = self.sequence_length * self.num_workers * (self.micro_batch_size or 1)
        if self.tokens_per_batch % unit:
            below = self.tokens_per_batch // unit * unit
            above = below + unit
            parts = f"seq_len {self.sequence_length} x num_workers {self.num_workers}" + (
                f" x micro_batch_size {self.micro_batch_size}" if self.micro_batch_size else ""
            )
            found.append(
                f"tokens_per_batch={self.tokens_per_batch} does not divide by {parts} = {unit}; "
                f"nearest that do: {f'{below} and ' if below else ''}{above}"
            )
        return found

    @property
    def sequence_length(self) -> int:
        return self.seq_len or self.model.context_length

    @property
    def sequences_per_batch(self) -> int:
        return self.tokens_per_batch // self.sequence_length

    @property
    def sequences_per_worker(self) -> int:
        return self.sequences_per_batch // self.num_workers

    @property
    def micro_batch(self) -> int:
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        share = self.sequences_per_worker
        return max(n for n in range(1, MAX_DEFAULT_MICRO_BATCH + 1) if share % n == 0)

    @property
    def grad_accum_steps(self) -> int:
        return self.sequences_per_worker // self.micro_batch

    @property
    def total_steps(self) -> int:
        return math.ceil(self.total_tokens / self.tokens_per_batch)

    def derived(self) -> dict[str, Any]:
        """Values that follow from the keys, shown by --dry-run."""
        return {
            "steps": self.total_steps,
            "sequence length": self.sequence_length,
            "sequences per batch": self.sequences_per_batch,
            "micro batch size": self.micro_batch,
            "gradient accumulation steps": self.grad_accum_steps,
        }


@dataclasses.dataclass
class Run:
    """What the loop works on. `model` has its vocabulary; `batches` are this rank's micro batches
    from step `state.step` on, (B, T + 1) token ids each; `val` its share of the val tokens."""

    folder: str
    config: TrainConfig
    model: ModelConfig
    tokenizer: Tokenizer
    device: Device
    engine: Any
    state: TrainState
    batches: Iterator[np.ndarray]
    val: list[np.ndarray]
    logbook: Logbook | None
    """On rank 0 only."""
    report: Callable[[dict[str, float]], None] = lambda metrics: None
    """Called on every rank alike with each evaluation's metrics."""
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Steps not yet logged; their losses are still on the device."""


def train(run: Run, until: int | None = None) -> TrainState:
    """Trains from `run.state.step` to the end, and saves; or to step `until`, and leaves the end
    (the last samples and checkpoint) to a later call."""
    c, state = run.config, run.state
    end = c.total_steps if until is None else until
    if state.step == 0:
        evaluate(run)
        sample(run)
    meter = Meter(run)
    while state.step < end and not state.stopped_early:
        step = state.step
        lr = lr_at(step, c.total_steps, c.optimizer.lr, c.schedule)
        engine.set_lr(run.engine, lr)
        if run.model.dropout:
            torch.manual_seed(_mix(c.seed, step, dist.get_rank()))
        losses, norm = [], None
        for _ in range(c.grad_accum_steps):
            tokens, targets = to_device(meter.next_batch(), run.device)
            loss = run.engine(tokens, targets)
            norm = engine.backward_and_step(run.engine, loss, c.optimizer.grad_clip)
            losses.append(loss.detach())
        state.step += 1
        is_last = state.step == c.total_steps
        run.records.append(meter.record(losses, norm, lr))

        if state.step == 1 or state.step % c.log_every == 0 or state.step == end:
            log(run, meter)
        if state.step % c.eval.every == 0 or is_last:
            evaluate(run)
        if c.sample.every and state.step % c.sample.every == 0 and not is_last:
            sample(run)
        if state.step % c.checkpoint.every == 0 and not is_last:
            save(run)
        meter.skip()
    if until is None:
        log(run, meter)
        sample(run)
        save(run)
    return state


def to_device(batch: np.ndarray, device: Device) -> tuple[Tensor, Tensor]:
    """(B, T + 1) ids -> inputs and targets, (B, T) int64 each, on the device."""
    tokens = torch.from_numpy(batch.astype(np.int64))
    if device.torch_device.type == "cuda":
        tokens = tokens.pin_memory().to(device.torch_device, non_blocking=True)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Meter:
    """Times steps; what lies between `record` and `skip` (logging, evaluation, saving) is no
    part of a step."""

    def __init__(self, run: Run):
        self._run = run
        c = run.config
        flops = flops_per_token(run.model, c.sequence_length) * c.tokens_per_batch
        self._peak_seconds = flops / (run.device.peak * c.num_workers)
        self._waited = 0.0
        self._started = time.perf_counter()

    def next_batch(self) -> np.ndarray:
        asked = time.perf_counter()
        batch = next(self._run.batches)
        self._waited += time.perf_counter() - asked
        return batch

    def record(
        self, losses: list[Tensor], grad_norm: Tensor | float | None, lr: float
    ) -> dict[str, Any]:
        """The step that just ended. Its loss and norm stay on the device until they are logged, so
        that the step waits for nothing."""
        now = time.perf_counter()
        seconds = now - self._started
        waited = self._waited
        self._started, self._waited = now, 0.0
        state, c = self._run.state, self._run.config
        state.train_seconds += seconds
        return {
            "step": state.step,
            "tokens": state.step * c.tokens_per_batch,
            "loss": torch.stack(losses).mean(),
            "lr": lr,
            "grad_norm": grad_norm,
            "step_seconds": seconds,
            "tokens_per_second": c.tokens_per_batch / seconds,
            "mfu": self._peak_seconds / seconds,
            "data_wait_seconds": waited,
        }

    def skip(self) -> None:
        self._started = time.perf_counter()


def log(run: Run, meter: Meter) -> None:
    """Writes the steps since the last call, with losses averaged over all ranks, and one line: the
    loss in it is the mean over those steps."""
    if not run.records:
        return
    losses = torch.stack([record["loss"] for record in run.records])
    dist.all_reduce(losses)
    records = run.records
    run.records = []
    if run.logbook is None:
        return
    for record, loss in zip(records, (losses / dist.get_world_size()).tolist(), strict=True):
        record["loss"], record["grad_norm"] = loss, float(record["grad_norm"])
    run.logbook.metrics(records)
    c, last = run.config, records[-1]
    seconds = sum(r["step_seconds"] for r in records)
    waited = sum(r["data_wait_seconds"] for r in records)
    speed = len(records) * c.tokens_per_batch / seconds
    left = (c.total_steps - last["step"]) * c.tokens_per_batch / speed
    mean = sum(r["loss"] for r in records) / len(records)
    run.logbook.say(
        f"step {last['step']}/{c.total_steps} | loss {mean:.4f} | lr {last['lr']:.2e} | "
        f"grad norm {last['grad_norm']:.2f} | {speed:,.0f} tok/s | "
        f"MFU {sum(r['mfu'] * r['step_seconds'] for r in records) / seconds:.1%} | "
        f"data wait {waited / seconds:.1%} | ETA {duration(left)}"
    )


def evaluate(run: Run) -> dict[str, float]:
    """Val loss (nats per token) and bits per byte, over all ranks; decides on early stopping."""
    loss, bpb = measure(run)
    state, c = run.state, run.config
    metrics = {
        "step": state.step,
        "tokens": state.step * c.tokens_per_batch,
        "val_loss": loss,
        "val_bpb": bpb,
        "train_seconds": state.train_seconds,
    }
    if state.best_val_loss is None or loss < state.best_val_loss:
        state.best_val_loss, state.evals_since_best = loss, 0
    else:
        state.evals_since_best += 1
    state.stopped_early = c.eval.patience is not None and state.evals_since_best >= c.eval.patience
    if run.logbook is not None:
        run.logbook.metrics([metrics])
        run.logbook.say(
            f"step {state.step}/{c.total_steps} | val loss {loss:.4f} | val bpb {bpb:.4f}"
        )
        if state.stopped_early:
            run.logbook.say(
                f"stopping early: val loss has not improved on {state.best_val_loss:.4f} for "
                f"{state.evals_since_best} evaluations (eval.patience)"
            )
        run.logbook.sync(curve=_title(run))
    run.report(metrics)
    return metrics


def measure(run: Run) -> tuple[float, float]:
    """Mean loss over the val targets, and the bits that each byte of their text costs.

    End-of-text targets count in the loss, and not in bits per byte: they stand for no text.
    """
    token_bytes = torch.from_numpy(run.tokenizer.token_bytes()).to(run.device.torch_device)
    sums = torch.zeros(4, dtype=torch.float64, device=run.device.torch_device)
    with engine.evaluating(run.engine) as model:
        for batch in run.val:
            tokens, targets = to_device(batch, run.device)
            nats = model(tokens.clamp(min=0), targets, reduction="none").double()
            counted = targets != IGNORED
            lengths = token_bytes[targets.clamp(min=0)] * counted
            sums += torch.stack(
                [nats.sum(), counted.sum(), nats[lengths > 0].sum(), lengths.sum()]
            ).to(sums.dtype)
    dist.all_reduce(sums)
    total, count, text_nats, text_bytes = sums.tolist()
    return total / count, text_nats / math.log(2) / max(text_bytes, 1)


def sample(run: Run) -> None:
    """Completes the prompts; all ranks compute (at ZeRO stage 3 they must), rank 0 writes."""
    c = run.config.sample
    with engine.evaluating(run.engine):
        model = run.engine.module
        with torch.autocast(
            run.device.torch_device.type, torch.bfloat16, enabled=run.device.dtype == "bf16"
        ):
            for index, prompt in enumerate(c.prompts):
                ids = run.tokenizer.encode(prompt) or [run.tokenizer.eot]
                new = generate(
                    model,
                    ids,
                    c.tokens,
                    temperature=c.temperature,
                    top_k=c.top_k,
                    stop=run.tokenizer.eot,
                    seed=_mix(run.config.seed, index),
                )
                text = run.tokenizer.decode(list(new))
                if run.logbook is not None:
                    run.logbook.sample(run.state.step, prompt, text)
                    shown = f"{prompt}\u2502{text}".replace("\n", "\u23ce")
                    run.logbook.say(f"step {run.state.step} sample: {shown}")


def save(run: Run) -> None:
    started = time.perf_counter()
    path = checkpoint.save(run.folder, run.engine, run.state, run.model, run.tokenizer)
    if run.logbook is not None:
        checkpoint.prune(run.folder, run.config.checkpoint.keep)
        run.logbook.sync(curve=_title(run))
        seconds = time.perf_counter() - started
        run.logbook.say(f"step {run.state.step} saved to {path} in {seconds:.1f}s")


def _title(run: Run) -> str:
    best = run.state.best_val_loss
    name = run.folder.rpartition("/")[2]
    return f"{name}: best val loss {best:.3f}" if best is not None else name


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
