"""Passes over disk: many tasks over Ray Data, each with a record of what it made.

work/part-00007.json is the record of the task part-00007. A record is written after the files that
it describes, and a task that has one is not done again: so a preparation resumes where it stopped.
"""

import abc
import json
from collections.abc import Callable, Iterable
from typing import Any

import ray.data

from manta import storage
from manta.cluster import capacity, nodes
from manta.errors import DataError, MantaError
from manta.progress import Progress

WORK = "work"
RESUME = "free disk space, and run the same command again: it resumes where this one stopped"
TASKS_PER_CPU = 4


def record_path(path: str, name: str) -> str:
    return storage.join(path, WORK, f"{name}.json")


class Task(abc.ABC):
    """A task for Ray Data: takes one index and returns its record.

    Errors are returned as values, because Ray Data retries a task that raises and prints its stack.
    """

    path: str

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (index,) = batch["index"]
        try:
            found, error = self.run(int(index)), ""
        except MantaError as e:
            found, error = {}, str(e)
        except OSError as e:  # from writing: an unreadable corpus is a DataError
            found, error = {}, f"{self.path}: cannot be written ({e.strerror or e}); {RESUME}"
        return {"index": [index], "found": [json.dumps(found)], "error": [error]}

    def run(self, index: int) -> dict[str, Any]:
        """Does the work of one index, and writes and returns its record."""
        record = self.work(index)
        storage.write_json(record_path(self.path, self.name(index)), record)
        return record

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """The name of the record of an index."""

    @abc.abstractmethod
    def work(self, index: int) -> dict[str, Any]:
        """Does the work of one index and returns its record."""


def run(task: Task, count: int, title: str, unit: str) -> list[dict[str, Any]]:
    """The records of the task's indexes below `count`, from disk if they are there already."""
    there = {item.base_name for item in storage.list_files(storage.join(task.path, WORK))}
    names = [task.name(index) for index in range(count)]
    records = {
        index: storage.read_json(record_path(task.path, name))
        for index, name in enumerate(names)
        if f"{name}.json" in there
    }
    missing = [index for index in range(count) if index not in records]
    with Progress(title, count, unit) as progress:
        progress.advance(len(records))
        for row in over_ray(task, missing):
            if row["error"]:
                raise DataError(row["error"])
            records[int(row["index"])] = json.loads(row["found"])
            progress.advance(1)
    return [records[index] for index in range(count)]


def over_ray(task: Task, indexes: list[int]) -> Iterable[dict[str, Any]]:
    """Yields what the task returns for each index, as the indexes are done."""
    if not indexes:
        return []
    items = [{"index": index} for index in indexes]
    # Ray Data leaves a CPU idle for a tenth of a second between two tasks, so there are few tasks,
    # of several indexes each.
    tasks = min(len(items), TASKS_PER_CPU * capacity.workers_that_fit(1.0, 0.0))
    dataset = ray.data.from_items(items, override_num_blocks=tasks)
    return dataset.map_batches(task, batch_size=1, num_cpus=1).iter_rows()


def require_nodes(
    folder: str, files: list[str], wait_seconds: float, say: Callable[[str], None]
) -> None:
    """Checks that a node has a CPU for the passes, and that all nodes see the folder of the
    datasets and these files of the corpus. Waits up to `wait_seconds` for a first node.

    Raises:
        ClusterError: no node has a CPU, or a node does not see them.
    """
    capacity.require(1, 1.0, 0.0, wait_seconds, say)
    nodes.require(folder, files, say=say)
