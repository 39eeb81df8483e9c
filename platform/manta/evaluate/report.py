"""Where scores are kept: a JSON file for each suite and checkpoint, a table, a curve, TensorBoard.

runs/NAME/evals/step-00000500/hellaswag.json            the scores
                              hellaswag.documents.json  what each document adds to them
                curve.png                               every metric against tokens
runs/NAME/tensorboard/evals/                            the same, in TensorBoard
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from manta import config as configs
from manta import plot, storage
from manta.errors import MantaError
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.suites import Results, Scores
from manta.train.checkpoints import checkpoint as checkpoints
from manta.train.records.logbook import write_scalars
from manta.train.settings import PretrainConfig

CURVE = "curve.png"
EACH = ".documents.json"
# Metrics that say the same as another one.
SAME = ("byte_perplexity", "word_perplexity", "token_perplexity")


@dataclasses.dataclass(frozen=True)
class Place:
    """Of a checkpoint's scores."""

    run: str
    """The run's folder; a checkpoint's own, if it stands outside of one."""
    step: str
    """step-00000500, or model."""

    @classmethod
    def of(cls, path: str) -> "Place":
        run, _, step = path.rpartition("/checkpoints/")
        return cls(run or path, step if run else "model")

    def file(self, label: str) -> str:
        return storage.join(self.run, "evals", self.step, f"{label}.json")


def label_of(c: EvaluateConfig, unit: str) -> str:
    """The name of the scores of a suite or a task: what is asked for another part, or otherwise,
    does not take the place of the whole."""
    parts = [unit]
    if unit.startswith("task-") and c.num_fewshot is not None:
        parts.append(f"{c.num_fewshot}-shot")
    if c.limit is not None:
        parts.append(f"limit-{c.limit}")
    if c.dtype != "fp32":
        parts.append(c.dtype)
    return ".".join(parts)


class Figure(NamedTuple):
    task: str
    metric: str
    value: float
    error: float
    """Its standard error; 0: not known."""


def figures(results: Results, *, once: bool = False) -> Iterator[Figure]:
    """Each metric of each task; with `once`, without those that say the same as another one."""
    for task, values in results.items():
        for metric, value in values.items():
            if metric == "samples" or metric.endswith("_stderr") or (once and metric in SAME):
                continue
            yield Figure(task, metric, value, values.get(f"{metric}_stderr") or 0.0)


def write(c: EvaluateConfig, path: str, unit: str, scores: Scores, seconds: float) -> str:
    """Writes the scores of the checkpoint at `path`, into TensorBoard too; the file's path."""
    place, step = Place.of(path), checkpoints.load_state(path).step
    settings = settings_of(place.run)
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
    file = place.file(label_of(c, unit))
    each = json.dumps(scores.each, separators=(",", ":")).encode()
    storage.write_bytes(file.removesuffix(".json") + EACH, each)
    storage.write_json(file, content)
    if tokens is not None:
        scalars = {f"evals/{f.task}/{f.metric}": f.value for f in figures(scores.results)}
        write_scalars(place.run, "evals", scalars, tokens)
    return file


def asked(c: EvaluateConfig) -> dict[str, Any]:
    """What decides the scores of a checkpoint, beside suite and limit."""
    tree = configs.to_dict(c)
    return {"evals": tree["evals"], "num_fewshot": c.num_fewshot}


def is_there(c: EvaluateConfig, path: str, unit: str) -> bool:
    """Whether the checkpoint has these scores, of the same data."""
    file = Place.of(path).file(label_of(c, unit))
    if not storage.exists(file):
        return False
    found: bool = storage.read_json(file).get("asked") == asked(c)
    return found


def settings_of(run: str) -> PretrainConfig | None:
    """A run's config; None: it is no run of Manta's."""
    config = storage.join(run, "config.yaml")
    if not storage.exists(config):
        return None
    with contextlib.suppress(MantaError):  # (of another version)
        return configs.load(PretrainConfig, [config])
    return None


def all_of(run: str, step: str = "") -> list[dict[str, Any]]:
    """The scores of a run's checkpoints (or of one, step-00000500), by step; with their `label`."""
    found = []
    for item in storage.list_files(storage.join(run, "evals")):
        folder, name = item.path.rsplit("/", 2)[1:]
        if not name.endswith(".json") or name.endswith(EACH) or step not in ("", folder):
            continue
        with contextlib.suppress(MantaError):  # a report says what is known
            scores = storage.read_json(storage.join(run, "evals", folder, name))
            if isinstance(scores, dict) and isinstance(scores.get("results"), dict):
                found.append({**scores, "label": name.removesuffix(".json")})
    return sorted(found, key=lambda scores: (scores.get("step") or 0, scores["label"]))


def draw(run: str) -> str | None:
    """Draws every metric of the run's checkpoints against tokens; the picture's path. None: there
    are no tokens to draw against."""
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
    path = storage.join(run, "evals", CURVE)
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
    """The results in a line."""
    return ", ".join(f"{f.task} {f.metric} {f.value:.4f}" for f in figures(results, once=True))
