"""Trackers: what a run logged is read back from W&B's, MLflow's and Trackio's own files, a resumed
run goes on in the same tracker run, and a tracker that is not there stops nothing."""

import importlib.util
import json
import math
import os
import sqlite3
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.watching import record, watched
from manta.config import from_dict
from manta.errors import ConfigError
from manta.messages import Logged
from manta.monitor import watch
from manta.monitor.trackers import tracker
from manta.monitor.watch import watching
from manta.train.settings import PretrainConfig

BLOCK = 1 << 15
Read = dict[int, dict[str, float]]


def track(home: Path, name: str, records: list[dict[str, Any]]) -> list[str]:
    """Watches a run that logs these records with a tracker; returns what was said."""
    said: list[str] = []
    with watching(watched(home, track=(name,)), said.append) as it:
        it.hear(Logged(records, {"productive": 1.0}, 1))
    return said


def pieces(data: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: LevelDB's log format, after seven bytes of its own. A piece has
    a checksum, its length and its type (whole, first, middle, last), and none crosses 32 kB."""
    assert data[:4] == b":W&B"
    at, found = 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        found += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield found
            found = b""


def of_wandb(folder: Path) -> Read:
    from wandb.proto import wandb_internal_pb2

    found: Read = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in pieces(file.read_bytes()):
            line = wandb_internal_pb2.Record()
            line.ParseFromString(data)
            items = {i.key or i.nested_key[0]: i.value_json for i in line.history.item}
            if items:
                values = {key: json.loads(value) for key, value in items.items()}
                found[values["step"]] = {k: float(v) for k, v in values.items()}
    return found


def of_mlflow(folder: Path) -> Read:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=folder.as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("manta").experiment_id])
    assert run.info.run_name == "a/run" and run.info.status == "FINISHED"
    assert run.data.params["model.n_layer"] == "2"
    found: Read = defaultdict(dict)
    for key in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, key):
            found[metric.step][key] = metric.value
    return dict(found)


def of_trackio(folder: Path) -> Read:
    with sqlite3.connect(folder / "manta.db") as db:
        rows = db.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, _, _ in rows} == {"a/run"}
    return {step: json.loads(metrics) for _, step, metrics in rows}


@pytest.mark.parametrize(
    ("name", "read"), [("wandb", of_wandb), ("mlflow", of_mlflow), ("trackio", of_trackio)]
)
def test_a_run_is_read_back_and_goes_on_in_the_same_one(
    name: str, read: Callable[[Path], Read], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: pip install 'manta[{name}]'")
    for variable in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))  # no key of a person's
    first = [record(n) for n in range(1, 4)] + [{"step": 3, "tokens": 1, "val_loss/a-b": 2.5}]
    said = track(tmp_path, name, first)
    assert len(said) == (name == "wandb") and all("kept offline" in line for line in said)
    file = tmp_path / "runs" / "a" / "run" / "trackers.json"
    kept = json.loads(file.read_text())
    assert kept.keys() == {name}
    track(tmp_path, name, [record(n, loss=math.nan) for n in range(3, 6)])
    assert json.loads(file.read_text()) == kept
    found = read(tmp_path / "trackers" / name)
    assert found.keys() == {1, 2, 3, 4, 5}
    assert found[2]["loss"] == record(2)["loss"] and found[1]["lr"] == 1e-3
    assert found[5]["tokens"] == record(5)["tokens"]


@pytest.mark.long
@pytest.mark.parametrize(("name", "words"), [("wandb", "kept offline"), ("mlflow", "goes on")])
def test_a_tracker_without_its_network_is_said_once(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: pip install 'manta[{name}]'")
    monkeypatch.setattr(watch, "CLOSING_SECONDS", 120.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    (line,) = track(tmp_path, name, [record(1), record(2)])
    assert words in line
    if name == "wandb":
        assert of_wandb(tmp_path / "trackers" / name).keys() == {1, 2}


def test_a_tracker_without_its_package_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio.py").write_text("raise ImportError('No module named trackio')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (line,) = track(tmp_path, "trackio", [record(1), record(2)])
    assert "pip install 'manta[trackio]'" in line and "training goes on" in line


def test_a_tracker_that_hangs_is_ended_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(watch, "CLOSING_SECONDS", 0.5)
    monkeypatch.setattr(tracker, "MOST_WAITING", 10)
    (line,) = track(tmp_path, "trackio", [record(n) for n in range(1, 10_000)])
    assert "some figures are missing there; training goes on" in line


@pytest.mark.parametrize("content", ["", "{", '{"wandb": 1}', "[]"])
def test_damaged_ids_are_said_and_replaced(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio.py").write_text("raise OSError('no network')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "runs" / "a" / "run"
    folder.mkdir(parents=True)
    (folder / "trackers.json").write_text(content)
    said = track(tmp_path, "trackio", [record(1)])
    assert "trackers.json" in said[0] and "new runs are begun" in said[0]
    assert "OSError: no network; training goes on" in said[1] and len(said) == 2


def test_a_tracker_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"track.*tensorboard.*wandb"):
        from_dict(PretrainConfig, {"track": ["tensorboard"]})
