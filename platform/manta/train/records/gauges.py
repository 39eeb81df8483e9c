"""A run's newest numbers as Ray metrics, for Ray's dashboard and Prometheus."""

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from ray.util.metrics import Gauge


def gauges(run: str) -> Callable[[dict[str, Any]], None]:
    """Returns a function that publishes a record's numbers as Ray metrics `manta_KEY{run="..."}`,
    which Ray's dashboard and Prometheus read. Ray takes ASCII alone, so other letters of the run's
    name are as in an address: %C3%A9 for é."""
    made: dict[str, Gauge] = {}

    def publish(record: dict[str, Any]) -> None:
        for key, name in series(record).items():
            if key not in made:
                made[key] = Gauge(name, f"{key} of a run's newest step", tag_keys=("run",))
            made[key].set(record[key], {"run": quote(run)})

    return publish


def series(record: dict[str, Any]) -> dict[str, str]:
    """The name of the metric for each number in a record, by its key."""
    return {
        key: "manta_" + re.sub(r"\W", "_", key)
        for key, value in record.items()
        if isinstance(value, int | float)
    }
