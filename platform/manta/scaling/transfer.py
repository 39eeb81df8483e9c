"""What a learning rate that was found at one width is worth at others: the rate transfer, and the
coordinate check, each with `optimizer.reference_width` and without."""

import dataclasses
import math
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from manta import layout, ownership, storage
from manta.cluster import connection
from manta.data import mixture, prepare, shards
from manta.data.manifest import Manifest
from manta.errors import DataError
from manta.job import say
from manta.plot import Series, chart
from manta.scaling.coordinates import Growth, growth
from manta.scaling.ladder import cost, plain
from manta.scaling.points import from_run
from manta.scaling.powers import Optimum, optimum
from manta.scaling.settings import ScalingConfig
from manta.scaling.training import train
from manta.terminal import aligned
from manta.train.plan import with_vocabulary

Variant = Literal["with", "without"]
VARIANTS: tuple[Variant, ...] = ("with", "without")
NEAR_ZERO = 0.25  # an exponent: 1.2 times the size at twice the width


def widths(c: ScalingConfig) -> tuple[list[str], str, signal.Signals | None]:
    """The lines to show, the folder of the picture and of the figures, and the signal that stopped
    the training before its end, if one did.

    Raises:
        MantaError: what is asked for cannot be done.
    """
    folder = layout.scaling_folder(c.home_folder, c.name)
    names = f"{c.what}.png", f"{c.what}.json"
    ownership.refuse_links(folder, names)
    if c.what == "coordinates":
        lines, facts, picture = _coordinates(c)
    else:
        found, stopped_by = _trained(c)
        if stopped_by is not None:
            return [], folder, stopped_by
        lines, facts, picture = compared(c, found)
    with storage.writing(folder, "free some space there, then run the same command again"):
        storage.write_bytes(storage.join(folder, names[0]), picture)
        storage.write_json(storage.join(folder, names[1]), facts)
    return lines, folder, None


def variant(c: ScalingConfig, which: Variant) -> ScalingConfig:
    """The study with optimizer.reference_width or without, as a ladder with a name of its own."""
    optimizer = c.optimizer
    if which == "without":
        optimizer = dataclasses.replace(optimizer, reference_width=None)
    return dataclasses.replace(c, name=f"{c.name}/{which}", optimizer=optimizer)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss against rate at a width."""

    width: int
    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def best(self) -> Optimum:
        return optimum(self.rates, self.losses)


Curves = dict[Variant, list[Curve]]


def _trained(c: ScalingConfig) -> tuple[Curves, signal.Signals | None]:
    """Trains the runs of both variants; returns their losses, without those that diverged."""
    found: Curves = {}
    for which in VARIANTS:
        own = variant(c, which)
        names, stopped_by = train(own)
        if stopped_by is not None:
            return {}, stopped_by
        losses: dict[int, dict[float, float]] = {}
        for stem in cost(own).stems:
            run = stem.rungs[0].run
            there = losses.setdefault(run.model.n_embd, {})
            if run.name in names:
                there[run.optimizer.lr] = from_run(run.name, own.home_folder, own.count).point.loss
        found[which] = [
            Curve(width, tuple(sorted(there)), tuple(there[rate] for rate in sorted(there)))
            for width, there in sorted(losses.items())
            if there
        ]
    return found, None


def compared(c: ScalingConfig, found: Curves) -> tuple[list[str], dict[str, Any], bytes]:
    """The lines to show, the figures and the picture of the rate transfer."""
    lines = [f"best learning rate by width, after {c.ladder.tokens[0]:,} tokens:"]
    facts: dict[str, Any] = {}
    series: list[Series] = []
    every = sorted({curve.width for curves in found.values() for curve in curves})
    rows = [["", *(f"width {width}" for width in every), "grows as"]]
    for which, curves in found.items():
        best = {curve.width: curve.best for curve in curves}
        marks = [f"{b.value:.2g}{'*' if b.is_edge else ''}" for b in best.values()]
        shown = dict(zip(best, marks, strict=True))
        drift = _drift([*best], [b.value for b in best.values()])
        of_all = (shown.get(width, "none") for width in every)  # none: all rates diverged
        rows.append([_named(c, which), *of_all, f"width^{drift:.2f}"])
        facts[which] = {
            "exponent": drift,
            "curves": [
                {**dataclasses.asdict(k), "best": k.best.value, "at_edge": k.best.is_edge}
                for k in curves
            ],
        }
        for curve in curves:
            color = every.index(curve.width)
            look: Literal["line", "dashed"] = "line" if which == "with" else "dashed"
            label = f"width {curve.width}" if which == "with" else ""
            series.append(Series(label, curve.rates, curve.losses, look, color))
            lowest = min(curve.losses)
            series.append(Series("", [curve.best.value], [lowest], "points", color))
    lines += aligned(rows)
    if any(curve.best.is_edge for curves in found.values() for curve in curves):
        lines.append("* at the edge of the rates tried: a better one may be beyond it")
    lines += [f"a rate of one width at the others, {text}" for text in _regret(c, found)]
    series.append(Series("without reference_width", [], [], "dashed", None))
    title = f"Loss against learning rate, reference_width={c.optimizer.reference_width}"
    return (
        lines,
        facts,
        chart(series, title, "learning rate", "val loss", ticks=sorted(c.ladder.lr)),
    )


def _regret(c: ScalingConfig, found: Curves) -> Iterator[str]:
    """What the narrowest width's best rate, among those tried, costs at the widest."""
    for which, curves in found.items():
        if len(curves) < 2:
            continue
        narrow, wide = curves[0], curves[-1]
        rate = narrow.rates[int(np.argmin(narrow.losses))]
        if rate in wide.rates:
            more = wide.losses[wide.rates.index(rate)] - min(wide.losses)
            yield (
                f"{_named(c, which)}: {rate:g}, the best at width {narrow.width}, costs {more:.4f} "
                f"nats at width {wide.width}"
            )


