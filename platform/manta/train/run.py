"""What the training loop works on, and what ends it before its time."""

import dataclasses
from collections.abc import Callable, Iterator, Set

import numpy as np
import torch
from torch import Tensor

from manta.model.gpt import ModelConfig
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.checkpoints.saver import Saver
from manta.train.faults.signals import Asked, Signals
from manta.train.faults.spikes import Anomaly, Detector
from manta.train.faults.watchdog import Watchdog
from manta.train.records.ledger import Ledger
from manta.train.records.logbook import Logbook
from manta.train.settings import TrainConfig
from manta.train.step.device import Device
from manta.train.step.engine import Engine


class Interrupted(Exception):
    """Training has ended before its time, as `asked`, and is saved."""

    def __init__(self, asked: Asked):
        super().__init__(asked)
        self.asked = asked


class Rollback(Exception):
    """What was found in steps of which a run should forget."""

    def __init__(self, anomaly: Anomaly):
        super().__init__(anomaly.why)
        self.anomaly = anomaly


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
    engine: Engine
    saver: Saver
    state: TrainState
    batches: Iterator[np.ndarray]
    val: dict[str, list[np.ndarray]]
    logbook: Logbook | None
    """On rank 0 only."""
    ledger: Ledger
    detector: Detector
    signals: Signals
    watchdog: Watchdog
    passed_over: Set[int] = frozenset()
    """Steps whose tokens are not trained on: a spike came from them."""

    report: Callable[[dict[str, float]], None] = lambda _: None
    """Called on every rank alike with each evaluation's metrics."""
    log_fingerprint: bool = False
    """Put a fingerprint of each batch's tokens into its record."""
    may_skip: bool = False
    """The stream goes on without what is damaged: count those tokens."""

    def close(self) -> None:
        """Waits for what is being written."""
        self.saver.close()
        self.ledger.write(last=True)
        self.watchdog.close()
        if self.logbook is not None:
            self.logbook.close()


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
