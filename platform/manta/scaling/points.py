"""The points of a fit: what is known of each run, from a CSV file or from the runs themselves."""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

from manta import foreign, layout, storage
from manta.errors import DataError
from manta.job import say
from manta.model.cost import parameters
from manta.model.shape import ModelConfig
from manta.scaling.powers import Optimum, optimum
from manta.scaling.settings import ColumnsConfig, ScalingConfig
from manta.terminal import line, named
from manta.train.checkpoints import checkpoint as checkpoints
from manta.train.records.logbook import evaluations, read_metrics
from manta.train.settings import load_run_config

FEWEST_POINTS = 8
FEWEST_SIZES = 3
FEWEST_BUDGETS = 3
LEAST, MOST = 1e-40, 1e40  # a product of two has a place among floats


@dataclasses.dataclass(frozen=True)
class Point:
    """A run: `n` parameters, `d` tokens, and its loss in nats per token."""

    name: str
    n: float
    d: float
    loss: float
    lr: float | None = None
    batch: float | None = None
    """Tokens per batch."""
    other_n: float | None = None
    """The parameters counted the other way; None: not known."""
    edges: tuple[str, ...] = ()
    """The keys among lr and batch whose best value is the first or last one tried."""

    @property
    def flops(self) -> float:
        return 6 * self.n * self.d


def gather(c: ScalingConfig) -> tuple[list[Point], dict[str, str]]:
    """The points that the fit takes, and the sha256 of the files that they come from.

    Raises:
        MantaError: a file or run cannot be read, or there are too few points, sizes or budgets.
    """
    found: list[Point] = []
    inputs: dict[str, str] = {}
    runs = {name: from_run(name, c.home_folder, c.count) for name in c.runs}
    _check_texts(runs)
    if len(dtypes := {run.dtype for run in runs.values()}) > 1:
        say(
            f"the runs were trained in {' and '.join(sorted(dtypes))}, as dtype=auto decides by a "
            "probe: their losses differ by that too; set dtype= for all of them"
        )
    for run in runs.values():
        inputs[run.file] = storage.sha256(run.file)
    found += best_of_each([run.point for run in runs.values()])
    if c.points is not None:
        path = storage.absolute(c.points)
        data = foreign.read_bytes(path, DataError)
        found += from_csv(data, c.points, c.columns)
        inputs[path] = storage.sha256_of(data)
    found.sort(key=lambda point: point.loss)
    kept = found[: max(0, len(found) - c.leave_out_highest)]
    check(kept)
    return kept, inputs


def best_of_each(points: list[Point]) -> list[Point]:
    """The run with the lowest loss of each size and number of tokens. Its rate (or batch) is kept
    only where others were tried, as one alone is not known to be the best; between the ones tried,
    it is where a parabola is lowest."""
    groups: dict[tuple[float, float], list[Point]] = {}
    for point in points:
        groups.setdefault((point.n, point.d), []).append(point)
    found = []
    for group in groups.values():
        best = min(group, key=lambda point: point.loss)
        found_lr, found_batch = _best(group, best, "lr", "batch"), _best(group, best, "batch", "lr")
        tried = {"lr": found_lr, "batch": found_batch}
        found.append(
            dataclasses.replace(
                best,
                lr=found_lr.value if found_lr else None,
                batch=found_batch.value if found_batch else None,
                edges=tuple(key for key, value in tried.items() if value and value.is_edge),
            )
        )
    return found


def _best(group: list[Point], best: Point, key: str, other: str) -> Optimum | None:
    """The best rate (or batch) of a group, at the best batch (or rate); None: one alone."""
    losses: dict[float, float] = {}
    for p in group:
        value = getattr(p, key)
        if value is not None and getattr(p, other) == getattr(best, other):
            losses[value] = min(p.loss, losses.get(value, math.inf))
    return optimum([*losses], [*losses.values()]) if len(losses) > 1 else None


