"""`bench`: measures one thing, prints a table, writes JSON."""

import dataclasses
import importlib
from typing import Any

from manta import config as configs
from manta import storage
from manta.bench.settings import ON_RAY, BenchConfig
from manta.errors import ConfigError, DataError

# The module of each bench and its function, which takes the config. A module is imported only when
# its bench runs, as not all of them need Ray.
BENCHES = {
    "model": ("model", "model"),
    "scaling": ("scaling", "scaling"),
    "growth": ("growth", "growth"),
    "conversations": ("conversations", "measure"),
    "overhead": ("overhead", "overhead"),
    "data": ("data", "data"),
    "tokenize": ("tokenization", "tokenize"),
    "checkpoint": ("checkpoints", "checkpoints"),
    "evaluate": ("evaluation", "evaluation"),
    "generate": ("generation", "generation"),
    "serve": ("serve", "serve"),
    "serve_http": ("serve_http", "serve_http"),
    "memory": ("stages", "stages"),
    "sweeps": ("sweeps", "sweeps"),
    "lanes": ("lanes", "lanes"),
    "calibrate": ("calibrate", "calibrate"),
    "peaks": ("peaks", "peaks"),
    "metrics": ("metrics", "metrics"),
    "gpu": ("gpu", "gpu"),
}


def bench(c: BenchConfig) -> dict[str, Any]:
    """Measures, prints a table, writes JSON, returns the figures."""
    c = dataclasses.replace(c, home=c.home_folder)
    if c.json is not None:
        _refuse_another_file(c.json)
    if c.what in ON_RAY:
        from manta.cluster import capacity, connection

        connection.connect()
        workers = c.most_workers if c.what == "overhead" else 1
        capacity.require(workers, c.cpus_per_worker, c.gpus_per_worker, c.wait_seconds)
    name, function = BENCHES[c.what]
    module = importlib.import_module(f"manta.bench.{name}")
    result = {"what": c.what, **getattr(module, function)(c), "config": configs.to_dict(c)}
    print(module.table(result), flush=True)
    if c.json is not None:
        storage.write_json(storage.absolute(c.json), result)
        print(f"written to {c.json}")
    return result


def _refuse_another_file(path: str) -> None:
    """Raises ConfigError if something is at `json=` that is not the figures of an earlier bench."""
    if not storage.exists(storage.absolute(path)):
        return
    try:
        found = storage.read_json(storage.absolute(path))
    except (DataError, OSError):
        found = None
    if not isinstance(found, dict) or not ({"config", "parts"} & found.keys()):
        raise ConfigError(
            f"json={path}: something else than figures of a bench is there, and stays; give "
            "another json="
        )
