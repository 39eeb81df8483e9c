"""The pictures of a report: losses and the course of training, drawn from the run's records."""

import math
from collections.abc import Sequence
from typing import Any

from manta import plot

COURSE = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
}
MOST_POINTS = 1000  # of a curve; more cannot be told apart


def pictures(records: Sequence[dict[str, Any]], name: str) -> dict[str, bytes]:
    """PNGs by what they show; none without records.

    Args:
        records: whole records of metrics.jsonl.
    """
    found: dict[str, bytes] = {}
    if any("loss" in r or "val_loss" in r for r in records):
        found["Loss against tokens"] = plot.loss_curve(records, f"{name}: loss")
    series = {}
    for key, label in COURSE.items():
        points = [
            (r["tokens"], float(r[key]), 0.0)
            for r in records
            if isinstance(r.get("tokens"), int)
            and isinstance(r.get(key), int | float)
            and math.isfinite(r[key])
        ]
        if points:
            series[label] = points[:: max(1, len(points) // MOST_POINTS)]
    if series:
        found["The course of training"] = plot.panels(series, f"{name}: against tokens")
    return found
