"""Compares runs: budgets, losses, scores, and which differences are more than noise."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from manta import layout, ownership, plot, storage
from manta.config import Count, PositiveFloat, config
from manta.errors import ConfigError
from manta.evaluate import catalog, report
from manta.model.cost import flops_per_token
from manta.model.families import num_parameters
from manta.storage import HomeConfig
from manta.terminal import aligned
from manta.train.checkpoints import checkpoint as checkpoints
from manta.train.records import ledger
from manta.train.records.logbook import evaluations, read_metrics
from manta.train.settings import load_run_config

REFERENCES = catalog.FOLDER / "references.json"
NOISE = 1.96  # standard errors; chance alone gives a larger difference one time in twenty
HELLASWAG_ROWS = 10_042
MOST_RUNS = 12


@config
class CompareConfig(HomeConfig):
    runs: tuple[str, ...] = ()
    """Names or folders of runs; empty: every run that has a checkpoint."""
    price_per_hour: PositiveFloat | None = None
    """Price of an hour of the machine or cluster, for `cost`; null: `cost` is not shown."""
    references: bool = True
    """Show published figures too, with their sources."""
    limit: Count | None = None
    """Compare the scores of evaluations with this limit=; null: of whole evaluations."""
    out: str | None = None
    """Path of the picture; null: compare.png in the home's folder of runs."""
    overwrite: bool = False
    """Replace what an earlier comparison wrote at the given `out`, if it is still as written."""


@dataclasses.dataclass
class Entry:
    """A run, or the published figures of a model."""

    name: str
    facts: dict[str, float] = dataclasses.field(default_factory=dict)
    """parameters, tokens, FLOPs, hours, cost, val loss, val bits per byte: those known."""
    scores: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """(value, standard error; 0: not known) by "task metric"."""
    each: dict[str, tuple[str | None, Any]] = dataclasses.field(default_factory=dict)
    """(sha256 of the documents, what each document adds; None: not known) by "task metric"."""
    curves: dict[str, list[tuple[int, float]]] = dataclasses.field(default_factory=dict)
    """(tokens, value) points of each figure, for the picture."""
    data: tuple[str, ...] = ()
    """The datasets on whose val splits the run was measured."""
    sample: dict[str, int] = dataclasses.field(default_factory=dict)
    """The sample of these splits that was measured (`TrainState.val_sample`)."""
    steps: tuple[int, int] | None = None
    """The step at which val loss was measured, and the one that the run has come to."""
    sources: tuple[str, ...] = ()
    """Publications that the figures come from."""


def compare(c: CompareConfig) -> tuple[list[str], str]:
    """The lines to show, and the picture's path.

    Raises:
        MantaError: a run does not exist, or the picture cannot be made at its path.
    """
    home = c.home_folder
    names = list(c.runs) or checkpoints.names_of_runs(home)
    if not names:
        raise checkpoints.not_found("runs=[]", home)
    if len(names) > MOST_RUNS:
        raise ConfigError(
            f"{len(names)} runs are too many to read: name up to {MOST_RUNS}, runs=[a,b]"
        )
    overwrite = c.overwrite or c.out is None
    default = storage.join(layout.runs_folder(home), layout.COMPARISON)
    out = ownership.new_file(c.out, default, overwrite)
    runs = [entry(name, home, c) for name in names]
    references = published() if c.references else []
    lines = [*table(runs), *other_data(runs), *older_losses(runs)]
    if found := list(differences(runs)):
        lines += ["", *found]
    if references:
        known = {key for run in runs for key in run.scores}
        shown = [r for r in references if known & r.scores.keys()] or references
        lines += ["", "published", *table(shown), *sources(shown), "", *nearest(runs, shown)]
    with storage.writing(str(out), "free some space there, or give another out="):
        storage.write_bytes(str(out), picture(runs, references))
        if c.out is not None:
            ownership.record(out)
    return [line.rstrip() for line in lines], str(out)


