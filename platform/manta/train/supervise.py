"""Ray Train's workers, started again when they fail."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer

from manta import cluster, failures, layout, messages, storage
from manta import config as configs
from manta.data.manifest import Manifest
from manta.errors import TrainingError
from manta.model.memory import costs
from manta.train.checkpoints import checkpoint
from manta.train.faults.signals import Asked, Moving
from manta.train.patience import (
    GivenUp,
    Patience,
    Restarts,
    in_short,
    is_out_of_memory,
    on_the_move,
)
from manta.train.records import ledger
from manta.train.resume import is_finished
from manta.train.settings import PretrainConfig, memory_setup
from manta.train.worker import worker

SECONDS_BETWEEN_REQUESTS = 5.0


@dataclasses.dataclass
class Supervisor:
    """Has a run trained to its end, whatever becomes of its workers."""

    c: PretrainConfig
    datasets: tuple[Manifest, ...]
    say: Callable[[str], None]
    callbacks: Callable[[], list[Any]]
    micro_batch: int | None = None
    """Sequences that each of the workers computes at once; None: they have not decided yet."""

    def run(self) -> bool:
        """Whether the end was reached; False: SIGTERM asked to stop, and all is saved.

        Raises:
            MantaError: what a person has to mend.
            RuntimeError: the workers have failed too often without a new checkpoint.
        """
        patience = Patience(self.c, self.say)
        with messages.requests() as requests, _told_to_stop(requests, self.say) as told:
            while True:
                try:
                    self._fit(requests)
                except GivenUp:
                    raise
                except Moving:
                    pass  # saved; it cannot be started again just there
                except RuntimeError as e:  # (a MantaError is none, and is for a person)
                    ledger.begin(self.c.run_folder, time.time())
                    if told.is_set():
                        raise
                    if is_out_of_memory(str(e)) and self.micro_batch is not None:
                        self._take_less_memory(self.micro_batch, in_short(str(e)))
                    else:
                        patience.count_failure(e)
                    self._wait_for_room()
                    continue
                path = checkpoint.find(self.c.run_folder)[-1]
                if is_finished(self.c, path):
                    return True
                if told.is_set():
                    return False
                self.say(on_the_move(path))
                self._wait_for_room()

    def _fit(self, requests: Any) -> None:
        arguments = {
            "config": configs.to_dict(self.c),
            "datasets": self.datasets,
            "requests": requests,
        }
        self.micro_batch = None
        fit(worker, arguments, self.c, self._hear, self.callbacks())

    def _hear(self, message: str | messages.Decided) -> None:
        if isinstance(message, messages.Decided):
            self.micro_batch = message.micro_batch
        else:
            self.say(message)

    def _wait_for_room(self) -> None:
        """A node may have gone: `wait_seconds` is for another one to come. Raises ClusterError."""
        c = self.c
        cluster.require(c.fewest_workers, c.cpus_per_worker, c.gpus_per_worker, c.wait_seconds)

    def _take_less_memory(self, size: int, why: str) -> None:
        """No failure that `max_failures` counts: there are only so many smaller sizes."""
        self.c = less_memory(self.c, size, why)
        self.say(
            f"out of memory ({why}) with micro batches of {size} sequences: going on with "
            f"{self.c.micro_batch_size}, more of them to a step; the batch is the same"
        )


def less_memory(c: PretrainConfig, size: int, why: str) -> PretrainConfig:
    """With micro batches of at most half of `size`, which is what ran, where `c` allows that and a
    smaller size divides the batch (of each number of workers that there may be).

    Raises:
        TrainingError: with what a worker needs by the cost model, and what would need less.
    """
    fixed = dataclasses.replace(c, memory_per_worker=None)  # which is for an automatic size
    with_size = [dataclasses.replace(fixed, micro_batch_size=n) for n in c.micro_batches]
    smaller = [d for d in with_size if d.micro_batch <= size // 2 and not d.problems()]
    if c.out_of_memory == "halve" and smaller:
        return smaller[-1]
    kind: Literal["cpu", "cuda"] = "cuda" if c.gpus_per_worker else "cpu"
    setup = memory_setup(c, c.expected_model, "bf16" if c.dtype == "bf16" else "fp32", kind)
    needs = [
        f"{costs(dataclasses.replace(setup, micro_batch_size=n)).total / 2**30:.2f} GiB with "
        f"micro_batch_size={n}"
        for n in (size, *(d.micro_batch for d in smaller[-1:]))
    ]
    raise TrainingError(
        f"out of memory ({why}): by the cost model a worker needs {', '.join(needs)}; lower that, "
        "or set activation_checkpointing=full, a higher zero_stage, or out_of_memory=halve"
    )


@contextlib.contextmanager
def _told_to_stop(requests: Any, say: Callable[[str], None]) -> Iterator[threading.Event]:
    """While it lasts, SIGTERM has the workers save and end, and sets the event."""
    told, over = threading.Event(), threading.Event()

    def pass_on() -> None:
        told.wait()
        if over.is_set():
            return
        say("SIGTERM: saving, and ending")
        requests.put(Asked.STOP)
        while not over.wait(SECONDS_BETWEEN_REQUESTS):  # a worker that had it may have died
            requests.put(Asked.STOP)

    if threading.current_thread() is not threading.main_thread():
        yield told  # as in a sweep's trial: signals are not ours
        return
    thread = threading.Thread(target=pass_on, name="manta-sigterm", daemon=True)
    thread.start()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
        over.set()
        told.set()
        thread.join()


def fit(
    function: Callable[[dict[str, Any], Callable[[Any], None]], None],
    arguments: dict[str, Any],
    c: PretrainConfig,
    say: Callable[[Any], None],
    callbacks: list[Any],
) -> None:
    """Runs `function(arguments, say)` on c.num_workers Ray Train workers; what they say arrives
    here, as it is said.

    Raises:
        MantaError: the workers' own, if that is what ended them.
    """
    use_gpu = bool(c.gpus_per_worker)
    resources = {"CPU": c.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    # See `device.keep_freed_memory`: the worker trains in a thread that is not its main one.
    environment = {} if use_gpu else {"env_vars": {"MALLOC_ARENA_MAX": "1"}}
    records_filesystem, records = storage.filesystem(layout.ray_folder(c.home_folder))
    with messages.listening(say) as queue:
        trainer = TorchTrainer(
            _Worker(function, queue),
            train_loop_config=arguments,
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=c.num_workers,  # type: ignore[arg-type]  # Train V2 takes [least, most]
                use_gpu=use_gpu,
                resources_per_worker=resources,
            ),
            run_config=ray.train.RunConfig(
                # Ray Train's own records; the run's are in its folder and do not depend on them.
                name=f"{c.name.replace('/', '-')}-{os.getpid()}-{time.time_ns()}",
                storage_path=records,
                storage_filesystem=records_filesystem,
                failure_config=ray.train.FailureConfig(
                    max_failures=-1,  # `Restarts` knows better what is worth another start
                    controller_failure_limit=5,  # type: ignore[call-arg]  # Train V2's
                ),
                worker_runtime_env=environment,
                callbacks=[*callbacks, Restarts(c, queue.put)],  # type: ignore[list-item]  # V2's
            ),
        )
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, RayError) as e:  # (its controller may die, too)
            raise failures.cause_of(e) from None


class _Worker:
    """What Ray Train calls on each worker."""

    def __init__(self, function: Callable[..., None], queue: Any):
        self.function, self.queue = function, queue

    def __call__(self, arguments: dict[str, Any]) -> None:
        with messages.telling(self.queue) as say:
            self.function(arguments, say)
