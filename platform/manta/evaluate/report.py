"""Writes, reads and shows scores: a file for each suite and checkpoint, a table, a curve,
TensorBoard."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from manta import config as configs
from manta import foreign, layout, ownership, plot, storage
from manta.errors import DataError, MantaError
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.suites import Results, Scores
from manta.foreign import Finite, Whole
from manta.job import hint_once
from manta.train.checkpoints import checkpoint as checkpoints
from manta.train.records.logbook import write_scalars
from manta.train.settings import load_run_config

REMEDY = "delete the file to evaluate again"

# Parts of a label that name another way to ask a task.
WAYS, SHOT = ("chat", "system-", "seed-"), "-shot"

# Metrics that only restate another one.
SAME = ("byte_perplexity", "word_perplexity", "token_perplexity")


def label_of(c: EvaluateConfig, unit: str) -> str:
    """The name of the scores of a suite or task. Scores of a part, or with other settings, have a
    name of their own and so do not replace those of the whole."""
    parts = [unit]
    if unit.startswith("task-") and c.num_fewshot is not None:
        parts.append(f"{c.num_fewshot}-shot")
    if unit.startswith("task-") and c.seed:
        parts.append(f"seed-{c.seed}")
    if c.chat:
        parts.append("chat" if c.fewshot_as_multiturn else "chat-one-turn")
    if c.system is not None:
        parts.append(f"system-{storage.sha256_of(c.system.encode())[:8]}")
    if c.limit is not None:
        parts.append(f"limit-{c.limit}")
    if c.dtype != "fp32":
        parts.append(c.dtype)
    return ".".join(parts)


def variant_of(label: str) -> str:
    """What a label says of the way in which a task was asked: "", or " (5-shot, chat)"."""
    ways = [part for part in label.split(".")[1:] if part.startswith(WAYS) or part.endswith(SHOT)]
    return f" ({', '.join(ways)})" if ways else ""


class Figure(NamedTuple):
    task: str
    metric: str
    value: float
    error: float
    """Standard error of the value; 0: not known."""


def figures(results: Results, *, once: bool = False) -> Iterator[Figure]:
    """Each metric of each task; with `once`, without metrics that only restate another one."""
    for task, values in results.items():
        for metric, value in values.items():
            if metric == "samples" or metric.endswith("_stderr") or (once and metric in SAME):
                continue
            yield Figure(task, metric, value, values.get(f"{metric}_stderr") or 0.0)


def write(c: EvaluateConfig, path: str, unit: str, scores: Scores, seconds: float) -> str:
    """Writes the scores of the checkpoint at `path` to a file, and to TensorBoard; returns the path
    of the file."""
    run, name = layout.split_checkpoint(path)
    step = checkpoints.load_state(path).step
    settings = load_run_config(run)
    tokens = settings.tokens_before(step) if settings else None
    content = {
        "suite": unit,
        "checkpoint": path,
        "step": step,
        "tokens": tokens,
        "limit": c.limit,
        "dtype": c.dtype,
        "asked": asked(c),
        "results": scores.results,
        "seconds": seconds,
    }
    label = label_of(c, unit)
    file = layout.scores_file(run, name, label)
    ownership.refuse_links(run, layout.RUN_NAMES)
    each = json.dumps(scores.each, separators=(",", ":")).encode()
    storage.write_bytes(layout.scored_documents_file(run, name, label), each)
    storage.write_json(file, content)
    if tokens is not None:
        scalars = {f"evals/{f.task}/{f.metric}": f.value for f in figures(scores.results)}
        write_scalars(run, layout.EVALS, scalars, tokens)
    return file


def asked(c: EvaluateConfig) -> dict[str, Any]:
    """The settings, other than suite and limit, that decide a checkpoint's scores."""
    tree = configs.to_dict(c)
    found = {"evals": tree["evals"], "num_fewshot": c.num_fewshot}
    return {**found, "chat": True, "system": c.system} if c.chat else found


def is_there(c: EvaluateConfig, path: str, unit: str) -> bool:
    """Whether the checkpoint already has these scores, measured on the same data."""
    file = layout.scores_file(*layout.split_checkpoint(path), label_of(c, unit))
    if not storage.exists(file):
        return False
    try:
        return _read(file).asked == asked(c)
    except DataError as e:
        hint_once(f"{e}: it is evaluated again")
        storage.set_aside(file, layout.DAMAGED)
        return False


