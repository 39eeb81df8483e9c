"""The training loop. There is no Ray in it: batches come in, `say` and `report` go out.

It reads top to bottom: evaluate, sample, step, log, evaluate, save. Every rank runs it alike.
"""

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from manta.data.fingerprint import fingerprint
from manta.data.order import stage_of
from manta.model.cost import flops_per_token
from manta.model.generate import generate_batch
from manta.model.gpt import IGNORED, ModelConfig
from manta.text.tokenizer import Tokenizer
from manta.train import engine
from manta.train.checkpoint import TrainState
from manta.train.device import Device
from manta.train.logbook import Logbook, duration
from manta.train.saver import Saver
from manta.train.schedule import lr_at
from manta.train.settings import TrainConfig


@dataclasses.dataclass
class Run:
    """What the loop works on. `model` has its vocabulary; `batches` are this rank's micro batches
    from step `state.step` on, (B, T + 1) token ids each; `val` its share of the val tokens of each
    dataset, by name."""

    folder: str
    config: TrainConfig
    model: ModelConfig
    tokenizer: Tokenizer
    device: Device
    engine: Any
    saver: Saver
    state: TrainState
    batches: Iterator[np.ndarray]
    val: dict[str, list[np.ndarray]]
    logbook: Logbook | None
    """On rank 0 only."""
    report: Callable[[dict[str, float]], None] = lambda metrics: None
    """Called on every rank alike with each evaluation's metrics."""
    log_fingerprint: bool = False
    """Put a fingerprint of each batch's tokens into its record."""
    may_skip: bool = False
    """The stream goes on without what is damaged: count those tokens."""
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Steps not yet logged; their losses are still on the device."""


def train(run: Run, until: int | None = None) -> TrainState:
    """Trains from `run.state.step` to the end, and saves; or to step `until`, and leaves the end
    (the last samples and checkpoint) to a later call."""
    with no_garbage_collection():
        return _train(run, until)


def _train(run: Run, until: int | None) -> TrainState:
    c, state = run.config, run.state
    end = c.total_steps if until is None else until
    if state.step == 0:
        evaluate(run)
        sample(run)
    meter = Meter(run)
    while state.step < end and not state.stopped_early:
        step = state.step
        share = lr_at(step, c.total_steps, 1.0, c.schedule)
        lr = engine.set_lr(run.engine, share)
        if run.model.dropout:
            torch.manual_seed(_mix(c.seed, step, dist.get_rank()))
        losses, norm = [], None
        micro_batches = c.grad_accum_steps(step)
        engine.set_grad_accum_steps(run.engine, micro_batches)
        for index in range(micro_batches):
            tokens, targets = to_device(meter.next_batch(), run.device)
            loss = run.engine(tokens, targets, documents=documents_of(run, tokens))
            norm = engine.backward_and_step(
                run.engine, loss, c.optimizer.grad_clip, is_last=index == micro_batches - 1
            )
            losses.append(loss.detach())
        state.step, state.val_loss = step + 1, None
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
        run.saver.finish()
    return state


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python looks for cycles whenever it has made so many objects, which stalls a step, and all
    ranks wait for the one that does. Here none is looked for but after each evaluation."""
    if not gc.isenabled():  # as in a bench, which trains a few steps at a time
        yield
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def to_device(batch: np.ndarray, device: Device) -> tuple[Tensor, Tensor]:
    """(B, T + 1) ids -> inputs and targets, (B, T) int64 each, on the device. Where an id is
    IGNORED, the target is too, and the input is some id."""
    tokens = torch.from_numpy(batch.astype(np.int64))
    if device.torch_device.type == "cuda":
        tokens = tokens.pin_memory().to(device.torch_device, non_blocking=True)
    return tokens[:, :-1].clamp(min=0), tokens[:, 1:].contiguous()


def documents_of(run: Run, tokens: Tensor) -> Tensor | None:
    """(B, T) which document of its sequence each input is in, if attention is to be masked by it.
    The end-of-text token opens a document: it is what a model is given to begin one with."""
    return (tokens == run.tokenizer.eot).cumsum(1) if run.config.document_mask else None


