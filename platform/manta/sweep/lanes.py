"""The driver's end of lanes: workers that stay, and train segments of trials one after another."""

import dataclasses
import queue
import threading
from typing import Any

from manta import messages
from manta.cluster import capacity
from manta.data.manifest import Manifest
from manta.sweep.work import Work
from manta.train.faults.signals import Asked
from manta.train.lane import Piece, lane
from manta.train.patience import Ends
from manta.train.settings import PretrainConfig
from manta.train.supervise import fit


@dataclasses.dataclass(frozen=True)
class Over:
    """The workers of a lane have ended. `error`: why, if they should not have."""

    error: Exception | None = None


class Lane:
    """A group of Ray Train's workers, from its start to its end.

    All that happens is put into `events` as (lane, message): what rank 0 says, then Over.
    """

    def __init__(
        self,
        number: int,
        first: Work,
        datasets: tuple[Manifest, ...],
        shared: dict[str, Any],
        events: "queue.SimpleQueue[tuple[Lane, Any]]",
    ):
        """Starts the workers. `first` has the resources and the number of workers that the lane has
        for all its work; `shared`: the folder and the files that each worker must see."""
        self.number, self.shape = number, first.shape
        self.work: Work | None = None
        self.question: str | None = None
        """The question that has no answer yet."""
        self.has_asked = False
        """Whether the workers have got as far as to ask for work."""
        self._events, self._requests = events, None
        arguments = {"datasets": datasets, **shared}
        sweep = first.c.name.rpartition("/")[0]
        # Ray's records are in the sweep's folder, as they outlive the first run.
        c = dataclasses.replace(first.c, name=sweep)
        self._thread = threading.Thread(
            target=self._run, args=(c, arguments), name=f"manta-lane-{number}"
        )
        self._thread.daemon = True  # a second Ctrl-C does not wait for it
        self._thread.start()

    def put(self, message: Asked | Piece) -> None:
        """Tells rank 0 something, if there are workers yet."""
        if self._requests is not None:
            self._requests.put(message)

    def give(self, work: Work) -> None:
        """Answers the question with some work."""
        self.work = work
        self.answer()

    def answer(self) -> None:
        """Answers the question with the work that the lane has; without any, with the end."""
        assert self.question is not None
        piece = self.work.piece(self.question) if self.work else Piece(self.question, None)
        self.question = None
        self.put(piece)

    def _run(self, c: PretrainConfig, arguments: dict[str, Any]) -> None:
        error, title = None, f"{c.name}-lane{self.number}"
        try:
            capacity.require(
                c.fewest_workers, c.cpus_per_worker, c.gpus_per_worker, c.wait_seconds, self._say
            )
            with messages.requests() as requests:
                self._requests = requests
                arguments = {**arguments, "requests": requests}
                fit(lane, arguments, c, self._say, [], restarts=Ends(), title=title)
        except Exception as e:
            error = e
        self._requests = None
        self._say(Over(error))

    def _say(self, message: Any) -> None:
        self._events.put((self, message))
