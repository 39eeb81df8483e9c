"""A run's figures as Ray metrics, for Ray's dashboard and Prometheus.

Each metric has the labels run, rank and job. The rank is "all" for what the driver publishes of a
whole run, and a number for what each worker publishes of itself. Prometheus sees `manta_loss` as
`ray_manta_loss`.
"""

import functools
import re
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from ray.util.metrics import Gauge

ALL = "all"
REFRESH = 5.0  # seconds
LABELS = ("run", "rank", "job")

# What each metric says, by its name without "manta_". A run publishes every number of its records;
# those that are not listed here are the ones that only some runs have.
OF_STEPS = {
    "step": "optimizer steps",
    "tokens": "tokens trained on",
    "loss": "loss, nats per token",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient before it is clipped",
    "step_seconds": "seconds of a step",
    "tokens_per_second": "tokens trained on per second, over all workers",
    "mfu": "share of the device's peak FLOPs",
    "mfu_of_measured": "share of the FLOPs that a matrix product reached on this device",
    "data_wait_seconds": "seconds of a step that rank 0 waited for data",
    "goodput": "share of all time since the run's first start that went into its steps",
    "val_loss": "val loss, nats per token",
    "val_bpb": "val loss, bits per byte",
}
OF_RUNS = {
    "running": "1 while the run trains, 0 after it",
    "planned_tokens_per_second": "tokens per second by the run's plan",
    "restarts": "starts of the workers after the first one",
    "rollbacks": "returns to before a loss spike, since the job's start",
    "checkpoint_step": "step of the newest checkpoint",
    "checkpoint_age_seconds": "seconds since the newest checkpoint",
    "checkpoint_seconds": "seconds that the newest checkpoint took to be written",
    "checkpoint_paused_seconds": "seconds that training paused for the newest checkpoint",
    "seconds_without_step": "seconds since a step, beyond the longest recent pause of the log",
    "loss_faults": "steps in the last 10 minutes that were not finite, and rollbacks",
    "speed_of_plan": "recent tokens per second, as a share of the plan's",
    "speed_of_median": "recent tokens per second, as a share of the run's median",
    "data_wait_share": "share of the recent steps' time that rank 0 waited for data",
    "checkpoint_intervals": "age of the newest checkpoint, in usual times between two",
    "recent_goodput": "share of the last 15 minutes that went into steps",
    "nodes_lost": "nodes that have died since the job's start, less those that came",
    "disk_free_share": "free share of the disk with the home, or of Ray's",
}
OF_CAUSES = {"time_seconds": "seconds since the run's first start, by cause"}  # label cause
OF_ALERTS = {
    "alert": "1 while the alert is on",
    "alert_threshold": "the figure beyond which the alert is on",
}  # label alert
OF_RANKS = {
    "host_memory_bytes": "memory of the worker's process",
    "device_memory_bytes": "memory that the worker has taken on its GPU; 0 on CPUs",
    "rank_data_wait_seconds": "seconds that the worker waited for data in its last step",
}
OF_SCORES = {"score": "newest score of an evaluation"}  # labels task, metric
OF_SWEEPS = {"trials": "trials of a sweep, by state"}  # label state
EXTRA_LABELS = {
    "time_seconds": ("cause",), "alert": ("alert",), "alert_threshold": ("alert",),
    "score": ("task", "metric"), "trials": ("state",),
}  # fmt: skip
DECLARED = {
    **OF_STEPS, **OF_RUNS, **OF_CAUSES, **OF_ALERTS, **OF_RANKS, **OF_SCORES, **OF_SWEEPS,
}  # fmt: skip


class Metrics:
    """The metrics of a run, in one process. They are exported for as long as this object lives:
    Ray forgets a value that is not set again within two of its intervals of 10 s."""

    def __init__(self, run: str, rank: int | str = ALL):
        self._labels = {"run": label(run), "rank": str(rank), "job": _job()}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()
        with _LOCK:
            _ALIVE.add(self)
        _refresher()

    def publish(self, figures: Mapping[str, Any], **labels: str) -> None:
        """Publishes the numbers among these figures, each under its own name."""
        more = tuple((key, label(value)) for key, value in labels.items())
        for key, name in series(figures).items():
            gauge = _gauge(name)
            with self._lock:
                self._values[name, more] = figures[key]
                gauge.set(figures[key], {**self._labels, **dict(more)})

    def refresh(self) -> None:
        """Sets all values again."""
        with self._lock:
            for (name, more), value in self._values.items():
                _gauge(name).set(value, {**self._labels, **dict(more)})


_ALIVE: "weakref.WeakSet[Metrics]" = weakref.WeakSet()
_LOCK = threading.Lock()


@functools.cache
def lasting(run: str) -> Metrics:
    """Metrics of a run that live as long as this process."""
    return Metrics(run)


@functools.cache
def _gauge(name: str) -> Gauge:
    short = name.removeprefix("manta_")
    said = DECLARED.get(short, f"{short} of a run's newest step")
    return Gauge(name, said, tag_keys=(*LABELS, *EXTRA_LABELS.get(short, ())))


@functools.cache
def _refresher() -> threading.Thread:
    """The thread of this process that sets all values again and again."""

    def refresh() -> None:
        while True:
            time.sleep(REFRESH)
            with _LOCK:
                alive = list(_ALIVE)
            while alive:  # (none is kept alive by this thread)
                alive.pop().refresh()

    thread = threading.Thread(target=refresh, name="manta-metrics", daemon=True)
    thread.start()
    return thread


def label(text: str) -> str:
    """A text as a label's value: Ray takes ASCII alone, so other letters are as in an address:
    %C3%A9 for é."""
    return quote(text, safe="/ ")


def series(figures: Mapping[str, Any]) -> dict[str, str]:
    """The name of the metric for each number in a record, by its key."""
    return {
        key: "manta_" + re.sub(r"\W", "_", key)
        for key, value in figures.items()
        if isinstance(value, int | float)
    }


def exported(name: str) -> str:
    """The name of a declared metric in Prometheus."""
    if name not in DECLARED:
        raise KeyError(name)
    return f"ray_manta_{name}"


def _job() -> str:
    """The number of this process's job in Ray; "" outside Ray."""
    import ray

    return str(ray.get_runtime_context().get_job_id()) if ray.is_initialized() else ""
