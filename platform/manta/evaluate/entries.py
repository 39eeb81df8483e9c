"""The columns of a comparison: runs, and models with published figures."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from manta import config as configs
from manta import layout, storage
from manta.evaluate import catalog, report
from manta.evaluate.differences import is_mean, spread
from manta.model.cost import flops_per_token
from manta.model.families import num_parameters
from manta.train.checkpoints import checkpoint as checkpoints
from manta.train.records import ledger
from manta.train.records.logbook import evaluations, read_metrics
from manta.train.settings import load_run_config

REFERENCES = catalog.FOLDER / "references.json"
HELLASWAG_ROWS = 10_042
OWN = {
    "name", "home", "seed", "resume", "num_workers", "cpus_per_worker", "gpus_per_worker",
    "threads_per_worker", "wait_seconds", "max_failures", "out_of_memory", "hang_seconds",
    "log_every", "sample", "checkpoint",
}  # fmt: skip


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
    curves: dict[str, list[tuple[int, float, float]]] = dataclasses.field(default_factory=dict)
    """(tokens, value, standard error; 0: not known) points of each figure, for the picture."""
    data: tuple[str, ...] = ()
    """The datasets on whose val splits the run was measured."""
    sample: dict[str, int] = dataclasses.field(default_factory=dict)
    """The sample of these splits that was measured (`TrainState.val_sample`)."""
    steps: tuple[int, int] | None = None
    """The step at which val loss was measured, and the one that the run has come to."""
    kind: str = ""
    """The run's config without its name and its seed, as text; empty: not known."""
    sources: tuple[str, ...] = ()
    """Publications that the figures come from."""


def entry(name: str, path: str, price_per_hour: float | None, limit: int | None) -> Entry:
    """What is known about a run, at its checkpoint of this path.

    Args:
        limit: counts the scores of evaluations with this limit=; None: whole evaluations.
    """
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
    if settings:
        found.kind = kind_of(settings)
    hours = ledger.seconds_of(run) / 3600
    if hours:
        found.facts["hours"] = hours
        if price_per_hour is not None:
            found.facts["cost"] = hours * price_per_hour
    records = evaluations(read_metrics(storage.join(run, layout.METRICS)), state.step)
    if records:
        found.steps = records[-1]["step"], state.step
        found.facts["val loss"] = float(records[-1]["val_loss"])
        if records[-1].get("val_bpb") is not None:
            found.facts["val bits per byte"] = float(records[-1]["val_bpb"])
        for key, field in (("val loss", "val_loss"), ("val bits per byte", "val_bpb")):
            points = [
                (r["tokens"], float(r[field]), 0.0) for r in records if r.get(field) is not None
            ]
            if points:
                found.curves[key] = points
    _add_scores(found, run, limit)
    return found


def kind_of(settings: Any) -> str:
    """A run's config as text, without what only tells it from a run of the same kind: its name, its
    seed, where it is kept, and how its workers run."""
    tree = configs.to_dict(settings)
    return json.dumps({key: value for key, value in tree.items() if key not in OWN})


def _add_scores(found: Entry, run: str, limit: int | None) -> None:
    """Adds each score to `found`, from the newest checkpoint that has it."""
    for scores in report.all_of(run):  # by step
        if scores.get("limit") != limit or scores.get("dtype") != "fp32":
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
                found.curves.setdefault(key, []).append((scores["tokens"], value, error or 0.0))


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