def entry(name: str, home: str, c: CompareConfig) -> Entry:
    """What is known about a run. Raises CheckpointError if no run has this name."""
    path = checkpoints.resolve(name, home, "runs")
    run = layout.split_checkpoint(path)[0]
    model = checkpoints.load_model_config(path)
    state = checkpoints.load_state(path)
    found = Entry(name, data=tuple(state.datasets), sample=state.val_sample)
    found.facts["parameters"] = num_parameters(model)
    settings = load_run_config(run)
    if settings and (tokens := settings.tokens_before(state.step)):
        found.facts["tokens"] = tokens
        length, which = settings.sequence_length, settings.trainable
        found.facts["FLOPs"] = tokens * flops_per_token(model, length, which, settings.lora)
    hours = ledger.seconds_of(run) / 3600
    if hours:
        found.facts["hours"] = hours
        if c.price_per_hour is not None:
            found.facts["cost"] = hours * c.price_per_hour
    records = evaluations(read_metrics(storage.join(run, layout.METRICS)), state.step)
    if records:
        found.steps = records[-1]["step"], state.step
        found.facts["val loss"] = float(records[-1]["val_loss"])
        if records[-1].get("val_bpb") is not None:
            found.facts["val bits per byte"] = float(records[-1]["val_bpb"])
        for key, field in (("val loss", "val_loss"), ("val bits per byte", "val_bpb")):
            points = [(r["tokens"], float(r[field])) for r in records if r.get(field) is not None]
            if points:
                found.curves[key] = points
    _add_scores(found, run, c)
    return found


def _add_scores(found: Entry, run: str, c: CompareConfig) -> None:
    """Adds each score to `found`, from the newest checkpoint that has it."""
    for scores in report.all_of(run):  # by step
        if scores.get("limit") != c.limit or scores.get("dtype") != "fp32":
            continue
        each = report.read_documents(run, scores["at"], scores["label"])
        for task, metric, value, error in report.figures(scores["results"], once=True):
            key = score_name(task, metric) + report.variant_of(scores["label"])
            pairs: Any = each.get(task, {}).get(metric)
            if not pairs or isinstance(pairs, str) or not is_mean(pairs, metric, value):
                pairs = None
            if pairs and not error:
                error = spread(pairs, metric)
            found.scores[key] = (value, error)
            documents = each.get(task, {}).get("documents")
            found.each[key] = (documents if isinstance(documents, str) else None, pairs)
            if scores.get("tokens") is not None:
                found.curves.setdefault(key, []).append((scores["tokens"], value))


def score_name(task: str, metric: str) -> str:
    return task if task == metric else f"{task} {metric}"


def published() -> list[Entry]:
    """The references, each with its sources."""
    found = []
    for row in json.loads(REFERENCES.read_text()):
        facts = {"parameters": row["parameters"]}
        made = Entry(row["name"], facts, sources=tuple(row["sources"]))
        for key, name in (("tokens", "tokens"), ("hours", "hours"), ("val_loss", "val loss")):
            if key in row:
                made.facts[name] = row[key]
        for key, value in row["scores"].items():
            rows = HELLASWAG_ROWS if key.startswith("hellaswag") else 0
            error = math.sqrt(value * (1 - value) / rows) if rows else 0.0
            made.scores[key] = (value, error)
        found.append(made)
    return found


def sources(entries: Sequence[Entry]) -> list[str]:
    return [f"  {entry.name}: {'; '.join(entry.sources)}" for entry in entries]


FACTS = ("parameters", "tokens", "FLOPs", "hours", "cost", "val loss", "val bits per byte")


def table(entries: Sequence[Entry]) -> list[str]:
    """A table with a column for each entry and a row for each figure."""
    facts = [key for key in FACTS if any(key in e.facts for e in entries)]
    scores = list(dict.fromkeys(key for e in entries for key in e.scores))
    rows = [["", *(e.name for e in entries)]]
    rows += [[key, *(_fact(key, e.facts.get(key)) for e in entries)] for key in facts]
    rows += [[key, *(_score(e.scores.get(key)) for e in entries)] for key in scores]
    return aligned(rows)


def other_data(runs: Sequence[Entry]) -> Iterator[str]:
    """A line that says if the val losses were measured on different texts."""
    measured = [run for run in runs if "val loss" in run.facts]
    data = {run.data for run in measured}
    if len(data) > 1:
        each = "; ".join(
            f"{run.name}: {', '.join(d.rpartition('/')[2] for d in run.data)}" for run in runs
        )
        yield f"val loss and val bits per byte are on different texts: do not compare them ({each})"
    elif any(run.sample != measured[0].sample for run in measured):
        each = "; ".join(
            f"{run.name}: "
            + (f"{sum(run.sample.values()):,} tokens" if run.sample else "the split's beginning")
            for run in measured
        )
        yield (
            "val loss and val bits per byte are on different samples of the val split "
            f"(eval.tokens): do not compare them ({each})"
        )


def older_losses(runs: Sequence[Entry]) -> Iterator[str]:
    """A line that says which val losses are of an earlier step than the rest of the table."""
    older = [(run.name, *run.steps) for run in runs if run.steps and run.steps[0] < run.steps[1]]
    if older:
        each = "; ".join(f"{name}: of step {was}, not {step}" for name, was, step in older)
        yield f"val loss and val bits per byte were measured before the run's last step ({each})"


