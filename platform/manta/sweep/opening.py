"""The beginning of what is trained in lanes, a sweep or a ladder: all that can be wrong is found
before anything is trained."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

from manta import layout, ownership, storage
from manta.cluster import capacity, connection, nodes
from manta.data import mixture
from manta.data.manifest import Manifest
from manta.job import say
from manta.lock import lock
from manta.train.checkpoints import checkpoint
from manta.train.faults.stopping import ask_for_time
from manta.train.settings import PretrainConfig

C = TypeVar("C", bound=PretrainConfig)


@dataclasses.dataclass(frozen=True)
class Opened:
    """What lanes can begin with."""

    folder: str
    """The folder of the sweep or ladder, which is locked."""
    datasets: tuple[Manifest, ...]
    lanes: int
    """How many lanes fit, and are allowed."""


def here(c: C) -> C:
    """The config with what the workers cannot find out: their environment and files may differ from
    ours."""
    return dataclasses.replace(c, home=c.home_folder, engine=c.engine.inlined())


@contextlib.contextmanager
def opened(
    c: PretrainConfig,
    what: str,
    first: str | None,
    check: Callable[[tuple[Manifest, ...]], None],
    most_lanes: int | None,
) -> Iterator[Opened]:
    """Joins Ray, opens the data, checks everything, and holds the name for this process.

    Args:
        c: the sweep or ladder, whose workers are those of each of its runs.
        what: what it is, with its name, for people.
        first: the name of the run that is trained first; None: there is none.
        check: raises MantaError if the runs cannot learn from these datasets.
        most_lanes: lanes that are allowed; None: as many as fit.

    Raises:
        MantaError: it cannot work; nothing is half-written.
    """
    folder = layout.run_folder(c.home_folder, c.name)
    runs = layout.runs_folder(c.home_folder)
    connection.connect(name=c.name)
    nodes.require_writable(runs)
    if not c.wait_seconds:  # (nodes that cost money are waited for when all else is right)
        _require_room(c)
    ownership.refuse_links(folder, layout.SWEEP_NAMES)
    if first is not None:
        checkpoint.check_place(c.home_folder, first)
    datasets = mixture.open_datasets(c.data, c.home_folder, say, c.wait_seconds)
    check(datasets)
    _require_room(c)
    nodes.require(runs, mixture.files(datasets), bool(c.gpus_per_worker), say)
    if time_to_stop := ask_for_time(c.checkpoint.every):
        say(time_to_stop)
    with lock(storage.join(folder, layout.RUN_LOCK), what):
        ownership.remove_scratch(folder, layout.RAY_RECORDS)
        fits = capacity.workers_that_fit(c.cpus_per_worker, c.gpus_per_worker) // c.most_workers
        yield Opened(folder, datasets, min(max(1, fits), most_lanes or fits or 1))


def _require_room(c: PretrainConfig) -> None:
    cpus, gpus = c.cpus_per_worker, c.gpus_per_worker
    capacity.require(c.fewest_workers, cpus, gpus, c.wait_seconds, say)
