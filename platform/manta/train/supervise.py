"""Runs Ray Train's workers, and starts them again when they fail."""

import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Any, Literal

import ray.train
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback

from manta import config as configs
from manta import failures, layout, messages, ownership, storage
from manta.cluster import capacity, connection, ending, nodes
from manta.data import mixture
from manta.data.manifest import Manifest
from manta.errors import TrainingError
from manta.monitor.watch import Watch
from manta.train.checkpoints import checkpoint
from manta.train.elastic import Whole
from manta.train.faults.signals import Moving
from manta.train.faults.stopping import Told, told_to_stop
from manta.train.fitting import needs_less
from manta.train.patience import (
    GivenUp,
    Patience,
    Restarts,
    in_short,
    is_out_of_memory,
    on_the_move,
)
from manta.train.records import history, ledger
from manta.train.resume import is_finished
from manta.train.settings import PretrainConfig, memory_setup
from manta.train.worker import worker

MOST_HANGING = 3  # lines about workers that hang; the others are only counted


@dataclasses.dataclass
class Supervisor:
    """Trains a run to its end, even if its workers fail on the way."""

    c: PretrainConfig
    datasets: tuple[Manifest, ...]
    say: Callable[[str], None]
    callbacks: Callable[[], list[Any]]
    micro_batch: int | None = None
    """Sequences that each worker computes at once; None: the workers have not decided yet."""
    watch: Watch | None = None
    """What watches the run; None: nothing does."""
    hanging: int = 0
    """Workers that said that they hang, since another line came."""

    def __post_init__(self) -> None:
        self._patience = Patience(self.c, self.say)

    def run(self) -> signal.Signals | None:
        """Trains the run. Returns None if it reached its end, else the signal that stopped it; all
        is saved.

        Raises:
            SystemExit: a signal stopped it while it waited for a node, before its first checkpoint.
            MantaError: a person has to fix something.
            RuntimeError: the workers have failed too often without a new checkpoint.
        """
        with messages.requests() as requests, told_to_stop(requests, self.say) as told:
            while True:
                try:
                    self._fit(requests)
                except GivenUp:
                    raise
                except Moving:
                    pass  # saved, but not started again in place
                except RuntimeError as e:  # (not MantaError: a person has to fix that)
                    if told.by is not None:
                        ledger.begin(self.c.run_folder, time.time())
                        raise
                    self.recover(e)
                    self._wait_for_room(told)
                    if told.by is None:
                        continue
                    if not checkpoint.find(self.c.run_folder):
                        ending.end(told.by)  # there was nothing to save
                path = checkpoint.newest(self.c.run_folder)
                if is_finished(self.c, path):
                    return None
                if told.by is None:
                    history.note(self.c.run_folder, "moved", step=layout.step_of(path))
                    self.say(on_the_move(path))
                    self._wait_for_room(told)
                if told.by is not None:  # (also while it waited)
                    return told.by

    def recover(self, error: RuntimeError) -> None:
        """Decides how the run goes on after its workers failed: again, or with less memory.

        Raises:
            GivenUp: they have failed too often without a new checkpoint.
            TrainingError: a worker is out of memory, and no smaller size is allowed.
        """
        ledger.begin(self.c.run_folder, time.time())
        if is_out_of_memory(str(error)) and self.micro_batch is not None:
            self._take_less_memory(self.micro_batch, in_short(str(error)))
        else:
            self._patience.count_failure(error)

    def _fit(self, requests: Any) -> None:
        config = storage.join(self.c.run_folder, layout.RUN_CONFIG)
        arguments = {
            "config": configs.to_dict(self.c),
            "datasets": self.datasets,
            "requests": requests,
            "files": nodes.sizes([config, *mixture.files(self.datasets)]),
        }
        self.micro_batch = None
        fit(worker, arguments, self.c, self.hear, self.callbacks())

    def hear(self, message: Any) -> None:
        """Takes in what a worker says: passes lines on, and keeps the rest."""
        if isinstance(message, messages.Decided):
            self.micro_batch = message.micro_batch
            return
        if isinstance(message, messages.Logged | messages.Saved | messages.WentBack):
            if self.watch is not None:
                self.watch.hear(message)
            return
        if isinstance(message, messages.Hanging):
            self.hanging += 1
            if self.hanging == 1:
                history.note(self.c.run_folder, "hung", rank=message.rank, seconds=message.seconds)
            if self.hanging <= MOST_HANGING:
                self.say(
                    f"rank {message.rank} has made no progress for {message.seconds:g} s: its "
                    f"stacks are in {message.path}"
                )
            return
        if self.hanging > MOST_HANGING:
            self.say(
                f"{self.hanging - MOST_HANGING:,} more ranks have made no progress either; their "
                "stacks are in the same folder"
            )
        self.hanging = 0
        self.say(message)

    def _wait_for_room(self, told: Told) -> None:
        """Waits up to `wait_seconds` for a new node, as one may have left, or until a signal tells
        the run to stop. Raises ClusterError."""
        c = self.c
        cpus, gpus = c.cpus_per_worker, c.gpus_per_worker
        capacity.require(
            c.fewest_workers, cpus, gpus, c.wait_seconds, self.say, lambda: told.by is not None
        )

    def _take_less_memory(self, size: int, why: str) -> None:
        """Makes micro batches smaller. This does not count as a failure (`max_failures`), as there
        are only a few smaller sizes."""
        self.c = less_memory(self.c, size, why)
        to = self.c.micro_batch_size
        history.note(self.c.run_folder, "out of memory", why=why, micro_batch=size, now=to)
        self.say(
            f"out of memory ({why}) with micro batches of {size} sequences: continuing with "
            f"{self.c.micro_batch_size}, more of them per step; the batch is the same"
        )


