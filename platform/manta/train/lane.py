"""One rank of a lane: workers that stay, and train several runs, one after the other.

To start workers takes many seconds, to begin the next run in them less than one. Rank 0 asks the
driver for a piece of work, all ranks do it as `worker` would, and rank 0 says what came of it. The
driver answers each question that it can; one that comes again is answered the same.
"""

import dataclasses
import gc
import queue
import time
import uuid
from collections.abc import Callable
from typing import Any

import torch

from manta import config as configs
from manta.messages import mailbox
from manta.train.faults.signals import Asked, Moving, Signals
from manta.train.kept import Kept
from manta.train.ranks import Rank, agreed
from manta.train.rollbacks import Diverged
from manta.train.settings import PretrainConfig
from manta.train.worker import from_outside, preempted, require_shared, train_run

SECONDS_BETWEEN_QUESTIONS = 5.0  # the worker that an answer was for may have died
SECONDS_OF_WAITING = 1.0  # after which the ranks look for signals


@dataclasses.dataclass(frozen=True)
class Free:
    """Rank 0 asks for the next piece of work. `question` is the same until it is answered."""

    question: str


@dataclasses.dataclass(frozen=True)
class Piece:
    """The driver's answer to a question: a run to train, to its end or to a step."""

    question: str
    config: dict[str, Any] | None
    """The run's config; None: there is nothing left to do."""
    until: int | None = None
    """The step to pause at; None: the run's end."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """A piece of work has ended: the run has a checkpoint there, or was told to stop."""

    diverged: str | None = None
    """Why the run has been given up."""


class _Desk:
    """What has come from the driver, on rank 0."""

    def __init__(self) -> None:
        self.asked = Asked.NOTHING
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()

    def take(self, message: Asked | Piece) -> None:
        if isinstance(message, Asked):
            self.asked = max(self.asked, message)
        else:
            self._pieces.put(message)

    def answer(self, question: str) -> Piece | None:
        """The answer to a question; None if it does not come within SECONDS_OF_WAITING."""
        try:
            while (piece := self._pieces.get(timeout=SECONDS_OF_WAITING)).question != question:
                pass
        except queue.Empty:
            return None
        return piece


def lane(arguments: dict[str, Any], say: Callable[[Any], None]) -> None:
    """Does what the driver gives it, until nothing is left or it is told to stop. Runs in Ray
    Train's worker process.

    Raises:
        Moving: this machine is about to leave; what was trained is saved.
        Exception: training failed. The workers have to be started again.
    """
    rank = Rank.here()
    require_shared(arguments["folder"], arguments["files"], rank)
    desk = _Desk()
    if rank.is_first:
        mailbox(arguments["requests"], desk.take)
    kept = Kept()
    with from_outside(rank, say) as sources:
        sources.append(lambda: desk.asked)
        signals = Signals(sources, shared=preempted)
        while (piece := _next(desk, rank, signals, say)) is not None:
            c = configs.from_dict(PretrainConfig, piece.config or {})
            diverged = None
            try:
                train_run(c, arguments["datasets"], rank, sources, say, piece.until, kept)
            except Diverged as e:
                diverged = str(e)
            clean()
            if rank.is_first:
                say(Ended(diverged))


def _next(desk: _Desk, rank: Rank, signals: Signals, say: Callable[[Any], None]) -> Piece | None:
    """The next piece of work, on all ranks; None: there is no more."""
    question, asked_at = uuid.uuid4().hex, -SECONDS_BETWEEN_QUESTIONS
    while True:
        piece = None
        if rank.is_first:
            if time.monotonic() - asked_at >= SECONDS_BETWEEN_QUESTIONS:
                say(Free(question))
                asked_at = time.monotonic()
            piece = desk.answer(question)
        piece = agreed(piece)
        if piece is not None:
            return piece if piece.config is not None else None
        asked = signals.agree()
        if Asked.STOP in asked:
            return None
        if Asked.MOVE in asked:
            raise Moving("a machine is leaving on which a lane of the sweep waited for work")


def clean() -> None:
    """Forgets the run that this process has trained: its memory, and what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    gc.freeze()  # what is old is not looked through again when the next run begins to train
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
