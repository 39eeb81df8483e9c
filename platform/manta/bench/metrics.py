"""What a run's metrics, alerts and trackers cost: in a rank's step, and in the driver."""

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch

from manta.bench.settings import BenchConfig
from manta.messages import Logged
from manta.monitor.metrics import Metrics
from manta.monitor.settings import AlertsConfig
from manta.monitor.watch import Watch, Watched
from manta.train.meter import of_rank
from manta.train.records.ledger import Ledger

STEPS = (0.005, 0.05, 0.5)  # seconds
TIMES = 1000

ROWS = {
    "rank": "each rank, a line of the log: its own numbers",
    "told": "rank 0 too: what it tells the driver",
    "sent": "rank 0's thread that sends it",
    "heard": "the driver, a line of the log",
    "looked": "the driver, a look at all figures (every 5 s)",
}


def metrics(c: BenchConfig) -> dict[str, Any]:
    """Median microseconds of each part, for a line of the log every `log_every` steps."""
    names = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "mfu_of_measured", "goodput")
    records = [
        {"step": n, "tokens": 2048 * n, "step_seconds": 0.1, "data_wait_seconds": 0.001}
        | dict.fromkeys(names, 0.5)
        for n in range(1, c.log_every + 1)
    ]
    ledger, queue = Ledger(None, 0.0), SimpleQueue[Logged]()
    own = Metrics("bench", 0)
    message = Logged(records, ledger.seconds, 1)
    with tempfile.TemporaryDirectory(prefix="manta-") as home:
        run = Watched("bench", home, AlertsConfig(), (), {}, lambda *_: None)
        watch = Watch(run, lambda _: None)
        found = {
            "rank": timed(lambda: own.publish(of_rank(torch.device("cpu"), records[-1]))),
            "told": timed(lambda: queue.put(Logged([*records], ledger.seconds, ledger.starts))),
            "sent": timed(lambda: pickle.dumps(message)),
            "heard": timed(lambda: watch.hear(message)),
            "looked": timed(watch._look),
        }
        watch.end()
    each = sum(found[name] for name in ("rank", "told", "sent")) / c.log_every / 1e6
    return {"microseconds": found, "log_every": c.log_every, "shares": [each / s for s in STEPS]}


def timed(act: Callable[[], Any]) -> float:
    """Median microseconds of a call."""
    seconds = []
    for _ in range(TIMES):
        started = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - started)
    return 1e6 * statistics.median(seconds)


def table(result: dict[str, Any]) -> str:
    width = max(map(len, ROWS.values()))
    lines = [f"{text:<{width}}{result['microseconds'][k]:>9.1f} us" for k, text in ROWS.items()]
    for step, share in zip(STEPS, result["shares"], strict=True):
        text = f"share of a step of {1000 * step:g} ms, {result['log_every']} steps a line"
        lines.append(f"{text:<{width}}{share:>12.4%}")
    return "\n".join(lines)
