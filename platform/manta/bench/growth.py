"""Counts what grows with the number of workers, without running any: from the functions that a run
itself uses.

Scaling is weak: each worker has `tokens_per_batch` tokens of a step. What each worker reads, holds
or says must not grow with their number, or only until it reaches a bound; what is in one place (a
file, rank 0's memory) may grow in proportion. What the driver hears, and the metrics that are kept
of a run, must not grow at all. `BOUNDED`, `LINEAR` and `CONSTANT` name the rows of each kind, and a
test holds them to it.
"""

import dataclasses
import itertools
import json
import tempfile
import tracemalloc
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist

from manta import layout, storage
from manta.bench.settings import BenchConfig
from manta.data.order import Line, Order, Phase, make_stages, thousandths
from manta.data.prepare import MOST_SHARD_TOKENS, ROW_GROUP_TOKENS
from manta.data.stream import LANES_AT_ONCE
from manta.model.cost import weights
from manta.model.groups import GROUPS
from manta.model.memory import Setup, costs
from manta.model.shape import ModelConfig
from manta.monitor.metrics import series
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import fragments
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.faults.spikes import Detector
from manta.train.meter import Meter
from manta.train.objectives.next_token import NextToken
from manta.train.ranks import Rank
from manta.train.records.ledger import Ledger
from manta.train.run import Run
from manta.train.step.device import Device
from manta.train.step.muon import exchanged
from manta.train.validation import metrics_of
from manta.train.worker import open_logbook

WORKERS = (1, 8, 64, 512, 4096)
VOCABULARY = 50257  # of a model whose config has none
SHARDS = 4096  # of the simulated dataset: 275 billion tokens
TOKEN_BYTES = 2
STATES = ("exp_avg", "exp_avg_sq")  # AdamW's
STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)

BOUNDED = {
    "read": "read from storage in a step, bytes for each byte trained on",
    "requests": "requests to storage in a step",
    "plan": "memory of the plan of a window, bytes",
    "share": "a rank's entry for the index, bytes (stage 3)",
    "resumed_files": "files of the optimizer's state to read, same number of workers",
    "resumed_elsewhere": "the same, saved by twice as many workers",
    **{f"memory_{n}": f"memory by the cost model, bytes (stage {n})" for n in STAGES},
    "muon": "Muon's updates received in a step, bytes (stage 0)",
    **{f"index_{n}": f"index, which each worker reads, bytes (stage {n})" for n in STAGES},
}
CONSTANT = {
    "messages": "messages to the driver in a logged step",
    "series": "series of metrics of a run",
}
LINEAR = {
    "files": "files",
    "manifest": "manifest, bytes",
    "gathered": "entries on rank 0, bytes (stage 3)",
    "rank_series": "series of metrics of the ranks",
}


def growth(c: BenchConfig) -> dict[str, Any]:
    """Counts for the config's model, sequence length and batch."""
    model = c.expected_model
    model = dataclasses.replace(model, vocab_size=model.vocab_size or VOCABULARY)
    return {
        "tokens_per_worker": c.tokens_per_batch,
        "seq_len": c.sequence_length,
        "tensors": sum(w.count for w in weights(model)),
        "workers": list(WORKERS),
        "rows": [
            {
                **data(n, c.tokens_per_batch, c.sequence_length),
                **checkpoint(n, model),
                **memory(n, model, c.sequence_length),
                **speech(n, model, c),
            }
            for n in WORKERS
        ],
    }


