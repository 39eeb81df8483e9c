"""Val loss and bits per byte while a run trains."""

import dataclasses
import gc
import math

import numpy as np
import torch
import torch.distributed as dist

from manta.model.gpt import IGNORED
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.run import Run, to_device
from manta.train.settings import TrainConfig


def validate(run: Run) -> dict[str, float]:
    """Measures val loss (nats per token) and bits per byte over all ranks; logs and returns them.

    Also decides on early stopping."""
    state, c = run.state, run.config
    with run.ledger.timing("evaluation"):
        sums = {name: measure(run, batches) for name, batches in run.val.items()}
    metrics = metrics_of(sums, state, c)
    loss = state.val_loss = metrics["val_loss"]
    if state.best_val_loss is None or loss < state.best_val_loss:
        state.best_val_loss, state.evals_since_best = loss, 0
    else:
        state.evals_since_best += 1
    state.stopped_early = c.eval.patience is not None and state.evals_since_best >= c.eval.patience
    if run.logbook is not None:
        run.logbook.log_metrics([metrics])
        parts = ", ".join(f"{name} {part.loss:.4f}" for name, part in sums.items())
        run.logbook.say(
            f"step {state.step}/{c.total_steps} | val loss {loss:.4f} | "
            f"val bpb {metrics['val_bpb']:.4f}" + (f" | {parts}" if len(sums) > 1 else "")
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
    """Sums over val targets: nats and count of all, nats and bytes of those that stand for text.

    End-of-text targets count in the loss but not in bits per byte, as they stand for no text.
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


def metrics_of(sums: dict[str, Sums], state: TrainState, c: TrainConfig) -> dict[str, float]:
    """The numbers of an evaluation's record, from the sums of each dataset, by its name."""
    metrics: dict[str, float] = {"step": state.step, "tokens": c.tokens_before(state.step)}
    total = sum(sums.values(), Sums())
    metrics |= {"val_loss": total.loss, "val_bpb": total.bits_per_byte}
    if len(sums) > 1:
        for name, part in sums.items():
            metrics |= {f"val_loss/{name}": part.loss, f"val_bpb/{name}": part.bits_per_byte}
    return metrics | {"train_seconds": state.train_seconds}


def measure(run: Run, batches: list[np.ndarray]) -> Sums:
    """Sums of the losses of the val targets in these batches, over all ranks."""
    token_bytes = torch.from_numpy(run.tokenizer.token_bytes()).to(run.device.torch_device)
    sums = torch.zeros(4, dtype=torch.float64, device=run.device.torch_device)
    with run.engine.evaluating():
        for batch in batches:
            tokens, targets = to_device(batch, run.device, run.objective.trained(batch))
            documents = run.objective.documents(tokens)
            nats = run.engine(tokens, targets, reduction="none", documents=documents).double()
            counted = targets != IGNORED
            lengths = token_bytes[targets.clamp(min=0)] * counted
            sums += torch.stack(
                [nats.sum(), counted.sum(), nats[lengths > 0].sum(), lengths.sum()]
            ).to(sums.dtype)
            run.watchdog.beat()
    dist.all_reduce(sums)
    return Sums(*sums.tolist())


def _title(run: Run) -> str:
    best = run.state.best_val_loss
    name = run.folder.rpartition("/")[2]
    return f"{name}: best val loss {best:.3f}" if best is not None else name
