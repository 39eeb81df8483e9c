"""The pictures of a sweep, as PNGs by what they show."""

import math
from collections.abc import Iterator
from typing import Any

from manta import charts, layout, statistics, storage
from manta.charts import Fitted, Line
from manta.sweep import compared
from manta.sweep.compared import Group
from manta.sweep.findings import optima, shares, widest
from manta.sweep.importance import Importances
from manta.sweep.naming import called, number, words
from manta.sweep.optimum import Optimum
from manta.sweep.plan import Plan
from manta.sweep.space import LR, Dimension
from manta.train.records.logbook import read_metrics

MOST_LINES = 8  # of a picture with a legend
MOST_CURVES = 60  # runs whose losses are drawn, and settings that are drawn as lines
MOST_POINTS = 200  # of a curve
MOST_CELLS = 30  # rows or columns of a heat map


def pictures(plan: Plan) -> dict[str, bytes]:
    """All pictures that a sweep has something for, in the order of its page."""
    ranked = [g for g in compared.groups(plan) if g.tokens and not g.why]
    made = (_rates(plan, ranked), _heat_map(plan, ranked), _parallel(plan, ranked),
            _curves(plan), _importances(plan))  # fmt: skip
    return dict(picture for pictures in made for picture in pictures)


Pictures = Iterator[tuple[str, bytes]]


def _rates(plan: Plan, ranked: list[Group]) -> Pictures:
    """Losses against the rate, a line for each of the other keys' settings, the best ones."""
    lines = {}
    for fixed, tokens, made in optima(plan)[:MOST_LINES]:
        groups = [g for g in ranked if {k: v for k, v in g.settings.items() if k != LR} == fixed]
        points = []
        for group in sorted(groups, key=lambda g: g.settings[LR]):
            if values := group.losses(tokens):
                loss = statistics.mean(values)
                points.append((group.settings[LR], loss.value, loss.error))
        if len(points) > 1:
            fitted = _fitted(made) if isinstance(made, Optimum) else None
            at = "" if tokens == plan.c.total_tokens else f" (after {tokens:,} tokens)"
            lines[f"{words(fixed) or 'val loss'}{at}"] = Line(points, fitted)
    if lines:
        title = f"{plan.c.name}: val loss against learning rate"
        png = charts.with_errors(lines, title, "learning rate", "val loss (nats per token)")
        yield "Val loss against learning rate, with standard errors and fitted optimum", png


def _fitted(made: Optimum) -> Fitted:
    low, high = math.log(made.rates[0]), math.log(made.rates[-1])
    steps = range(charts.FINE + 1)
    x = tuple(math.exp(low + (high - low) * step / charts.FINE) for step in steps)
    best = (made.rate, made.loss)
    return Fitted(x, tuple(map(made.at, x)), best, made.low, made.high)


def _heat_map(plan: Plan, ranked: list[Group]) -> Pictures:
    """The lowest loss for each pair of values of two numeric keys: the most important ones."""
    keys = [d for d in plan.c.dimensions if _values(d, ranked)]
    if len(keys) < 2 or not ranked:
        return
    known, tokens = shares(plan), widest(plan)
    if isinstance(known, Importances):
        keys.sort(key=lambda d: -known.shares.get(d.key, 0.0))
    across, up = sorted(keys[:2], key=lambda d: d.key != LR)
    columns, rows = _values(across, ranked), _values(up, ranked)[::-1]
    cells: dict[tuple[int, int], float] = {}
    for group in ranked:
        if losses := group.losses(tokens):
            place = (rows.index(group.settings[up.key]), columns.index(group.settings[across.key]))
            cells[place] = min(cells.get(place, math.inf), statistics.mean(losses).value)
    if len(cells) < 2:
        return
    lowest = ", the lowest over the other keys" if len(plan.c.dimensions) > 2 else ""
    title = f"{plan.c.name}: val loss at {tokens:,} tokens{lowest}"
    names = called(up.key), called(across.key)
    png = charts.heat_map(cells, list(map(number, rows)), list(map(number, columns)), title, *names)
    yield f"Val loss by {names[1]} and {names[0]}", png


