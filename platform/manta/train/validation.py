"""Val loss and bits per byte while a run trains."""

import gc

import numpy as np
import torch
import torch.distributed as dist

from manta.train.checkpoints.checkpoint import TrainState
from manta.train.meter import figures_line
from manta.train.objectives.next_token import Batch, NextToken
from manta.train.run import Run
from manta.train.settings import TrainConfig


def validate(run: Run) -> dict[str, float]:
    """Measures val loss (nats per token) and bits per byte over all ranks; logs and returns them.

    Also decides on early stopping."""
    state, c = run.state, run.config
    with run.ledger.timing("evaluation"):
        sums = {name: measure(run, batches) for name, batches in run.val.items()}
    metrics = metrics_of(sums, run.objective, state, c)
    loss = state.val_loss = metrics["val_loss"]
    if state.best_val_loss is None or loss < state.best_val_loss:
        state.best_val_loss, state.evals_since_best = loss, 0
    else:
        state.evals_since_best += 1
    state.stopped_early = c.eval.patience is not None and state.evals_since_best >= c.eval.patience
    if run.logbook is not None:
        run.logbook.log_metrics([metrics])
        found = run.objective.val_figures(added(sums))
        line = figures_line({f"val {name}": value for name, value in found.items()})
        if len(sums) > 1:
            line += " | " + ", ".join(f"{name} {metrics[f'val_loss/{name}']:.4f}" for name in sums)
        run.logbook.say(f"step {state.step}/{c.total_steps} | {line}")
        warning = run.objective.warning(added(sums))
        if warning is not None and not run.is_warned:
            run.is_warned = True
            run.logbook.say(f"step {state.step}: {warning}")
        if state.stopped_early:
            run.logbook.say(
                f"stopping early: val loss has not improved on {state.best_val_loss:.4f} for "
                f"{state.evals_since_best} evaluations (eval.patience)"
            )
        run.logbook.sync(curve=_title(run) if state.step else None)  # (no curve has one point)
    run.report(metrics)
    gc.collect()
    return metrics


def added(sums: dict[str, np.ndarray]) -> np.ndarray:
    """The sums over all datasets."""
    return np.sum(list(sums.values()), axis=0)


def metrics_of(
    sums: dict[str, np.ndarray], objective: NextToken, state: TrainState, c: TrainConfig
) -> dict[str, float]:
    """The numbers of an evaluation's record, from the objective's sums of each dataset, by name."""
    metrics: dict[str, float] = {"step": state.step, "tokens": c.tokens_before(state.step)}
    parts = {"": added(sums)}
    if len(sums) > 1:
        parts |= {f"/{name}": part for name, part in sums.items()}
    for suffix, part in parts.items():
        for name, value in objective.val_figures(part).items():
            metrics[f"val_{name}{suffix}"] = value
    return metrics | {"train_seconds": state.train_seconds}


def measure(run: Run, batches: list[Batch]) -> np.ndarray:
    """The objective's sums over these batches of the val split, over all ranks."""
    sums: torch.Tensor | None = None
    with run.engine.evaluating():
        for batch in batches:
            tokens, targets = batch.to(run.device.torch_device)
            found = run.objective.sums(run.engine, tokens, targets)
            sums = found if sums is None else sums + found
            run.watchdog.beat()
    assert sums is not None, "every rank has a batch of each val split"
    dist.all_reduce(sums)
    return sums.cpu().numpy()


def _title(run: Run) -> str:
    best = run.state.best_val_loss
    name = run.folder.rpartition("/")[2]
    return f"{name}: best val loss {best:.3f}" if best is not None else name