def less_memory(c: PretrainConfig, size: int, why: str) -> PretrainConfig:
    """Returns `c` with micro batches of at most half of `size`, the size that ran out of memory, if
    `c` allows that and such a size divides the batch for each number of workers that `c` allows.

    Raises:
        TrainingError: no smaller size is allowed; the message says what a worker needs by the cost
            model, and what would need clearly less.
    """
    fixed = dataclasses.replace(c, memory_per_worker=None)  # as that key is for an automatic size
    with_size = [dataclasses.replace(fixed, micro_batch_size=n) for n in c.micro_batches]
    smaller = [
        d
        for d in with_size
        if d.micro_batch <= size // 2
        and not d.problems()
        and set(c.worker_counts) <= set(d.worker_counts)
    ]
    if c.out_of_memory == "halve" and smaller:
        return smaller[-1]
    kind: Literal["cpu", "cuda"] = "cuda" if c.gpus_per_worker else "cpu"
    setup = memory_setup(c, c.expected_model, "fp32" if c.dtype == "fp32" else "bf16", kind)
    found = needs_less(c, dataclasses.replace(setup, micro_batch_size=size))
    halving = "" if c.out_of_memory == "halve" else "; or set out_of_memory=halve"
    raise TrainingError(f"out of memory ({why}): {found}{halving}")


def fit(
    function: Callable[[dict[str, Any], Callable[[Any], None]], None],
    arguments: dict[str, Any],
    c: PretrainConfig,
    say: Callable[[Any], None],
    callbacks: list[Any],
    restarts: UserCallback | None = None,
    title: str | None = None,
) -> None:
    """Runs `function(arguments, say)` on c.num_workers Ray Train workers. What the workers say is
    passed to this process's `say` at once.

    Args:
        restarts: decides whether workers that fail are started again; None: `Restarts`.
        title: the name in Ray's dashboard; None: the run's name.

    Raises:
        MantaError: the workers' own MantaError, if one ended them.
    """
    use_gpu = bool(c.gpus_per_worker)
    resources = {"CPU": c.cpus_per_worker} | ({"GPU": c.gpus_per_worker} if use_gpu else {})
    # gloo connects two workers when they first have something to tell each other. By itself each
    # of its groups, of which a worker is in three, connects each worker with all others.
    environment = {"TORCH_GLOO_LAZY_INIT": "1"}
    if not use_gpu:  # see `device.keep_freed_memory`: training is not in the main thread
        environment["MALLOC_ARENA_MAX"] = "1"
    with (
        messages.listening(say) as queue,
        ownership.scratch(c.run_folder, layout.RAY_RECORDS) as records,
    ):
        filesystem, folder = storage.filesystem(records)
        trainer = _Trainer(
            _Worker(function, queue),
            counts=c.worker_counts,
            train_loop_config=arguments,
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=c.num_workers,  # type: ignore[arg-type]  # Train V2 takes [least, most]
                use_gpu=use_gpu,
                resources_per_worker=resources,
            ),
            run_config=ray.train.RunConfig(
                # Ray Train's own records, which nobody needs: the run's are its own.
                name=connection.plain_name(title or c.name),
                storage_path=folder,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(
                    max_failures=-1,  # `Restarts` decides what is worth another start
                    controller_failure_limit=5,  # type: ignore[call-arg]  # Train V2's
                ),
                worker_runtime_env={"env_vars": environment},
                callbacks=[*callbacks, restarts or Restarts(c, queue.put)],  # type: ignore[list-item]
            ),
        )
        capacity.recount()
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, RayError) as e:  # (the controller may die, too)
            raise failures.cause_of(e) from None


class _Trainer(TorchTrainer):
    """Ray Train's trainer with three changes. An elastic run has one of `counts` workers. There is
    no handler for Ctrl-C, as Ray's aborts the run unsaved. And there is no process that hands out
    datasets, as each worker opens its own (`data.stream`); nor, on a local Ray, those that ask a
    dashboard, which that Ray has not, whether the controller lives, or keep records for it."""

    def __init__(self, *arguments: Any, counts: list[int], **keys: Any):
        super().__init__(*arguments, **keys)
        self._counts = counts

    def _initialize_and_run_controller(self, **keys: Any) -> Any:
        scaling: Any = self.scaling_config
        if scaling.elasticity_enabled:
            keys["scaling_policy"] = Whole(scaling, self._counts)
        return super()._initialize_and_run_controller(**keys)  # type: ignore[misc]

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)
        if connection.is_local():
            unused += (PlacementGroupCleanerCallback, StateManagerCallback)
        made = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in made if not isinstance(callback, unused)]

    def _register_sigint_handler(self, controller: Any) -> None:
        pass  # `told_to_stop` handles it


class _Worker:
    """The function that Ray Train calls on each worker."""

    def __init__(self, function: Callable[..., None], queue: Any):
        self.function, self.queue = function, queue

    def __call__(self, arguments: dict[str, Any]) -> None:
        with messages.telling(self.queue) as say:
            self.function(arguments, say)