def from_csv(data: bytes, name: str, columns: ColumnsConfig) -> list[Point]:
    """The runs in a CSV file with a head. Raises DataError, with the line, if one is not a run."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"points={name}: not a text in UTF-8; write it in UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        there = list(reader.fieldnames or [])
    except csv.Error as e:
        raise DataError(f"points={name}, line 1: {line(str(e))}") from None
    size = ("tokens", columns.tokens) if columns.flops is None else ("flops", columns.flops)
    wanted = {"parameters": columns.parameters, size[0]: size[1], "loss": columns.loss}
    wanted |= {k: v for k in ("lr", "batch") if (v := getattr(columns, k)) is not None}
    missing = [
        f"columns.{key}={line(value)}" for key, value in wanted.items() if value not in there
    ]
    if missing:
        known = named([line(column, 100) for column in there], 10) or "none"
        raise DataError(
            f"points={name}: no such column: {named(missing)}; its columns are {known}; name them "
            "with columns.parameters=, columns.tokens= (or columns.flops=) and columns.loss="
        )
    found = []
    try:
        for row in reader:
            values = {k: _number(row[v], v, name, reader.line_num) for k, v in wanted.items()}
            n, loss = values["parameters"], values["loss"]
            d = values["tokens"] if "tokens" in values else values["flops"] / (6 * n)
            label = f"line {reader.line_num}"
            found.append(Point(label, n, d, loss, values.get("lr"), values.get("batch")))
    except csv.Error as e:
        raise DataError(f"points={name}, line {reader.line_num}: {line(str(e))}") from None
    return found


def _number(text: str | None, column: str, name: str, number: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not LEAST <= value <= MOST:  # (NaN too)
        raise DataError(
            f"points={name}, line {number}: {line(column)}={line(text or '')}: not a positive "
            f"number from {LEAST:g} to {MOST:g}; correct the line, or remove it"
        )
    return value


class Run(NamedTuple):
    """A finished run."""

    point: Point
    file: str
    """The file that its loss comes from."""
    dtype: str
    """The data type of its matrix products."""
    measured: dict[str, int]
    """The tokens of each val split on which its loss was measured (`TrainState.val_sample`)."""


def _check_texts(runs: dict[str, Run]) -> None:
    """Raises DataError if the losses of these runs are not of the same texts."""
    first = next(iter(runs), None)
    others = [name for name, run in runs.items() if first and run.measured != runs[first].measured]
    if others:
        raise DataError(
            f"runs: the val losses of {named(others)} were measured on another val split, or on "
            f"another sample of it, than that of {first}: one law is for one text; leave them out"
        )


def from_run(name: str, home: str, count: str) -> Run:
    """A run as a point.

    Raises:
        CheckpointError: no run has this name.
        DataError: its config or its val loss is missing, or it has not reached its end.
    """
    path = checkpoints.resolve(name, home, "runs")
    run = layout.split_checkpoint(path)[0]
    settings, state = load_run_config(run), checkpoints.load_state(path)
    if settings is None:
        raise DataError(f"{name}: {layout.RUN_CONFIG} is missing, so its tokens are not known")
    if settings.has_base:
        raise DataError(
            f"{name}: it went on from a checkpoint, so its loss does not come from its own tokens "
            "alone: leave it out of runs="
        )
    if state.step < settings.total_steps:
        raise DataError(
            f"{name}: it is at step {state.step:,} of {settings.total_steps:,}, and its learning "
            "rate has not come down: run its command again, or leave it out of runs="
        )
    file = storage.join(run, layout.METRICS)
    records = evaluations(read_metrics(file), state.step)
    if not records or records[-1]["step"] != state.step:
        raise DataError(f"{name}: {file} has no val loss of its last step, {state.step:,}")
    model = checkpoints.load_model_config(path)
    sizes = {key: counted(model, key) for key in ("all", "no_embeddings")}
    other = next(value for key, value in sizes.items() if key != count)
    point = Point(
        name, sizes[count], settings.tokens_before(state.step), float(records[-1]["val_loss"]),
        settings.optimizer.lr, settings.tokens_per_batch, other,
    )  # fmt: skip
    return Run(point, file, state.dtype, state.val_sample)


def counted(model: ModelConfig, count: str) -> int:
    """The parameters of a model that a study counts: "all", or those with "no_embeddings"."""
    every = parameters(model)
    return every.total - (every.embedding + every.positions if count == "no_embeddings" else 0)


def lacking(sizes: Sequence[float], tokens: Sequence[float]) -> str | None:
    """What is missing to tell five parameters from runs of these sizes and tokens, one of each for
    a run; None: nothing. Runs of the same size and tokens count once."""
    runs = {
        (round(math.log(n), 2), round(math.log(d), 2)) for n, d in zip(sizes, tokens, strict=True)
    }
    missing = [
        f"{least - there} more {what} (there are {there:,} of at least {least})"
        for there, least, what in (
            (len(runs), FEWEST_POINTS, "runs"),
            (len({n for n, _ in runs}), FEWEST_SIZES, "model sizes"),
            (len({d for _, d in runs}), FEWEST_BUDGETS, "numbers of tokens"),
        )
        if there < least
    ]
    return f"{' and '.join(missing)} are missing" if missing else None


def check(points: list[Point]) -> None:
    """Raises DataError if five parameters cannot be told from these points: what is missing."""
    if missing := lacking([p.n for p in points], [p.d for p in points]):
        shown = ", ".join(f"{n:.3g}" for n in sorted({p.n for p in points})[:6])
        raise DataError(
            f"too few points for a scaling law: {missing}; the sizes are {shown or 'none'}"
        )
