"""Runs to watch: what rank 0 would say of them, second by second; a server that takes alerts."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from manta.messages import Logged, Saved
from manta.monitor.alerts import Alert, Alerts
from manta.monitor.figures import Figures
from manta.monitor.settings import AlertsConfig
from manta.monitor.watch import Watched

STEP = 0.1  # seconds
PER_STEP = 2048  # tokens


def record(step: int, **more: Any) -> dict[str, Any]:
    """The record of a step in metrics.jsonl."""
    return {
        "step": step, "tokens": step * PER_STEP, "loss": 2.0 + 1 / step, "grad_norm": 1.0,
        "lr": 1e-3, "step_seconds": STEP, "tokens_per_second": PER_STEP / STEP,
        "data_wait_seconds": 0.002, **more,
    }  # fmt: skip


class Story:
    """A run of ten steps a second, which are logged each second, with a checkpoint every five
    minutes. Faults are made by changing its attributes."""

    def __init__(self, config: AlertsConfig | None = None, planned: float | None = 20_000.0):
        self.now, self.step, self.starts, self.productive = 0.0, 0, 1, 0.0
        self.slow, self.more, self.is_hanging, self.saves = 1.0, {}, False, True
        self.outside = {"nodes_lost": 0.0, "disk_free_share": 0.5}
        self.told: list[tuple[float, Alert]] = []
        self.figures = Figures(0.0, lambda step, _speed: 3000 * step, planned)
        tell: Callable[[Alert], None] = lambda alert: self.told.append((self.now, alert))  # noqa: E731
        self.alerts = Alerts(config or AlertsConfig(), "a/run", "a-host", tell)

    def go_on(self, seconds: int) -> None:
        """Lets so many seconds pass; the driver looks every five."""
        for _ in range(seconds):
            self.now += 1
            if not self.is_hanging:
                self._log()
            if self.saves and self.now % 300 == 0:
                self.figures.hear(Saved(self.step, 0.5, 0.1), self.now)
            if self.now % 5 == 0:
                self.alerts.look({**self.figures.at(self.now), **self.outside}, self.now)

    def _log(self) -> None:
        records = []
        for _ in range(max(1, round(1 / (STEP * self.slow)))):
            self.step += 1
            values = {"step_seconds": STEP * self.slow, **self.more}
            records.append(record(self.step, **values))
        self.productive += sum(r["step_seconds"] - r["data_wait_seconds"] for r in records)
        self.figures.hear(Logged(records, {"productive": self.productive}, self.starts), self.now)

    @property
    def on(self) -> list[str]:
        """The alerts that were told as begun, in their order."""
        return [alert.name for _, alert in self.told if not alert.is_over]


def watched(home: Path | str, **more: Any) -> Watched:
    """A run of the name a/run in this home. How full this machine's disk is does not alert."""
    settings: dict[str, Any] = {
        "alerts": AlertsConfig(disk=0.0), "track": (),
        "config": {"model": {"n_layer": 2}, "seed": 1},
    }  # fmt: skip
    return Watched("a/run", str(home), interval=lambda *_: None, **{**settings, **more})


@contextlib.contextmanager
def taking(answer: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address on this machine that takes JSON, and the list of what has come."""
    come: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            come.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(answer)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", come
    finally:
        server.shutdown()
        server.server_close()
