"""Differences between runs: which are more than noise, and what would tell the others apart."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from manta import statistics
from manta.statistics import LEVEL, Estimate

Pairs = Sequence[Sequence[float]]


class Run(Protocol):
    """What a comparison needs of a run (`entries.Entry` has it)."""

    name: str
    facts: dict[str, float]
    scores: dict[str, tuple[float, float]]
    each: dict[str, tuple[str | None, Any]]
    kind: str


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of two runs, or of two kinds of runs, in one figure."""

    what: str
    """The line's beginning: the figure and whose difference it is."""
    found: Estimate
    p: float
    """How often chance makes one as large; NaN: not known."""
    units: str
    """What the estimate comes from, as "paired documents"."""
    more: str | None
    """What more of would tell the two apart; None: no number of anything can be named."""
    remark: str = ""


def spread(pairs: Pairs, metric: str = "") -> float:
    """The standard error of (sum of values) / (sum of weights) over documents; 0: not known. For
    bits per byte it is in bits."""
    values, weights = zip(*pairs, strict=True)
    if len(pairs) < 2 or not sum(weights):
        return 0.0
    return statistics.ratio(values, weights).error / _unit(metric)


def is_mean(pairs: Pairs, metric: str, value: float) -> bool:
    """Whether the metric is the sum of the documents' values over the sum of their weights (a
    perplexity is not)."""
    values, weights = zip(*pairs, strict=True)
    mean = sum(values) / (sum(weights) or 1) / _unit(metric)
    return math.isclose(abs(mean), abs(value), rel_tol=1e-6, abs_tol=1e-9)


def _unit(metric: str) -> float:
    """Nats in one unit of the metric."""
    return math.log(2) if metric == "bits_per_byte" else 1.0


def _metric_of(key: str) -> str:
    """The metric in "task metric", or in "task metric (5-shot)"."""
    return key.partition(" (")[0].rpartition(" ")[2]


def differences(runs: Sequence[Run], losses: bool = True) -> Iterator[str]:
    """A line for each pair of runs and each score that both have, and, with `losses`, for the val
    losses of each pair of kinds of runs. All are one family: their p-values are corrected."""
    found = [
        _score(a, b, key)
        for a, b in itertools.combinations(runs, 2)
        for key in a.scores
        if key in b.scores
    ]
    if losses and _repeated(runs):
        found += _losses(runs)
    yield from _told(found)
    measured = [run for run in runs if "val loss" in run.facts]
    if losses and len(measured) > 1 and not _repeated(measured):
        yield (
            "val loss: how far two runs of one config differ by chance is not known: train each "
            "config with two seeds more (seed=1338, seed=1339, each with a name=), and compare all"
        )


def nearest(runs: Sequence[Run], references: Sequence[Run]) -> Iterator[str]:
    """A line for each score of each run, with the nearest published score."""
    found: list[Difference] = []
    for run in runs:
        for key, (value, error) in run.scores.items():
            known = [r for r in references if key in r.scores]
            if not known:
                continue
            near = min(known, key=lambda r: abs(r.scores[key][0] - value))
            theirs, their_error = near.scores[key]
            what = f"{key}: {run.name} {value:.4f}, nearest {near.name} {theirs:.4f}"
            apart = Estimate(value - theirs, _both(error, their_error), math.inf, 1)
            found.append(Difference(what, apart, apart.p_value(), "", None))
    yield from _told(found, in_full=False)


def _told(found: Sequence[Difference], in_full: bool = True) -> Iterator[str]:
    """The differences as lines, with p-values that are corrected for their number."""
    adjusted = statistics.holm([each.p for each in found])
    family = sum(not math.isnan(p) for p in adjusted)
    for each, p in zip(found, adjusted, strict=True):
        what = each.what
        if in_full:
            error = f" ± {each.found.error:.4f}" if not math.isnan(each.found.error) else ""
            what += f" = {each.found.value:+.4f}{error} ({each.units})"
        yield f"{what}: {_verdict(each, p, family)}"
    if family > 1:
        yield f"p-values are corrected for {family} comparisons (Holm)"


