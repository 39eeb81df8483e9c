"""Ray workers that evaluate checkpoints."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
from ray.util import ActorPool

from manta import failures
from manta.evaluate.rows import Row
from manta.evaluate.worker import Pool, Prompt, Scored, Worker
from manta.train.checkpoints import checkpoint
from manta.train.step.device import available_cpus, choose_dtype, pick_device

# Ray restarts a worker that dies and repeats its request, each at most this often.
RESTARTS = 3
PATIENCE_SECONDS = 30.0


class Evaluator:
    """A worker in a process of its own. It reads a model at the first request for it. Each request
    names the checkpoint, so a restarted worker knows it too."""

    def __init__(self, dtype: str, threads: int, share: int, on_gpu: bool):
        """Computes with `threads` threads; 0: this node's CPUs, shared by `share` workers."""
        self._dtype, self._on_gpu = dtype, on_gpu
        self._threads = threads or max(1, available_cpus() // share)
        self._path: str | None = None

    def ready(self, path: str) -> None:
        """Reads the checkpoint, unless it is the current one. Raises what is wrong with it."""
        import torch

        if path == self._path:
            return
        torch.set_num_threads(self._threads)
        model = checkpoint.load_model(path, pick_device("cuda" if self._on_gpu else "cpu"))
        self._worker = Worker(model, checkpoint.load_tokenizer(path), self._dtype)
        self._path = path

    def score(self, path: str, batch: list[Row]) -> list[Scored]:
        self.ready(path)
        return self._worker.score(batch)

    def answers(self, path: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        self.ready(path)
        return self._worker.answers(rows)

    def complete(self, path: str, prompt: Prompt) -> str:
        self.ready(path)
        return self._worker.complete(prompt)


class Farm:
    """Running workers, for one checkpoint after another."""

    def __init__(self, actors: list[Any]):
        self._actors = actors

    def load(self, path: str) -> Pool:
        """The workers, with the checkpoint at `path` loaded. It may be deleted afterwards, but a
        worker that dies and restarts reads it again.

        Raises:
            MantaError: the checkpoint is damaged, or a worker cannot read it.
        """
        try:
            self._wait([actor.ready.remote(path) for actor in self._actors])
        except ray.exceptions.RayError as e:
            raise failures.cause_of(e) from None

        def pool(method: str, items: Any) -> Iterator[Any]:
            def ask(actor: Any, item: Any) -> Any:
                return getattr(actor, method).remote(path, item)

            try:
                yield from ActorPool(self._actors).map(ask, items)
            except ray.exceptions.RayError as e:
                raise failures.cause_of(e) from None

        return pool

    def _wait(self, answers: list[Any]) -> None:
        waiting = ray.wait(answers, num_returns=len(answers), timeout=PATIENCE_SECONDS)[1]
        if waiting:
            print(
                f"waiting for {len(waiting)} workers: the cluster's CPUs or GPUs are in use",
                flush=True,
            )
        ray.get(answers)


def chosen_dtype(cpus: float, gpus: float) -> str:
    """The precision that training chooses on a node with room for `cpus` CPUs and `gpus` GPUs."""
    choose: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(_choose)
    return ray.get(choose.remote(bool(gpus)))


def _choose(on_gpu: bool) -> str:
    return choose_dtype(pick_device("cuda" if on_gpu else "cpu"))


@contextlib.contextmanager
def workers(count: int, cpus: float, gpus: float, threads: int, dtype: str) -> Iterator[Farm]:
    """A context with `count` workers of `cpus` CPUs and `gpus` GPUs each. Ray shows a worker only
    its own card, even if the worker has just a share of it."""
    options: dict[str, Any] = {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_restarts": RESTARTS,
        "max_task_retries": RESTARTS,
    }
    make: Any = ray.remote(Evaluator).options(**options)
    actors = [make.remote(dtype, threads, count, bool(gpus)) for _ in range(count)]
    try:
        yield Farm(actors)
    finally:
        for actor in actors:
            ray.kill(actor)