class Meter:
    """Times steps; what lies between `record` and `skip` (logging, evaluation, saving) is no
    part of a step."""

    def __init__(self, run: Run):
        self._run = run
        c = run.config
        flops = flops_per_token(run.model, c.sequence_length)
        self._peak_rate = run.device.peak * c.num_workers / flops
        self._waited = 0.0
        self._micro_batches = self._fingerprint = self._skipped = 0
        self._started = time.perf_counter()

    def next_batch(self) -> np.ndarray:
        asked = time.perf_counter()
        batch = next(self._run.batches)
        self._waited += time.perf_counter() - asked
        c = self._run.config
        if self._run.log_fingerprint:
            slots = stage_of(c.stages, self._run.state.step).sequences_per_batch // c.num_workers
            first = dist.get_rank() * slots + self._micro_batches * len(batch)
            self._fingerprint += fingerprint(batch, first)
        if batch.dtype.kind == "i":  # only a stream that skips what is damaged has negative ids
            self._skipped += int((batch[:, 1:] < 0).sum())
        self._micro_batches += 1
        return batch

    def record(
        self, losses: list[Tensor], grad_norm: Tensor | float | None, lr: float
    ) -> dict[str, Any]:
        """The step that just ended. Its loss and norm stay on the device until they are logged, so
        that the step waits for nothing."""
        now = time.perf_counter()
        seconds = now - self._started
        state, c = self._run.state, self._run.config
        state.train_seconds += seconds
        total = c.tokens_before(state.step)
        speed = (total - c.tokens_before(state.step - 1)) / seconds
        record = {
            "step": state.step,
            "tokens": total,
            "loss": torch.stack(losses).mean(),
            "lr": lr,
            "grad_norm": grad_norm,
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "mfu": speed / self._peak_rate,
            "data_wait_seconds": self._waited,
            "fingerprint": self._fingerprint % 2**64,
            "skipped_tokens": self._skipped,
        }
        self._started, self._waited = now, 0.0
        self._micro_batches = self._fingerprint = self._skipped = 0
        return record

    def skip(self) -> None:
        self._started = time.perf_counter()


def log(run: Run, meter: Meter) -> None:
    """Writes the steps since the last call, with what all ranks did, and one line: the loss in it
    is the mean over those steps."""
    if not run.records:
        return
    records, run.records = run.records, []
    losses = torch.stack([record["loss"] for record in records])
    dist.all_reduce(losses)
    # Two's complement: the sum of int64s wraps as the fingerprint does.
    counts = np.array([[r["fingerprint"], r["skipped_tokens"]] for r in records], dtype=np.uint64)
    totals = torch.from_numpy(counts.view(np.int64)).to(losses.device)
    if run.log_fingerprint or run.may_skip:
        dist.all_reduce(totals)
    if run.logbook is None:
        return
    means = (losses / dist.get_world_size()).tolist()
    for record, loss, (mark, skipped) in zip(records, means, totals.tolist(), strict=True):
        record["loss"], record["grad_norm"] = loss, float(record["grad_norm"])
        record["fingerprint"], record["skipped_tokens"] = f"{mark % 2**64:016x}", skipped
        if not run.log_fingerprint:
            del record["fingerprint"]
        if not run.may_skip:
            del record["skipped_tokens"]
    run.logbook.metrics(records)
    c, last = run.config, records[-1]
    seconds = sum(r["step_seconds"] for r in records)
    waited = sum(r["data_wait_seconds"] for r in records)
    speed = (last["tokens"] - c.tokens_before(records[0]["step"] - 1)) / seconds
    left = (c.tokens_before(c.total_steps) - last["tokens"]) / speed
    mean = sum(r["loss"] for r in records) / len(records)
    skipped = sum(r.get("skipped_tokens", 0) for r in records)
    run.logbook.say(
        f"step {last['step']}/{c.total_steps} | loss {mean:.4f} | lr {last['lr']:.2e} | "
        f"grad norm {last['grad_norm']:.2f} | {speed:,.0f} tok/s | "
        f"MFU {sum(r['mfu'] * r['step_seconds'] for r in records) / seconds:.1%} | "
        f"data wait {waited / seconds:.1%} | ETA {duration(left)}"
        + (f" | {skipped:,} tokens skipped" if skipped else "")
    )