def _verdict(each: Difference, p: float, family: int) -> str:
    if math.isnan(p):
        return "no standard error is known"
    if p < 1 - LEVEL:
        return f"more than noise (p {_small(p)}){each.remark}"
    told = f"within noise (p {_small(p)})"
    if each.more is None:
        return told
    needed = each.found.needed(level=1 - (1 - LEVEL) / family)
    if needed is None:
        return told
    count = f"{statistics.rounded(needed - each.found.count):,}"
    return f"{told}; about {count} more {each.more} would tell them apart"


def _small(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"


def _both(a: float, b: float) -> float:
    """The standard error of a difference, from those of both sides; NaN if neither is known."""
    return math.hypot(a, b) or math.nan


def _score(a: Run, b: Run, key: str) -> Difference:
    """The difference of a score."""
    (x, x_error), (y, y_error) = a.scores[key], b.scores[key]
    (x_documents, x_pairs), (y_documents, y_pairs) = a.each[key], b.each[key]
    what = f"{key}: {b.name} - {a.name}"
    is_same = bool(x_documents) and x_documents == y_documents
    if is_same and x_pairs and y_pairs and len(x_pairs) == len(y_pairs):
        return _paired(what, y - x, x_pairs, y_pairs, _unit(_metric_of(key)))
    count = min(len(x_pairs), len(y_pairs)) if x_pairs and y_pairs else 1
    error = math.hypot(x_error, y_error) if x_error and y_error else math.nan
    found = Estimate(y - x, error, math.inf, count)
    more = "documents of each" if x_pairs and y_pairs else None
    return Difference(what, found, found.p_value(), "unpaired", more)


def _paired(what: str, value: float, a: Pairs, b: Pairs, unit: float) -> Difference:
    """The difference on the same documents, where what is hard for both adds no error."""
    apart = [q[0] - p[0] for p, q in zip(a, b, strict=True)]
    weights = [p[1] for p in a]
    units = f"paired, {len(apart):,} documents"
    if not sum(weights):
        return Difference(what, Estimate(value, math.nan, 0, len(a)), math.nan, units, None)
    found = statistics.ratio(apart, weights)
    found = dataclasses.replace(found, value=value, error=found.error / unit)
    p, remark = found.p_value(), ""
    if len(apart) > 1 and {v for pairs in (a, b) for v, _ in pairs} <= {0, 1}:
        p = statistics.mcnemar(apart.count(1), apart.count(-1))
    elif p < 1 - LEVEL and (rank := statistics.wilcoxon(apart)) > 1 - LEVEL:
        remark = f"; by ranks it is not (Wilcoxon, p = {rank:.2g}): a few documents make it"
    return Difference(what, found, p, units, "documents", remark)


def _repeated(runs: Sequence[Run]) -> bool:
    """Whether two of the runs differ in nothing but their seeds."""
    kinds = [run.kind for run in runs if run.kind and "val loss" in run.facts]
    return len(set(kinds)) < len(kinds)


def _losses(runs: Sequence[Run]) -> Iterator[Difference]:
    """The differences of val losses between kinds of runs, if one of them has several seeds; each
    kind is taken to spread like the others."""
    for key in ("val loss", "val bits per byte"):
        kinds: dict[str, list[Run]] = {}
        for run in runs:
            if key in run.facts:
                kinds.setdefault(run.kind or run.name, []).append(run)
        groups = list(kinds.values())
        values = [[run.facts[key] for run in group] for group in groups]
        within, degrees = statistics.pooled(values)
        for i, j in itertools.combinations(range(len(groups)), 2):
            counts = len(values[i]), len(values[j])
            apart = sum(values[j]) / counts[1] - sum(values[i]) / counts[0]
            error = within * math.sqrt(1 / counts[0] + 1 / counts[1])
            found = Estimate(apart, error, degrees, min(counts))
            what = f"{key}: {_named(groups[j])} - {_named(groups[i])}"
            units = f"{counts[1]} and {counts[0]} seeds"
            yield Difference(what, found, found.p_value(), units, "seeds of each")


def _named(group: Sequence[Run]) -> str:
    return group[0].name if len(group) == 1 else f"mean of {', '.join(run.name for run in group)}"
