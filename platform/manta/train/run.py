"""The state that the training loop works on, and the exceptions that end the loop early."""

import dataclasses
from collections.abc import Callable, Container, Generator, Iterator, Mapping
from typing import Any

from manta.model.gpt import ModelConfig
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.checkpoints.saver import Saver
from manta.train.faults.signals import Asked, Signals
from manta.train.faults.spikes import Anomaly, Detector
from manta.train.faults.watchdog import Watchdog
from manta.train.objectives.next_token import Batch, NextToken
from manta.train.peak_memory import PeakMemory
from manta.train.records import history
from manta.train.records.ledger import Ledger
from manta.train.records.logbook import Logbook
from manta.train.settings import TrainConfig
from manta.train.step.device import Device
from manta.train.step.engine import Engine


class Interrupted(Exception):
    """Training has ended early, as `asked`, and is saved."""

    def __init__(self, asked: Asked):
        super().__init__(asked)
        self.asked = asked


class Rollback(Exception):
    """The run has to go back to before the steps in which `anomaly` was found."""

    def __init__(self, anomaly: Anomaly):
        super().__init__(anomaly.why)
        self.anomaly = anomaly


@dataclasses.dataclass
class Run:
    """The state that the loop works on. `model` has its vocabulary; `batches` are this rank's micro
    batches from step `state.step` on; `val` is this rank's share of the
    val tokens of each dataset, by name."""

    folder: str
    config: TrainConfig
    model: ModelConfig
    objective: NextToken
    tokenizer: Tokenizer
    device: Device
    engine: Engine
    saver: Saver
    state: TrainState
    batches: Iterator[Batch]
    val: dict[str, list[Batch]]
    logbook: Logbook | None
    """Rank 0's logbook; None on the other ranks."""
    ledger: Ledger
    detector: Detector
    signals: Signals
    watchdog: Watchdog
    memory: PeakMemory
    """The most memory that this worker has taken since before its engine was built."""
    passed_over: Container[int] = frozenset()
    """Steps whose tokens are not trained on, as they caused a loss spike."""

    pause_at: int | None = None
    """Step at which training ends for now; null: only at the run's end. The learning rate is that
    of the whole length."""
    report: Callable[[dict[str, float]], None] = lambda _: None
    """Function that every rank calls with each evaluation's metrics."""
    publish: Callable[[Mapping[str, Any]], None] = lambda _: None
    """Function that publishes figures of this rank alone as metrics."""
    log_fingerprint: bool = False
    """Whether each step's record has a fingerprint of its tokens."""
    is_warned: bool = False
    """Whether the objective's warning about the val split has been said."""
    may_skip: bool = False
    """Whether the stream skips damaged data; each step's record then counts the skipped tokens."""

    def close(self) -> None:
        """Waits until pending writes are done, and closes everything."""
        self.saver.close()
        self.signals.close()
        if isinstance(self.batches, Generator):
            self.batches.close()  # ends what reads ahead
        self.ledger.write(last=True)
        self.watchdog.close()
        if self.logbook is not None:
            history.note(self.folder, "memory", bytes=self.memory.bytes, step=self.state.step)
            self.logbook.close()
