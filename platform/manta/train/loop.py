"""The training loop, without Ray: it takes batches, and reports through `say` and `report`.

It reads from top to bottom: step, log, validate, sample, save. Every rank runs the same code.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from manta.model.generate import Sampling, generate_batch
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.faults.signals import Asked
from manta.train.meter import Meter
from manta.train.objectives.weights import weighted
from manta.train.run import Interrupted, Run
from manta.train.step.schedule import lr_at
from manta.train.validation import validate


def train(run: Run, until: int | None = None) -> TrainState:
    """Trains from `run.state.step` to the end, then samples and saves. With `until`, trains to that
    step and leaves the last samples and the last checkpoint to a later call. A run with `pause_at`
    ends at that step, where it is validated and saved, and can resume.

    Raises:
        Interrupted: the run was asked to stop or to move, and has saved.
        Rollback: the loss spiked, or too many steps were not taken: the run has to go back.
        CheckpointError: the last checkpoint could not be saved.
    """
    with no_garbage_collection():
        return _train(run, until)


def _train(run: Run, until: int | None) -> TrainState:
    c, state = run.config, run.state
    end = min(n for n in (c.total_steps, until, run.pause_at) if n is not None)
    if state.step == 0:
        validate(run)
        sample(run)
    meter = Meter(run)
    while state.step < end and not state.stopped_early:
        step = state.step
        share = lr_at(step, c.total_steps, 1.0, c.schedule, state.extension)
        lr = state.lr = run.engine.set_lr(share)
        if any(run.model.rates.values()):
            torch.manual_seed(_mix(c.seed, step, dist.get_rank()))
        figures: list[dict[str, torch.Tensor]] = []
        micro_batches = c.grad_accum_steps(step)
        run.engine.set_grad_accum_steps(micro_batches)
        with run.engine.casting_once():
            drawn = weighted(meter.next_batch, micro_batches, run.device.torch_device)
            for index, (batch, weight) in enumerate(drawn):
                tokens, targets = batch.to(run.device.torch_device)
                if step in run.passed_over:
                    continue
                found = run.objective.figures(run.engine, tokens, targets)
                if batch.units is not None:
                    found = {name: weight * value for name, value in found.items()}
                run.engine.backward(found["loss"], is_last=index == micro_batches - 1)
                figures.append({name: value.detach() for name, value in found.items()})
                run.watchdog.beat()
        state.step, state.val_loss = step + 1, None
        is_last = state.step == c.total_steps
        is_pause = state.step == run.pause_at and not is_last
        if figures:  # there are none if the step's tokens are passed over
            clip, limit = c.optimizer.grad_clip, run.detector.norm_limit
            norm = run.engine.step(clip, limit=limit)
            meter.record(figures, norm, lr)

        if state.step == 1 or state.step % c.log_every == 0 or state.step == end:
            meter.log()
        if state.step % c.eval.every == 0 or is_last or is_pause:
            validate(run)
        if c.sample.every and state.step % c.sample.every == 0 and not is_last:
            sample(run)
        asked = run.signals.agree(run.saver.asked())
        tokens_before, tokens_after = c.tokens_before(step), c.tokens_before(state.step)
        due = c.checkpoint.is_due(state.step, tokens_before, tokens_after)
        due = due or (bool(c.eval.suites) and state.step % c.eval.every == 0)
        is_leaving = bool(asked & (Asked.MOVE | Asked.STOP))
        if ((due or Asked.SAVE in asked) and not is_last) or is_leaving:
            meter.log()  # every saved step must be logged first, and checked for spikes
            save(run)
        if is_leaving:
            leave(run, asked)
        meter.restart()
    if until is None:
        meter.log()
        if state.val_loss is None:  # it paused at a step that an earlier start had saved
            validate(run)
        if state.step == c.total_steps or state.stopped_early:
            sample(run)
        save(run)
        finish(run)
    return state


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turns Python's garbage collection off; `validate` collects after each evaluation.

    Python collects cycles after a certain number of allocations. That stalls a step on one rank,
    and all other ranks wait for it."""
    if not gc.isenabled():  # a bench, which trains a few steps at a time, has turned it off
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


def sample(run: Run) -> None:
    """Completes the prompts. All ranks compute (at ZeRO stage 3 they must); rank 0 writes."""
    c = run.config.sample
    if not c.prompts:
        return
    tokenizer = run.tokenizer
    with (
        run.ledger.timing("evaluation"),
        run.engine.evaluating(),
        torch.autocast(
            run.device.torch_device.type, torch.bfloat16, enabled=run.device.dtype == "bf16"
        ),
    ):
        batch = generate_batch(
            run.engine.module,
            [run.objective.prompt(prompt) for prompt in c.prompts],
            c.tokens,
            seeds=[_mix(run.config.seed, index) for index in range(len(c.prompts))],
            sampling=Sampling(c.temperature, c.top_k, vocab_size=tokenizer.vocab_size),
            stop=tokenizer.ends,
        )
        new = []
        for tokens in batch:
            new.append(tokens)
            run.watchdog.beat()
    if run.logbook is None:
        return
    for index, prompt in enumerate(c.prompts):
        text = tokenizer.decode([tokens[index] for tokens in new if index in tokens])
        run.logbook.log_sample(run.state.step, prompt, text)
        shown = f"{prompt}\u2502{text}".replace("\n", "\u23ce")
        run.logbook.say(f"step {run.state.step} sample: {shown}")


def save(run: Run) -> None:
    """Saves a checkpoint: training waits for a copy, which is written while training continues.

    All steps must have been logged before. Then no step's record is lost if a later step fails, and
    no checkpoint has a loss spike in it."""
    if run.saver.last_step == run.state.step:
        return
    run.state.spikes = run.detector.state
    run.watchdog.beat()
    with run.ledger.timing("checkpoint"):
        run.saver.save(run.engine, run.state)
    run.watchdog.beat()
    if run.logbook is not None:
        run.logbook.sync()


def finish(run: Run) -> None:
    """Waits until everything is on the disk."""
    with run.ledger.timing("checkpoint"):
        run.saver.finish()
    run.ledger.write(last=True)


def leave(run: Run, asked: Asked) -> NoReturn:
    """Ends training early, once the last save is on the disk, so that no step is lost."""
    finish(run)
    raise Interrupted(asked)


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
