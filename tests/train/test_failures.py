"""Workers that fail together: a person is told the failure that caused the others."""

import itertools

from ray.exceptions import ActorDiedError

from manta.failures import WorkersFailed, failure_of
from manta.train.patience import is_out_of_memory

LOST = [
    RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:7902. This is typically ..."),
    RuntimeError("NCCL error: remote process exited or there was a network error"),
]
MEMORY = RuntimeError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_worker_out_of_memory_comes_before_those_that_lost_their_connection_to_it() -> None:
    for order in itertools.permutations([*LOST, MEMORY]):
        found = failure_of(dict(enumerate(order)))
        assert isinstance(found, WorkersFailed) and is_out_of_memory(str(found))


def test_a_worker_that_died_comes_first_and_one_failure_is_told_whatever_it_is() -> None:
    died = ActorDiedError()
    assert str(failure_of({0: LOST[0], 1: MEMORY, 2: died})) == str(died)
    assert "Connection closed" in str(failure_of({0: LOST[0]}))
