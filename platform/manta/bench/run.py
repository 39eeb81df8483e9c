"""`bench`: measures one thing, prints a table, writes JSON."""

import dataclasses
from typing import Any

from manta import cluster, storage
from manta import config as configs
from manta.bench import data, overhead, tokenization
from manta.bench.settings import BenchConfig

BENCHES = {
    "overhead": (overhead.overhead, overhead.table),
    "data": (data.data, data.table),
    "tokenize": (tokenization.tokenize, tokenization.table),
}


def bench(c: BenchConfig) -> dict[str, Any]:
    """Measures, prints a table, writes JSON, returns the figures."""
    c = dataclasses.replace(c, home=c.home_folder)
    cluster.connect()
    cluster.require(1, c.cpus_per_worker, c.gpus_per_worker, c.wait_seconds)
    measure, table = BENCHES[c.what]
    result = {"what": c.what, **measure(c), "config": configs.to_dict(c)}
    print(table(result), flush=True)
    if c.json is not None:
        storage.write_json(storage.absolute(c.json), result)
        print(f"written to {c.json}")
    return result
