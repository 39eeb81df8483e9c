"""Pictures, as PNG bytes: loss curves, document lengths, confusion matrices, charts of series."""

import dataclasses
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT_BLUE, BLUE, ORANGE = "#9ecae1", "#2171b5", "#d94801"
TITLE_CHARACTERS = 68  # per line of a title: about what fits above the axes
MOST_TICKS = 14
MOST_MARKED = 100  # points of a small picture, each with a dot
MOST_NUMBERED = 25  # labels of a confusion matrix with numbers in it


def loss_curve(records: Sequence[dict[str, Any]], title: str) -> bytes:
    """Training loss (thin: each step; thick: smoothed) and val loss against tokens. If the run's
    objective has other figures, too, there is a small picture of each."""
    records = [r for r in records if isinstance(r.get("tokens"), int)]
    largest = max([r["tokens"] for r in records], default=0)
    measured = [key for r in records for key in r if key.startswith("val_") and "/" not in key]
    names = [key.removeprefix("val_") for key in dict.fromkeys(measured)]
    others = [name for name in names if name not in ("loss", "bpb")]
    if others:
        shown = ["loss", *others]
        figure, grid, unit = _grid([name.replace("_", " ") for name in shown], title, largest)
        for axes, key in zip(grid, shown, strict=True):
            _train_and_val(axes, records, key, unit)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return _png(figure)
    figure, axes = _figure(title, dpi=120)
    unit, name = _unit(largest)
    _train_and_val(axes, records, "loss", unit)
    axes.set(xlabel=f"{name}tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    return _png(figure)


def _train_and_val(axes: "Axes", records: Sequence[dict[str, Any]], key: str, unit: float) -> None:
    """Draws a figure of each step, the same smoothed, and what it was on the val split."""
    train = [(r["tokens"] / unit, r[key]) for r in records if isinstance(r.get(key), float)]
    val = [(r["tokens"] / unit, r[f"val_{key}"]) for r in records
           if isinstance(r.get(f"val_{key}"), float)]  # fmt: skip
    if train:
        x, y = zip(*train, strict=True)
        axes.plot(x, y, color=LIGHT_BLUE, linewidth=0.8, label="train")
        axes.plot(x, _smooth(list(y)), color=BLUE, label="train, smoothed")
    if val:
        x, y = zip(*val, strict=True)
        axes.plot(x, y, color=ORANGE, marker="o", markersize=4, label="val")
        axes.annotate(
            f"{y[-1]:.3f}",
            (x[-1], y[-1]),
            xytext=(-4, -12),
            textcoords="offset points",
            horizontalalignment="right",
        )


def panels(series: Mapping[str, Sequence[tuple[int, float, float]]], title: str) -> bytes:
    """Draws a small picture for each series, against tokens.

    Args:
        series: points (tokens, value, standard error) by name; a standard error of 0 is unknown.
    """
    largest = max(tokens for points in series.values() for tokens, _, _ in points)
    figure, grid, unit = _grid(list(series), title, largest)
    for axes, points in zip(grid, series.values(), strict=True):
        x = [tokens / unit for tokens, _, _ in points]
        values = [value for _, value, _ in points]
        mark = "o" if len(points) <= MOST_MARKED else None
        axes.plot(x, values, color=BLUE, marker=mark, markersize=3, linewidth=1)
        if any(error for _, _, error in points):
            low = [value - error for _, value, error in points]
            high = [value + error for _, value, error in points]
            axes.fill_between(x, low, high, color=LIGHT_BLUE, alpha=0.4, linewidth=0)
    return _png(figure)


def side_by_side(
    series: Mapping[str, Mapping[str, Sequence[tuple[int, float, float]]]],
    levels: Mapping[str, Mapping[str, float]],
    title: str,
) -> bytes:
    """Draws a small picture for each figure: each run against tokens, and reference values as
    horizontal lines.

    Args:
        series: points (tokens, value, standard error) by figure and run; a standard error of 0 is
            unknown.
        levels: reference values by figure and name.
    """
    points = [p for runs in series.values() for run in runs.values() for p in run]
    figure, grid, unit = _grid(list(series), title, max((t for t, _, _ in points), default=0))
    colors = [f"C{number}" for number in range(10)]
    names = list(dict.fromkeys(run for runs in series.values() for run in runs))
    for axes, (key, runs) in zip(grid, series.items(), strict=True):
        for name, run in runs.items():
            color = colors[names.index(name) % len(colors)]
            x, y = [t / unit for t, _, _ in run], [value for _, value, _ in run]
            axes.plot(x, y, color=color, marker="o", markersize=3, label=name)
            if any(errors := [error for _, _, error in run]):
                axes.errorbar(x, y, errors, fmt="none", ecolor=color, elinewidth=1)
        for name, level in levels.get(key, {}).items():
            axes.axhline(level, color="gray", linewidth=0.8, linestyle=":")
            axes.annotate(
                name, (0.02, level), xycoords=("axes fraction", "data"), fontsize=6, va="bottom"
            )
    if names:
        handles = {h.get_label(): h for axes in grid for h in axes.get_lines()}
        figure.legend(
            [handles[n] for n in names], names, loc="outside lower center", ncols=4, fontsize=8
        )
    return _png(figure)


Look = Literal["line", "dashed", "points"]
LOOKS: dict[Look, dict[str, Any]] = {
    "line": {"linewidth": 1.5},
    "dashed": {"linewidth": 1, "linestyle": "--"},
    "points": {"linestyle": "", "marker": "o", "markersize": 4, "alpha": 0.8},
}


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of a chart, of one look."""

    label: str
    """Its name in the legend; empty: not there."""
    x: "Sequence[float] | np.ndarray"
    y: "Sequence[float] | np.ndarray"
    look: Look
    color: int | None
    """Its number among the chart's colors; None: gray."""


def chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    ticks: Sequence[float] = (),
) -> bytes:
    """Draws series against a logarithmic x axis, with the legend to the right of the axes. `ticks`:
    the values that the x axis names; none: powers of ten."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure, axes = _figure(title, dpi=120)
    for s in series:
        color = "gray" if s.color is None else f"C{s.color % 10}"
        axes.plot(s.x, s.y, color=color, label=s.label or "_", **LOOKS[s.look])
    axes.set_xscale("log")
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    if log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high / low < 20:  # too narrow for powers of ten as its only ticks
            axes.yaxis.set_major_locator(MaxNLocator(8))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=8)
    return _png(figure)


def short(value: float) -> str:
    """A count in three digits: 950, 1.2k, 124M, 6.9B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _grid(titles: Sequence[str], title: str, largest: int) -> "tuple[Figure, list[Axes], float]":
    """A figure with a small picture for each title, and the unit of tokens up to `largest`."""
    from matplotlib.figure import Figure

    count = max(1, len(titles))
    columns = min(3, count)
    rows = -(-count // columns)
    size = (max(6.0, 3.6 * columns), 0.9 + 2.5 * rows)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(textwrap.fill(title, TITLE_CHARACTERS), parse_math=False)
    unit, name = _unit(largest)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, label in zip(grid, titles, strict=False):
        axes.set_title(label, fontsize=9, parse_math=False)
        axes.set_xlabel(f"{name}tokens", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in grid[len(titles) :]:
        axes.set_axis_off()
    return figure, grid[: len(titles)], unit


def _unit(largest: int) -> tuple[float, str]:
    """The unit in which tokens are counted, and its name."""
    return (1e9, "billion ") if largest >= 1e9 else (1e6, "million ")


def histogram(
    counts: Sequence[int], title: str, token_counts: Sequence[int] | None = None
) -> bytes:
    """Draws the document lengths of a dataset.

    Args:
        counts: counts[i] documents have at least 2^i and fewer than 2^(i+1) tokens.
        token_counts: how many tokens these documents have together; drawn next to them, since a
            few long documents can contain most of a corpus.
    """
    series = [("documents", counts, BLUE)]
    if token_counts is not None:
        assert len(token_counts) == len(counts)
        series.append(("tokens", token_counts, ORANGE))
    figure, axes = _figure(title, dpi=110)
    filled = [i for i, row in enumerate(zip(*(c for _, c, _ in series), strict=True)) if any(row)]
    first, end = (filled[0], filled[-1] + 1) if filled else (0, 1)
    width = 0.84 / len(series)  # bins are 1 wide; the tick at i stands for 2^i tokens
    for number, (name, values, color) in enumerate(series):
        total = sum(values)
        axes.bar(
            [i + 0.08 + number * width for i in range(first, end)],
            [value / (total or 1) for value in values[first:end] or [0]],
            width,
            align="edge",
            color=color,
            label=f"{total:,} {name}",
        )
    step = -(-(end - first + 1) // MOST_TICKS)
    ticks = [i for i in range(first, end + 1) if i % step == 0]
    axes.set_xticks(ticks, [_power_of_two(i) for i in ticks])
    axes.set(xlim=(first, end), xlabel="document length in tokens", ylabel="share of the dataset")
    if not filled:
        axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    # Above the axes, the legend hides no bar.
    figure.legend(loc="outside upper right", ncols=len(series), frameon=False)
    return _png(figure)


def confusion(counts: Sequence[Sequence[int]], labels: Sequence[str], title: str) -> bytes:
    """Draws a confusion matrix: counts[i][j] texts of label i were given label j. Shades are shares
    of a row; the numbers are there as long as they can be read."""
    from matplotlib.figure import Figure

    size = len(labels)
    side = min(4.5 + 0.45 * size, 20.0)
    figure = Figure(figsize=(side + 1, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_title(textwrap.fill(title, 40), parse_math=False, fontsize=11)
    shares = [[n / (sum(row) or 1) for n in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    shown = [textwrap.shorten(label, 24, placeholder="...") for label in labels]
    axes.set_xticks(range(size), shown, rotation=0 if size < 4 else 60, parse_math=False)
    axes.set_yticks(range(size), shown, parse_math=False)
    axes.set(xlabel="label that was given", ylabel="label of the text")
    for i, row in enumerate(counts if size <= MOST_NUMBERED else []):
        for j, count in enumerate(row):
            color = "white" if shares[i][j] > 0.5 else "black"
            axes.text(j, i, f"{count:,}", ha="center", va="center", color=color)
    return _png(figure)


def _power_of_two(exponent: int) -> str:
    """1, 2, 4, ..., 512, 1k, 2k, ..., 1M: k is 1024."""
    return f"{1 << exponent % 10}{['', 'k', 'M', 'G', 'T'][exponent // 10]}"


def _figure(title: str, dpi: int) -> "tuple[Figure, Axes]":
    """A figure made without pyplot, which would keep each one alive and look for a display.

    matplotlib is imported here because most processes that can draw never do.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=dpi, layout="constrained")
    axes = figure.subplots()
    # Without parse_math, a name with two dollar signs would become a formula.
    axes.set_title(textwrap.fill(title, TITLE_CHARACTERS), parse_math=False)
    return figure, axes


def _png(figure: "Figure") -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _smooth(values: list[float], decay: float = 0.95) -> list[float]:
    """Exponential moving average, with the bias from its start removed."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed
