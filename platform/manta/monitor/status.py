"""The newest figures of the runs that Prometheus knows, in a table."""

import json
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from manta.monitor.conditions import duration
from manta.monitor.metrics import exported

# The columns: a metric, its heading, and how its value is written.
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "step": ("step", "{:,.0f}".format),
    "loss": ("loss", "{:.4f}".format),
    "val_loss": ("val loss", "{:.4f}".format),
    "tokens_per_second": ("tok/s", "{:,.0f}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "goodput": ("goodput", "{:.1%}".format),
    "checkpoint_age_seconds": ("checkpoint", lambda seconds: f"{duration(seconds)} old"),
}
TIMEOUT = 5.0


def status(address: str) -> list[str]:
    """Lines about the runs that train now, by the Prometheus at this address. Raises OSError if it
    does not answer."""
    running = {labels["run"] for labels, value in ask(address, exported("running")) if value == 1}
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for name, (_, write) in COLUMNS.items():
        for labels, value in ask(address, f"max by (run) ({exported(name)})"):
            rows[labels["run"]][name] = write(value)
    alerts: dict[str, list[str]] = defaultdict(list)
    for labels, _ in ask(address, f"{exported('alert')} == 1"):
        alerts[labels["run"]].append(labels["alert"])
    if not running:
        return ["no run trains at the moment"]
    table = [["run", *(heading for heading, _ in COLUMNS.values()), "alerts"]]
    for run in sorted(running):
        cells = [rows[run].get(name, "-") for name in COLUMNS]
        table.append([unquote(run), *cells, ", ".join(alerts[run]) or "none"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def ask(address: str, query: str) -> list[tuple[dict[str, str], float]]:
    """The labels and the value of each series that a query of PromQL finds now."""
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
        found: dict[str, Any] = json.load(reply)
    return [(s["metric"], float(s["value"][1])) for s in found["data"]["result"]]
