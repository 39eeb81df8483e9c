"""Every metric that the board and the rules name is in a real scrape of real runs."""

import contextlib
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from helpers.common import tiny, tiny_arguments
from manta.config import load
from manta.evaluate.evaluate import evaluate
from manta.evaluate.settings import EvaluateConfig
from manta.monitor import board, watch
from manta.monitor.conditions import CONDITIONS
from manta.monitor.metrics import Metrics
from manta.sweep.settings import SweepConfig
from manta.sweep.sweep import sweep
from manta.train.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("ray_session")
SERIES = re.compile(r"^(ray_manta_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


@contextlib.contextmanager
def scraping() -> Iterator[dict[str, list[dict[str, str]]]]:
    """The labels of each series of Manta's that this machine's Ray has exported so far."""
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    seen: dict[str, list[dict[str, str]]] = {}
    end = threading.Event()

    def scrape() -> None:
        while not end.wait(2):
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10) as page:
                for name, labels, _ in SERIES.findall(page.read().decode()):
                    found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
                    seen.setdefault(name, []).append(found)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield seen
    finally:
        end.set()
        thread.join()


@pytest.mark.long
def test_every_metric_of_board_and_rules_is_in_a_scrape(
    prepared: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manta.monitor.figures.GOODPUT_SECONDS", 0.5)
    monkeypatch.setattr(watch, "TICK", 0.2)
    keys = ["name=scraped", "total_tokens=384000", "num_workers=2", "log_every=10"]
    keys += ["eval.every=500", "checkpoint.every=500"]
    c = tiny(prepared, corpus, *keys, "alerts.webhook=http://127.0.0.1:1/secret")
    folder = Path(c.run_folder)
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"tokens_per_second": 1000.0, "more": 1}))
    kept, gone = Metrics("kept"), Metrics("gone")
    for metrics in (kept, gone):
        metrics.publish({"score": 1.0}, task="a task", metric="b")
    del gone, metrics  # its series ends with it, and the other one's goes on
    with scraping() as seen:
        pretrain(c, print)
        evaluate(load(EvaluateConfig, [f"home={prepared}", "checkpoint=scraped", "limit=2"]))
        keys = [*tiny_arguments(prepared, corpus), "name=swept", "sweep.lr=[1e-3]"]
        sweep(load(SweepConfig, keys))
        queries = [query for panel in board.PANELS for query, _ in panel.queries]
        queries += [condition.expression for condition in CONDITIONS]
        wanted = {name for query in queries for name in re.findall(r"ray_manta_\w+", query)}
        until = time.monotonic() + 40
        while wanted - seen.keys() and time.monotonic() < until:  # Ray gathers them now and then
            time.sleep(1)
        seen.pop("ray_manta_score")
        time.sleep(5)
        assert {"kept"} <= {s["run"] for s in seen["ray_manta_score"]} <= {"kept", "scraped"}
    assert wanted - seen.keys() == set()
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files and not any(b"/secret" in file.read_bytes() for file in files)
    for name in wanted:
        assert all({"run", "rank", "job"} <= labels.keys() for labels in seen[name])
    assert {labels["rank"] for labels in seen["ray_manta_loss"]} == {"all"}
    assert {"start", "productive"} <= {s["cause"] for s in seen["ray_manta_time_seconds"]}