def _values(d: Dimension, ranked: list[Group]) -> list[float]:
    """The values of a key with a few numbers, in their order; []: it is none."""
    found = sorted({g.settings[d.key] for g in ranked}) if _is_numeric(d) and not d.is_range else []
    return found if 1 < len(found) <= MOST_CELLS else []


def _is_numeric(d: Dimension) -> bool:
    return d.is_range or all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in d.values
    )


def _parallel(plan: Plan, ranked: list[Group]) -> Pictures:
    """Each settings as a line across its keys, and the loss."""
    tokens = widest(plan)
    every = [g for g in ranked if g.losses(tokens)]
    shown = every[:MOST_CURVES]
    if len(plan.c.dimensions) < 2 or len(shown) < 2 or plan.c.sweep.scheduler == "pbt":
        return
    axes, places = [], []
    for d in plan.c.dimensions:
        ticks, at = _axis(d, [g.settings[d.key] for g in shown])
        axes.append((called(d.key), ticks))
        places.append(at)
    losses = [statistics.mean(g.losses(tokens)).value for g in shown]
    low, high = charts.view(losses)
    more = " or more" if max(losses) > high else ""
    axes.append(("val loss", {0.0: f"{low:.4f}", 1.0: f"{high:.4f}{more}"}))
    places.append([min(1.0, (loss - low) / ((high - low) or 1.0)) for loss in losses])
    lines = list(zip(zip(*places, strict=True), losses, strict=True))
    of = f"; the first {MOST_CURVES}" if len(every) > MOST_CURVES else ""
    title = f"{plan.c.name}: settings and their loss at {tokens:,} tokens (the best in red{of})"
    yield "Parallel coordinates of all settings", charts.parallel(axes, lines, title)


def _axis(d: Dimension, values: list[Any]) -> tuple[dict[float, str], list[float]]:
    """The ticks of a key's axis, and the place of each value, from 0 to 1."""
    if _is_numeric(d) and d.is_range:
        scale = math.log if d.kind == "log_uniform" else float
        low, high = scale(d.low), scale(d.high)
        at = [(scale(v) - low) / (high - low) for v in values]
        return {0.0: number(d.low), 1.0: number(d.high)}, at
    every = sorted(d.values) if _is_numeric(d) else list(d.values)
    last = max(1, len(every) - 1)
    ticks = {place / last: number(value) for place, value in enumerate(every)}
    return ticks, [every.index(value) / last for value in values]


def _curves(plan: Plan) -> Pictures:
    """The val loss of all trials against tokens, also of those that failed on the way."""
    lines: dict[str, list[tuple[int, float]]] = {}
    standings = plan.standings()
    for standing in standings[:MOST_CURVES]:
        trial = standing.trial
        run = layout.run_folder(plan.c.home_folder, trial.name)
        records = read_metrics(storage.join(run, layout.METRICS))
        points = [(int(r["tokens"]), float(r["val_loss"])) for r in records if _is_measured(r)]
        if points:
            seed = f", seed {trial.seed}" if plan.c.sweep.repeats > 1 else ""
            name = f"{words(trial.settings)}{seed}" if not standing.source else trial.name
            lines[name] = points[:: max(1, len(points) // MOST_POINTS)]
    if lines:
        of = f" (the best {MOST_CURVES})" if len(standings) > MOST_CURVES else ""
        title = f"{plan.c.name}: val loss of all trials{of}"
        yield "Val loss of all trials", charts.curves(lines, title, "val loss (nats per token)")


def _is_measured(record: dict[str, Any]) -> bool:
    loss = record.get("val_loss")
    return isinstance(loss, int | float) and math.isfinite(loss) and "tokens" in record


def _importances(plan: Plan) -> Pictures:
    made, tokens = shares(plan), widest(plan)
    if isinstance(made, str) or len(made.shares) < 2 or plan.c.sweep.scheduler == "pbt":
        return
    found = {called(key): share for key, share in made.shares.items()}
    title = f"{plan.c.name}: what each key explains of the loss at {tokens:,} tokens"
    rough = "" if made.trials >= made.enough else f" (rough: {made.trials} trials)"
    label = f"share of the variance over trials{rough}"
    yield "Importance of each key", charts.bars(found, title, label)
