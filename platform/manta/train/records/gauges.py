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
        for key, value in record.items():
            if not isinstance(value, int | float):
                continue
            if key not in made:
                name = "manta_" + re.sub(r"\W", "_", key)
                made[key] = Gauge(name, f"{key} of a run's newest step", tag_keys=("run",))
            made[key].set(value, {"run": quote(run)})

    return publish
