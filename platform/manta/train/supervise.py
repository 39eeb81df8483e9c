"""A function on Ray Train's workers."""

import os
import time
from collections.abc import Callable
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from manta import cluster, storage
from manta.train.settings import PretrainConfig


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
    records_filesystem, records = storage.filesystem(storage.join(c.home_folder, "ray"))
    with cluster.listening(say) as queue:
        trainer = TorchTrainer(
            _Worker(function, queue),
            train_loop_config=arguments,
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=c.num_workers, use_gpu=use_gpu, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                # Ray Train's own records; the run's are in its folder and do not depend on them.
                name=f"{c.name.replace('/', '-')}-{os.getpid()}-{time.time_ns()}",
                storage_path=records,
                storage_filesystem=records_filesystem,
                failure_config=ray.train.FailureConfig(
                    max_failures=c.max_failures,
                    controller_failure_limit=3,  # type: ignore[call-arg]  # Train V2's
                ),
                callbacks=callbacks,
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as e:
            raise cluster.cause_of(e) from None


class _Worker:
    """What Ray Train calls on each worker."""

    def __init__(self, function: Callable[..., None], queue: Any):
        self.function, self.queue = function, queue

    def __call__(self, arguments: dict[str, Any]) -> None:
        self.function(arguments, self.queue.put)