def data(count: int, tokens_per_worker: int, seq_len: int) -> dict[str, float]:
    """What the worker in the middle reads of a window, in a step."""
    line = Line(np.full(SHARDS, MOST_SHARD_TOKENS), ROW_GROUP_TOKENS, seed=0)
    stages = make_stages({}, seq_len, count * tokens_per_worker)
    order = Order((line,), 0, seq_len, stages, (Phase(0, thousandths([1])),))
    window = order.window_at(1)
    tracemalloc.start()
    try:
        takes = order.takes(window, count // 2, count)
        _, plan = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    steps = window.stop_batch - window.first_batch
    groups, requests = set(), 0
    for at in range(0, len(takes), LANES_AT_ONCE):
        lanes = takes[at : at + LANES_AT_ONCE]
        first, last = lanes[0].first, lanes[-1].first + len(lanes[-1].rows)
        for s in line.segments(first * seq_len, last * seq_len + 1):
            row_groups = range(s.start // ROW_GROUP_TOKENS, -(-s.stop // ROW_GROUP_TOKENS))
            groups |= {(s.shard, group) for group in row_groups}
            requests += 1
    shards = {shard for shard, _ in groups}
    return {
        "read": len(groups) * ROW_GROUP_TOKENS / (steps * tokens_per_worker),
        # To open a shard takes two requests: its last bytes, and its footer.
        "requests": (requests + 2 * len(shards)) / steps,
        "plan": plan,
    }


def checkpoint(count: int, model: ModelConfig) -> dict[str, float]:
    """The sizes of a checkpoint's parts, and what a worker that resumes reads of them."""
    found: dict[str, float] = {}
    for stage in STAGES:
        shares = [_entry(rank, spans) for rank, spans in enumerate(_split(model, stage, count))]
        index = fragments.index_of(shares)
        found[f"index_{stage}"] = len(storage.encode_json(index))
    sizes = [len(json.dumps(share)) for share in shares]
    middle = count // 2
    names = [layout.WEIGHTS, layout.MODEL_CONFIG, layout.STATE, layout.ENCODING]
    names += [layout.OPTIMIZER_INDEX, *(f"{layout.OPTIMIZER}/{s['file']}" for s in shares)]
    entry = {"size": 1 << 30, "sha256": "0" * 64}
    halves = fragments.index_of(
        [_entry(rank, spans) for rank, spans in enumerate(_split(model, 3, 2 * count))]
    )
    mine = next(itertools.islice(_split(model, 3, count), middle, None))
    return {
        **found,
        "share": max(sizes),
        "gathered": count * max(sizes),
        "files": len(names) + 1,
        "manifest": len(storage.encode_json({"files": dict.fromkeys(names, entry)})),
        "resumed_files": len(_files(index, mine)),
        "resumed_elsewhere": len(_files(halves, mine)),
    }


def _tensors(model: ModelConfig) -> list[tuple[str, int, str]]:
    """The name, the size and the group of each weight."""
    return [
        (f"blocks.{i}.{w.kind}.{number}.weight", w.numel, w.group)
        for number, w in enumerate(weights(model))
        for i in range(w.count)
    ]


Spans = dict[str, tuple[int, int]]  # (start, size) in each weight


def _split(model: ModelConfig, stage: int, count: int) -> Iterator[Spans]:
    """Each rank's parts of the weights, as DeepSpeed splits them at this stage."""
    tensors = _tensors(model)
    lines = []
    for group in GROUPS:
        ours = [(name, size) for name, size, other in tensors if other == group]
        ends = np.cumsum([size for _, size in ours], dtype=np.int64)
        lines.append((ours, ends, -(-int(ends[-1]) // count) if len(ends) else 0))
    for rank in range(count):
        spans: Spans = {}
        if stage == 0:
            spans = {name: (0, size) for name, size, _ in tensors[rank::count]}
        elif stage == 3:
            for name, size, _ in tensors:
                part = -(-size // count)
                if rank * part < size:
                    spans[name] = (rank * part, min(part, size - rank * part))
        else:
            for ours, ends, each in lines:
                at = int(np.searchsorted(ends, rank * each, side="right"))
                while at < len(ours) and (begin := int(ends[at]) - ours[at][1]) < (rank + 1) * each:
                    start = max(rank * each, begin)
                    stop = min((rank + 1) * each, int(ends[at]))
                    spans[ours[at][0]] = (start - begin, stop - start)
                    at += 1
        yield spans


def _entry(rank: int, spans: Spans) -> dict[str, Any]:
    """What a rank says of its share; see `fragments.write`."""
    return {
        "file": layout.rank_file(rank),
        "starts": {name: start for name, (start, _) in spans.items()},
        "sizes": {name: dict.fromkeys(STATES, size) for name, (_, size) in spans.items()},
        "steps": dict.fromkeys(spans, 1000.0),
    }


def _files(index: dict[str, Any], spans: Spans) -> set[str]:
    """The files with these parts of the weights; as `fragments.files_for`."""
    return {
        file
        for name, (start, size) in spans.items()
        for run in index[name]["parts"][STATES[0]]
        for _, _, file in fragments.pieces(run, start, start + size)
    }


def memory(count: int, model: ModelConfig, seq_len: int) -> dict[str, float]:
    """A worker's memory at each stage, and the traffic of Muon's updates."""
    setups = {n: Setup(model, seq_len, num_workers=count, zero_stage=n) for n in STAGES}
    matrices = [w for w in weights(model) if w.group == "matrices" for _ in range(w.count)]
    shapes = tuple((w.shape[0], w.shape[1]) for w in matrices)
    return {
        **{f"memory_{n}": costs(setup).peak for n, setup in setups.items()},
        "muon": TOKEN_BYTES * exchanged(shapes, count),  # in bf16
    }


def speech(count: int, model: ModelConfig, c: BenchConfig) -> dict[str, float]:
    """What all ranks together say to the driver in a step that is logged, and how many series of
    metrics they keep, evaluations included. GPUs have three more."""
    c = dataclasses.replace(c, num_workers=count, tokens_per_batch=count * c.tokens_per_batch)
    said: list[str] = []
    kept: set[str] = set()
    each: set[tuple[int, str]] = set()
    device = Device(torch.device("cpu"), "fp32", measured=1e12, description="not used")
    objective = NextToken(cast(Tokenizer, None), document_mask=False)  # computes no loss here
    evaluated = metrics_of({"val": np.ones(4)}, objective, TrainState(), c)
    # Each rank logs by itself here: the group stands for theirs.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with tempfile.TemporaryDirectory(prefix="manta-") as folder:
            for rank in range(count):

                def publish(records: Sequence[dict[str, Any]]) -> None:
                    said.append("figures")  # for the driver, which keeps them
                    kept.update(series(records[-1]).values())

                place = Rank(rank, world_size=count, local_world_size=1)
                logbook = open_logbook(folder, place, said.append, 0, publish)
                run = SimpleNamespace(
                    config=c, model=model, device=device, state=TrainState(step=1),
                    objective=objective,
                    logbook=logbook, ledger=Ledger(None, 0.0), detector=Detector(c.spikes, {}),
                    log_fingerprint=c.data.log_fingerprint, may_skip=False,
                    publish=lambda found, rank=rank: each.update(
                        (rank, name) for name in series(found).values()
                    ),
                )  # fmt: skip
                meter = Meter(cast(Run, run))
                meter.record([{"loss": torch.tensor(1.0)}], 1.0, lr=1.0)
                meter.log()
                if logbook is not None:
                    logbook.log_metrics([evaluated])
                    logbook.close()
    finally:
        dist.destroy_process_group()
    return {"messages": len(said), "series": len(kept), "rank_series": len(each)}


def table(result: dict[str, Any]) -> str:
    rows, names = result["rows"], {**BOUNDED, **LINEAR, **CONSTANT}
    width = max(map(len, names.values()))
    lines = [
        f"{result['tokens_per_worker']:,} tokens of a step for each worker, sequences of "
        f"{result['seq_len']}, {result['tensors']} weights; counted, not measured",
        f"{'workers':<{width}}" + "".join(f"{n:>10,}" for n in result["workers"]),
    ]
    for title, kind in (("each worker", BOUNDED), ("all together", {**LINEAR, **CONSTANT})):
        lines.append(f"{title}:")
        lines += [
            f"{text:<{width}}" + "".join(f"{_short(row[key]):>10}" for row in rows)
            for key, text in kind.items()
        ]
    return "\n".join(lines)


def _short(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= unit:
            return f"{value / (1e3 if name == 'k' else unit):,.1f}{name}"
    return f"{value:,.2f}" if value < 100 and value % 1 else f"{value:,.0f}"
