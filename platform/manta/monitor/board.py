"""Grafana's board of Manta's runs, and the files that provision a Grafana with it, as plain JSON
and YAML."""

import dataclasses
import json
from typing import Any

from manta.monitor.metrics import exported
from manta.monitor.prometheus import dump

UID = "manta"
SOURCE = "Prometheus"  # the data source's name, which Ray's own boards use as well
WIDTH, HEIGHT = 8, 8  # of a panel, in Grafana's grid of 24 columns


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel: lines over time, each query with its legend."""

    title: str
    unit: str
    """Grafana's name of the unit."""
    queries: tuple[tuple[str, str], ...]
    """PromQL and the legend of each line. $run stands for the runs that are shown."""
    is_stacked: bool = False


def _of(name: str, by: str = "run", how: str = "max") -> str:
    return f'{how} by ({by}) ({exported(name)}{{run=~"$run"}})'


def _plain(title: str, unit: str, *names: str) -> Panel:
    legend = "{{run}}" if len(names) == 1 else "{{run}} "
    said = {name: name.replace("_", " ") for name in names}
    queries = [(_of(name), legend + (said[name] if len(names) > 1 else "")) for name in names]
    return Panel(title, unit, tuple(queries))


# Those with which "is it going well?" is answered come first.
PANELS = (
    Panel("Alerts", "none", ((f"{_of('alert', 'run, alert')} == 1", "{{run}}: {{alert}}"),)),
    _plain("Loss", "none", "loss", "val_loss"),
    _plain("Tokens per second", "short", "tokens_per_second", "planned_tokens_per_second"),
    _plain("MFU", "percentunit", "mfu"),
    Panel(
        "Where the time goes", "s", ((_of("time_seconds", "run, cause"), "{{run}} {{cause}}"),),
        is_stacked=True,
    ),
    _plain("Goodput", "percentunit", "goodput", "recent_goodput"),
    _plain("Tokens", "short", "tokens"),
    _plain("Gradient norm", "none", "grad_norm"),
    _plain("Learning rate", "none", "lr"),
    _plain("Seconds of a step", "s", "step_seconds"),
    _plain("Time spent waiting for data", "percentunit", "data_wait_share"),
    Panel(
        "Data wait by rank", "s",
        ((_of("rank_data_wait_seconds", "run, rank"), "{{run}} rank {{rank}}"),),
    ),
    _plain("Age of the newest checkpoint", "s", "checkpoint_age_seconds"),
    _plain("A checkpoint's time", "s", "checkpoint_seconds", "checkpoint_paused_seconds"),
    _plain("Restarts and rollbacks", "none", "restarts", "rollbacks"),
    _plain("Seconds without a step", "s", "seconds_without_step"),
    _plain("Speed against plan and median", "percentunit", "speed_of_plan", "speed_of_median"),
    Panel(
        "Memory of workers", "bytes",
        (
            (_of("host_memory_bytes", "run, rank"), "{{run}} rank {{rank}} host"),
            (_of("device_memory_bytes", "run, rank"), "{{run}} rank {{rank}} device"),
        ),
    ),
    Panel("Scores", "none", ((_of("score", "run, task, metric"), "{{run}} {{task}} {{metric}}"),)),
    Panel("Trials of sweeps", "none", ((_of("trials", "run, state"), "{{run}} {{state}}"),), True),
    _plain("Nodes lost", "none", "nodes_lost"),
    _plain("Free share of the disk", "percentunit", "disk_free_share"),
    _plain("Steps not finite or rolled back, in 10 minutes", "none", "loss_faults"),
    _plain("Checkpoint's age, in usual intervals", "none", "checkpoint_intervals"),
)  # fmt: skip


def board() -> str:
    """The board, as JSON for Grafana."""
    source = {"type": "prometheus", "uid": UID}
    panels = []
    for number, panel in enumerate(PANELS):
        line: dict[str, Any] = {"lineWidth": 2, "spanNulls": False}
        if panel.is_stacked:
            line |= {"stacking": {"mode": "normal"}, "fillOpacity": 40}
        panels.append(
            {
                "id": number + 1,
                "type": "timeseries",
                "title": panel.title,
                "datasource": source,
                "gridPos": {
                    "x": number % 3 * WIDTH, "y": number // 3 * HEIGHT, "w": WIDTH, "h": HEIGHT,
                },
                "fieldConfig": {"defaults": {"unit": panel.unit, "custom": line}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
                "targets": [
                    {"refId": chr(65 + n), "datasource": source, "expr": expr, "legendFormat": said}
                    for n, (expr, said) in enumerate(panel.queries)
                ],
            }
        )  # fmt: skip
    runs = f"label_values({exported('running')}, run)"
    variable = {
        "name": "run", "label": "Run", "type": "query", "datasource": source, "query": runs,
        "definition": runs, "refresh": 2, "includeAll": True, "multi": True, "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip
    return json.dumps(
        {
            "uid": UID,
            "title": "Manta: runs",
            "tags": ["manta"],
            "editable": True,
            "schemaVersion": 39,
            "refresh": "10s",
            "time": {"from": "now-1h", "to": "now"},
            "templating": {"list": [variable]},
            "panels": panels,
        },
        indent=1,
    )


def provisioning(folder: str, prometheus: str, rays: str) -> dict[str, str]:
    """The files that tell Grafana where its data and boards are, by their paths in `folder`.

    Args:
        prometheus: the address of Prometheus.
        rays: the folder with Ray's own boards, which Ray's dashboard shows.
    """
    source = {
        "name": SOURCE, "uid": UID, "type": "prometheus", "url": prometheus, "access": "proxy",
        "isDefault": True,
    }  # fmt: skip
    boards = {"Manta": f"{folder}/boards", "Ray": rays}
    providers = [
        {"name": name, "folder": name, "type": "file", "options": {"path": path}}
        for name, path in boards.items()
    ]
    ini = (
        "[server]\nhttp_addr = 127.0.0.1\n"
        "[security]\nallow_embedding = true\n"
        "[auth.anonymous]\nenabled = true\norg_role = Viewer\n"
        "[analytics]\nreporting_enabled = false\ncheck_for_updates = false\n"
        f"[paths]\nprovisioning = {folder}/provisioning\n"
    )
    return {
        "grafana.ini": ini,
        "boards/manta.json": board(),
        "provisioning/datasources/manta.yml": dump({"apiVersion": 1, "datasources": [source]}),
        "provisioning/dashboards/manta.yml": dump({"apiVersion": 1, "providers": providers}),
    }
