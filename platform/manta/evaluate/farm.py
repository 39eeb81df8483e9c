"""Ray workers that evaluate one checkpoint."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import ray
from ray.util import ActorPool

from manta import cluster
from manta.evaluate.rows import Row
from manta.evaluate.worker import Pool, Prompt, Scored, Worker
from manta.train import checkpoint
from manta.train.device import available_cpus

# A worker that dies is started again, and what it was asked is asked again.
RESTARTS = 3


class Evaluator:
    """A worker in a process of its own; the model is read when it is first asked."""

    def __init__(self, path: str, dtype: str, threads: int, share: int, on_gpu: bool):
        """`threads` compute threads; 0: this node's CPUs, shared by `share` workers."""
        self._path, self._dtype, self._on_gpu = path, dtype, on_gpu
        self._threads = threads or max(1, available_cpus() // share)

    @functools.cached_property
    def _worker(self) -> Worker:
        import torch

        torch.set_num_threads(self._threads)
        device = torch.device("cuda" if self._on_gpu else "cpu")
        model = checkpoint.load_model(self._path, device)
        return Worker(model, checkpoint.load_tokenizer(self._path), self._dtype)

    def ready(self) -> None:
        """Raises what is wrong with the checkpoint."""
        _ = self._worker

    def score(self, batch: list[Row]) -> list[Scored]:
        return self._worker.score(batch)

    def complete(self, prompt: Prompt) -> str:
        return self._worker.complete(prompt)


@contextlib.contextmanager
def workers(
    path: str, count: int, cpus: float, gpus: int, threads: int, dtype: str
) -> Iterator[Pool]:
    """So many workers, of `cpus` CPUs and `gpus` GPUs each, for the checkpoint at `path`.

    Raises:
        MantaError: the checkpoint is damaged, or cannot be read there.
    """
    options: dict[str, Any] = {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_restarts": RESTARTS,
        "max_task_retries": RESTARTS,
    }
    make: Any = ray.remote(Evaluator).options(**options)
    actors = [make.remote(path, dtype, threads, count, bool(gpus)) for _ in range(count)]

    def pool(method: str, items: Any) -> Iterator[Any]:
        try:
            yield from ActorPool(actors).map(lambda a, item: getattr(a, method).remote(item), items)
        except ray.exceptions.RayError as e:
            raise cluster.cause_of(e) from None

    try:
        ray.get([actor.ready.remote() for actor in actors])
        yield pool
    except ray.exceptions.RayError as e:
        raise cluster.cause_of(e) from None
    finally:
        for actor in actors:
            ray.kill(actor)