@dataclasses.dataclass
class _File:
    """A file of scores, as `write` writes it."""

    suite: str
    checkpoint: str
    results: dict[str, dict[str, Whole | float | None]]
    step: Whole = 0
    tokens: Whole | None = None
    limit: Whole | None = None
    dtype: str = "fp32"
    asked: Any = None
    seconds: float | None = None


def _read(file: str) -> _File:
    """Raises DataError if the file is damaged, or has a metric without a value."""
    found = foreign.read_json(file, _File, DataError, REMEDY)
    for task, metrics in found.results.items():
        for metric, value in metrics.items():
            if value is None and not metric.endswith("_stderr"):
                raise DataError(
                    f"{file}: results.{foreign.line(task)}.{foreign.line(metric)}=null: should be "
                    f"a number; {REMEDY}"
                )
        if metrics and not isinstance(metrics.get("samples"), int):
            raise DataError(f"{file}: results.{foreign.line(task)}.samples is missing; {REMEDY}")
    return found


def read_documents(run: str, step: str, label: str) -> dict[str, dict[str, Any]]:
    """What each document adds to the scores of `all_of`; empty if there is no such file, or (which
    it says once) a damaged one."""
    file = layout.scored_documents_file(run, step, label)
    if not storage.exists(file):
        return {}
    kind = dict[str, dict[str, str | list[tuple[Finite, Finite]]]]
    try:
        return foreign.read_json(file, kind, DataError, f"{REMEDY}; it is not used")
    except DataError as e:
        hint_once(str(e))
        return {}


def all_of(run: str, step: str = "") -> list[dict[str, Any]]:
    """The scores of a run's checkpoints (or of one, step-00000500) by step, with their `label` and
    the checkpoint's name, `at`. Says once which files cannot be read."""
    found = []
    for item in storage.list_files(layout.evals_folder(run)):
        folder, name = item.path.rsplit("/", 2)[1:]
        is_scores = name.endswith(layout.SCORES) and not name.endswith(layout.SCORED_DOCUMENTS)
        if not is_scores or step not in ("", folder):
            continue
        label = name.removesuffix(layout.SCORES)
        try:
            scores = _read(layout.scores_file(run, folder, label))
        except MantaError as e:  # one unreadable file does not stop a report
            hint_once(str(e))
            continue
        found.append({**dataclasses.asdict(scores), "at": folder, "label": label})
    return sorted(found, key=lambda scores: (scores["step"], scores["label"]))


def draw(run: str) -> str | None:
    """Draws every metric of the run's checkpoints against tokens; returns the picture's path. None:
    there are no tokens to draw against."""
    series: dict[str, list[tuple[int, float, float]]] = {}
    for scores in all_of(run):
        if scores.get("tokens") is None:
            continue
        suffix = scores["label"].partition(".")[2]
        for task, metric, value, error in figures(scores["results"], once=True):
            name = f"{task} {metric}" + (f" ({suffix})" if suffix else "")
            series.setdefault(name, []).append((scores["tokens"], value, error))
    if not series:
        return None
    path = storage.join(layout.evals_folder(run), layout.SCORES_CURVE)
    title = f"{run.rpartition('/')[2]}: scores (bands: one standard error)"
    storage.write_bytes(path, plot.panels(series, title))
    return path


def table(results: Results) -> str:
    """The results as aligned columns."""
    rows = [("task", "metric", "value", "stderr")]
    for task, found in itertools.groupby(figures(results), key=lambda figure: figure.task):
        for _, metric, value, error in found:
            rows.append((task, metric, f"{value:.4f}", f"{error:.4f}" if error else ""))
        rows.append((task, "documents", str(results[task]["samples"]), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {v:>{widths[2]}}  {e:>{widths[3]}}".rstrip()
        for a, b, v, e in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def in_short(results: Results) -> str:
    """The results in one line."""
    return ", ".join(f"{f.task} {f.metric} {f.value:.4f}" for f in figures(results, once=True))