def evaluate(run: Run) -> dict[str, float]:
    """Val loss (nats per token) and bits per byte, over all ranks; decides on early stopping."""
    state, c = run.state, run.config
    sums = {name: measure(run, batches) for name, batches in run.val.items()}
    metrics: dict[str, float] = {"step": state.step, "tokens": c.tokens_before(state.step)}
    total = sum(sums.values(), Sums())
    metrics |= {"val_loss": total.loss, "val_bpb": total.bits_per_byte}
    if len(sums) > 1:
        for name, part in sums.items():
            metrics |= {f"val_loss/{name}": part.loss, f"val_bpb/{name}": part.bits_per_byte}
    metrics["train_seconds"] = state.train_seconds
    loss = state.val_loss = total.loss
    if state.best_val_loss is None or loss < state.best_val_loss:
        state.best_val_loss, state.evals_since_best = loss, 0
    else:
        state.evals_since_best += 1
    state.stopped_early = c.eval.patience is not None and state.evals_since_best >= c.eval.patience
    if run.logbook is not None:
        run.logbook.metrics([metrics])
        parts = ", ".join(f"{name} {part.loss:.4f}" for name, part in sums.items())
        run.logbook.say(
            f"step {state.step}/{c.total_steps} | val loss {loss:.4f} | "
            f"val bpb {total.bits_per_byte:.4f}" + (f" | {parts}" if len(sums) > 1 else "")
        )
        if state.stopped_early:
            run.logbook.say(
                f"stopping early: val loss has not improved on {state.best_val_loss:.4f} for "
                f"{state.evals_since_best} evaluations (eval.patience)"
            )
        run.logbook.sync(curve=_title(run))
    run.report(metrics)
    gc.collect()
    return metrics


@dataclasses.dataclass(frozen=True)
class Sums:
    """Over some val targets: nats and count of all, nats and bytes of those that stand for text.

    End-of-text targets count in the loss, and not in bits per byte: they stand for no text.
    """

    nats: float = 0.0
    count: float = 0.0
    text_nats: float = 0.0
    text_bytes: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Sums(*(a + b for a, b in pairs))

    @property
    def loss(self) -> float:
        return self.nats / self.count

    @property
    def bits_per_byte(self) -> float:
        return self.text_nats / math.log(2) / max(self.text_bytes, 1)


def measure(run: Run, batches: list[np.ndarray]) -> Sums:
    """What the val targets in these batches cost, over all ranks."""
    token_bytes = torch.from_numpy(run.tokenizer.token_bytes()).to(run.device.torch_device)
    sums = torch.zeros(4, dtype=torch.float64, device=run.device.torch_device)
    with engine.evaluating(run.engine) as model:
        for batch in batches:
            tokens, targets = to_device(batch, run.device)
            documents = documents_of(run, tokens)
            nats = model(tokens, targets, reduction="none", documents=documents).double()
            counted = targets != IGNORED
            lengths = token_bytes[targets.clamp(min=0)] * counted
            sums += torch.stack(
                [nats.sum(), counted.sum(), nats[lengths > 0].sum(), lengths.sum()]
            ).to(sums.dtype)
    dist.all_reduce(sums)
    return Sums(*sums.tolist())


def sample(run: Run) -> None:
    """Completes the prompts; all ranks compute (at ZeRO stage 3 they must), rank 0 writes."""
    c = run.config.sample
    if not c.prompts:
        return
    tokenizer = run.tokenizer
    with (
        engine.evaluating(run.engine),
        torch.autocast(
            run.device.torch_device.type, torch.bfloat16, enabled=run.device.dtype == "bf16"
        ),
    ):
        batch = generate_batch(
            run.engine.module,
            [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in c.prompts],
            c.tokens,
            seeds=[_mix(run.config.seed, index) for index in range(len(c.prompts))],
            temperature=c.temperature,
            top_k=c.top_k,
            stop=tokenizer.eot,
        )
        new = list(batch)
    if run.logbook is None:
        return
    for index, prompt in enumerate(c.prompts):
        text = tokenizer.decode([tokens[index] for tokens in new if index in tokens])
        run.logbook.sample(run.state.step, prompt, text)
        shown = f"{prompt}\u2502{text}".replace("\n", "\u23ce")
        run.logbook.say(f"step {run.state.step} sample: {shown}")


def save(run: Run) -> None:
    run.saver.save(run.engine, run.state)
    if run.logbook is not None:
        run.logbook.sync()


def _title(run: Run) -> str:
    best = run.state.best_val_loss
    name = run.folder.rpartition("/")[2]
    return f"{name}: best val loss {best:.3f}" if best is not None else name


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
