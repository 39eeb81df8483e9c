"""Decides whether failed workers are started again, in the process that starts them."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

from ray.train import UserCallback

from manta import failures, layout
from manta.cluster import capacity
from manta.errors import MantaError
from manta.train.checkpoints import checkpoint
from manta.train.faults.signals import Moving
from manta.train.records import history, ledger
from manta.train.resume import is_finished
from manta.train.settings import PretrainConfig

# Some failures mention memory and are something else: an illegal access, a lack of shared memory in
# a kernel or in NCCL, Ray's guess at why a process died.
OUT_OF_MEMORY = re.compile(
    r"(?i:out of memory)|_OUT_OF_MEMORY\b|\b(OutOf|_Array)?MemoryError\b|cudaErrorMemoryAllocation"
    r"|_STATUS_(\w+_)?ALLOC(ATION)?_FAILED\b"  # from cuBLAS, cuDNN 8 and cuDNN 9
    r"|\b(can't|[Cc]annot) allocate memory|not enough memory: you tried to allocate"
    r"|std::bad_alloc|\blow on memory\b"
)


class GivenUp(failures.WorkersFailed):
    """The workers failed too often without a new checkpoint."""


@dataclasses.dataclass
class Patience:
    """Counts failures since the newest checkpoint."""

    c: PretrainConfig
    say: Callable[[str], None]
    failures: int = 0
    newest: int = -1
    """The step of the newest checkpoint when the workers last failed; -1: there was none."""

    def count_failure(self, error: Exception) -> None:
        """Counts one more failure. Raises GivenUp if it is one too many."""
        reached = self.newest
        with contextlib.suppress(OSError):  # a failing storage may be the cause
            paths = checkpoint.find(self.c.run_folder)
            reached = layout.step_of(paths[-1]) if paths else -1
        self.failures = 1 if reached > self.newest else self.failures + 1
        self.newest = reached
        why, step = in_short(str(error)), max(reached, 0)
        history.note(self.c.run_folder, "failed", why=why, step=step)
        if self.failures > self.c.max_failures:
            self.say(
                f"the workers failed {self.failures} times without a new checkpoint "
                f"(max_failures={self.c.max_failures}); the run ends"
            )
            raise GivenUp(str(error))
        where = f"step {reached}" if reached >= 0 else "the start"
        self.say(
            f"the workers failed ({why}): starting them again from {where} "
            f"(failure {self.failures} of {self.c.max_failures} since the last checkpoint)"
        )


class Restarts(UserCallback):
    """Lets Ray Train's controller start failed workers again, as a new controller would cost about
    six seconds more. It leaves failures that need more than a restart to the driver, by raising
    them. Ray Train itself does not count failures (max_failures=-1).
    """

    def __init__(self, c: PretrainConfig, say: Callable[[str], None]):
        self._patience = Patience(c, say)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Returns if the workers can simply start again. Otherwise raises the workers' MantaError,
        WorkersFailed if something has to change first, or GivenUp."""
        del run_context  # Ray Train passes this argument by its name
        capacity.recount()  # a node may be gone
        deaths = map(failures.death_of, worker_exceptions.values())
        if any(death is not None and death.preempted for death in deaths):
            return  # the machine left as announced; Ray Train calls this repeatedly
        c = self._patience.c
        ledger.begin(c.run_folder, time.time())
        error = failures.failure_of(worker_exceptions)
        has_room = (
            capacity.workers_that_fit(c.cpus_per_worker, c.gpus_per_worker) >= c.fewest_workers
        )
        if isinstance(error, Moving) and has_room:
            newest = checkpoint.newest(c.run_folder)
            if not is_finished(c, newest):
                history.note(c.run_folder, "moved", step=layout.step_of(newest))
                self._patience.say(on_the_move(newest))
                return
        if isinstance(error, MantaError) or is_out_of_memory(str(error)) or not has_room:
            raise error
        self._patience.count_failure(error)


class Ends(UserCallback):
    """Never starts workers again: the driver decides what follows from what they were doing."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises Moving if their machine left as announced, the workers' MantaError, else
        WorkersFailed."""
        del run_context  # Ray Train passes this argument by its name
        deaths = map(failures.death_of, worker_exceptions.values())
        if any(death is not None and death.preempted for death in deaths):
            raise Moving("a worker's machine has left as announced")
        raise failures.failure_of(worker_exceptions)


def on_the_move(path: str) -> str:
    return f"a worker's machine is leaving: starting again from {path}"


def in_short(text: str) -> str:
    """Shortens the text of Ray's failure to one readable line."""
    text = " ".join(text.split())
    if "node has died" in text or "node was terminated" in text:
        return "a worker's node is gone"
    if "worker process has died" in text and not is_out_of_memory(text):
        return "a worker's process is gone, killed by somebody or by a system short of memory"
    if "CUDA out of memory" in text:
        text = text.partition(" of which ")[0]  # then come other processes and advice
    return text if len(text) < 300 else f"{text[:100]} ... {text[-200:]}"


def is_out_of_memory(text: str) -> bool:
    """Whether a GPU or the machine ran out of memory, judged by the text of the failure (with the
    types of the exceptions): for PyTorch, CUDA, cuBLAS, cuDNN, NCCL, Python, NumPy or Ray."""
    return OUT_OF_MEMORY.search(text) is not None