def _coordinates(c: ScalingConfig) -> tuple[list[str], dict[str, Any], bytes]:
    if not c.data.mix and prepare.find(c.data, c.home_folder) is None:
        connection.connect(name=c.name)  # which prepares the data
    manifest = mixture.open_datasets(c.data, c.home_folder, say)[0]
    found = {which: _grown(variant(c, which), manifest) for which in VARIANTS}
    steps = c.coordinates.steps
    lines = [f"growth of mean absolute activations with the width, after {steps} steps:"]
    rows = [["", *(_named(c, which) for which in found)]]
    exponents = {which: grown.exponents(steps) for which, grown in found.items()}
    for name in exponents["with"]:
        powers = (each.get(name, math.nan) for each in exponents.values())
        rows.append([name, *(f"width^{power:.2f}" for power in powers)])
    lines += aligned(rows)
    for which, each in exponents.items():
        middle, ends = float(np.median([*each.values()])), (min(each.values()), max(each.values()))
        is_flat = abs(middle) <= NEAR_ZERO
        lines.append(
            f"{_named(c, which)}: median width^{middle:.2f} ({ends[0]:.2f} to {ends[1]:.2f}), "
            f"so sizes {'hardly depend' if is_flat else 'depend'} on the width"
        )
    facts: dict[str, Any] = {
        which: {
            "widths": list(grown.widths),
            "exponents": [grown.exponents(step) for step in range(steps + 1)],
            "mean_absolute": {name: v.tolist() for name, v in grown.sizes.items()},
        }
        for which, grown in found.items()
    }
    return lines, facts, _drawn(c, found)


def _grown(c: ScalingConfig, manifest: Manifest) -> Growth:
    tokenizer = manifest.load_tokenizer()
    runs = [
        dataclasses.replace(run, model=with_vocabulary(run.model, tokenizer)) for run in plain(c)
    ]
    steps, batch = c.coordinates.steps, runs[0].tokens_per_batch
    rows = batch // runs[0].sequence_length
    needed = (steps + 1) * rows * (runs[0].sequence_length + 1)
    tokens = shards.split_tokens(manifest, "train", needed)
    if len(tokens) < needed:
        raise DataError(
            f"coordinates.steps={steps}: {needed:,} tokens are needed, and the train split has "
            f"{len(tokens):,}; take fewer steps, or a smaller tokens_per_batch"
        )
    runs.sort(key=lambda run: run.model.n_embd)
    ids = torch.from_numpy(tokens.astype(np.int64))
    return growth(runs, ids, steps, c.coordinates.seeds)


def _drawn(c: ScalingConfig, found: dict[Variant, Growth]) -> bytes:
    """The sizes after the last step against the width."""
    series = []
    for which, grown in found.items():
        for color, (name, values) in enumerate(grown.sizes.items()):
            look: Literal["line", "dashed"] = "line" if which == "with" else "dashed"
            label = name if which == "with" else ""
            series.append(Series(label, grown.widths, values[:, -1], look, color))
    series.append(Series("without reference_width", [], [], "dashed", None))
    title = (
        f"Activations after {c.coordinates.steps} steps, "
        f"reference_width={c.optimizer.reference_width}"
    )
    ticks = found["with"].widths
    return chart(series, title, "width (n_embd)", "mean absolute value", log_y=True, ticks=ticks)


def _named(c: ScalingConfig, which: Variant) -> str:
    return f"reference_width={c.optimizer.reference_width if which == 'with' else 'null'}"


def _drift(x: Sequence[int], y: Sequence[float]) -> float:
    """The power of x with which y grows; NaN for fewer than two."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else math.nan