def _fact(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in ("parameters", "tokens", "FLOPs"):
        for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if key != "FLOPs" and value >= size:
                return f"{value / size:.4g}{letter}"
        return f"{value:.2e}" if key == "FLOPs" else f"{value:.0f}"
    return f"{value:.2f}" if key in ("hours", "cost") else f"{value:.4f}"


def _score(score: tuple[float, float] | None) -> str:
    if score is None:
        return "-"
    value, error = score
    return f"{value:.4f}" + (f" ±{error:.4f}" if error else "")


def spread(pairs: Sequence[Sequence[float]], metric: str = "") -> float:
    """The standard error of (sum of values) / (sum of weights) for documents drawn at random: that
    of a ratio estimator (Cochran 1977, 6.4). For bits per byte it is in bits."""
    values, weights = zip(*pairs, strict=True)
    total, count = sum(weights), len(pairs)
    if count < 2 or not total:
        return 0.0
    ratio = sum(values) / total
    differences = ((v - ratio * w) for v, w in pairs)
    squares = sum(d * d for d in differences)  # (** raises an error where * gives infinity)
    return math.sqrt(squares * count / (count - 1)) / total / _unit(metric)


def is_mean(pairs: Sequence[Sequence[float]], metric: str, value: float) -> bool:
    """Whether the metric is the sum of the documents' values over the sum of their weights (a
    perplexity is not)."""
    values, weights = zip(*pairs, strict=True)
    mean = sum(values) / (sum(weights) or 1) / _unit(metric)
    return math.isclose(abs(mean), abs(value), rel_tol=1e-6, abs_tol=1e-9)


def _unit(metric: str) -> float:
    """Nats in one unit of the metric."""
    return math.log(2) if metric == "bits_per_byte" else 1.0


def differences(runs: Sequence[Entry]) -> Iterator[str]:
    """A line for each pair of runs and each score that both have."""
    for a, b in itertools.combinations(runs, 2):
        for key in a.scores:
            if key not in b.scores:
                continue
            yield _difference(a, b, key)


def _difference(a: Entry, b: Entry, key: str) -> str:
    (x, x_error), (y, y_error) = a.scores[key], b.scores[key]
    (x_documents, x_pairs), (y_documents, y_pairs) = a.each[key], b.each[key]
    is_same = bool(x_documents) and x_documents == y_documents
    if is_same and x_pairs and y_pairs and len(x_pairs) == len(y_pairs):
        # On the same documents, what is hard for both runs adds nothing to the difference.
        pairs = [(q[0] - p[0], p[1]) for p, q in zip(x_pairs, y_pairs, strict=True)]
        error, how = spread(pairs, _metric_of(key)), f"paired, {len(pairs):,} documents"
    elif x_error and y_error:
        error, how = math.hypot(x_error, y_error), "unpaired"
    else:
        return f"{key}: {b.name} - {a.name} = {y - x:+.4f} (no standard error is known)"
    return (
        f"{key}: {b.name} - {a.name} = {y - x:+.4f} ± {error:.4f} ({how}): {_verdict(y - x, error)}"
    )


def _metric_of(key: str) -> str:
    """The metric in "task metric", or in "task metric (5-shot)"."""
    return key.partition(" (")[0].rpartition(" ")[2]


def _verdict(difference: float, error: float) -> str:
    if difference == 0 or abs(difference) < NOISE * error:
        return "within noise"
    if not error:
        return "more than noise"
    return f"more than noise ({abs(difference) / error:.1f} standard errors)"


def nearest(runs: Sequence[Entry], references: Sequence[Entry]) -> Iterator[str]:
    """A line for each score of each run, with the nearest published score."""
    for run in runs:
        for key, (value, error) in run.scores.items():
            known = [r for r in references if key in r.scores]
            if not known:
                continue
            near = min(known, key=lambda r: abs(r.scores[key][0] - value))
            theirs, their_error = near.scores[key]
            line = f"{key}: {run.name} {value:.4f}, nearest {near.name} {theirs:.4f}"
            both = math.hypot(error, their_error)
            yield f"{line}: {_verdict(value - theirs, both)}" if both else line


def picture(runs: Sequence[Entry], references: Sequence[Entry]) -> bytes:
    """A picture with a panel for each figure: all runs against tokens, and published scores."""
    keys = list(dict.fromkeys(key for run in runs for key in run.curves))
    panels = {key: {run.name: run.curves[key] for run in runs if key in run.curves} for key in keys}
    lines: Mapping[str, dict[str, float]] = {
        key: {r.name: r.scores[key][0] for r in references if key in r.scores} for key in keys
    }
    return plot.side_by_side(panels, lines, "Runs side by side")
