"""Pictures of many runs, as PNG bytes: losses with errors against a rate, a heat map, parallel
coordinates, curves, bars."""

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from manta.plot import BLUE, TITLE_CHARACTERS, _figure, _png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = "viridis"  # of losses: the darker, the lower
PALEST = 0.9  # of these colors, for a line: a paler one is hardly seen on white
FINE = 60  # points of a fitted curve
MOST_LEGEND = 8  # names in a legend
MOST_NUMBERED = 150  # cells of a heat map with a number in them


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A curve through some points, and its lowest point."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    best: tuple[float, float]
    low: float
    """The interval of the lowest point; nan: not known."""
    high: float


@dataclasses.dataclass(frozen=True)
class Line:
    """Points with errors: x, y, standard error (nan: not known); and what was fitted to them."""

    points: Sequence[tuple[float, float, float]]
    fitted: Fitted | None = None


def with_errors(lines: Mapping[str, Line], title: str, x_label: str, y_label: str) -> bytes:
    """Draws lines against a logarithmic x axis, with error bars, fitted curves and their lowest
    points. Points far above the others are at the upper edge, as triangles."""
    figure, axes = _figure(title, dpi=110)
    low, top = view([y for line in lines.values() for _, y, _ in line.points])
    for number, (name, line) in enumerate(lines.items()):
        color = f"C{number % 10}"
        inside = [p for p in line.points if p[1] <= top]
        x, y = [p[0] for p in inside], [p[1] for p in inside]
        errors = [0.0 if math.isnan(p[2]) else p[2] for p in inside]
        look = "o" if line.fitted else "o-"
        axes.errorbar(x, y, errors, fmt=look, color=color, capsize=3, markersize=5, label=name)
        above = [p[0] for p in line.points if p[1] > top]
        axes.plot(above, [top] * len(above), "^", color=color, clip_on=False, markersize=7)
        if line.fitted is not None:
            _draw_fitted(axes, line.fitted, color)
    if any(p[1] > top for line in lines.values() for p in line.points):
        axes.plot([], [], "^", color="gray", label="above this picture")
    axes.set_xscale("log")
    every_x = sorted({p[0] for line in lines.values() for p in line.points})
    if len(every_x) <= 12:
        axes.set_xticks(every_x, [f"{x:g}" for x in every_x])
        axes.minorticks_off()
    margin = 0.1 * (top - low or 1.0)
    axes.set_ylim(low - margin, top + margin)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def view(values: Sequence[float]) -> tuple[float, float]:
    """The lowest of some losses, and the highest one that is not far above most of them: outliers
    would press all else together."""
    ordered = sorted(values)
    spread = ordered[len(ordered) // 2] - ordered[0]
    top = ordered[0] + 4 * spread if spread > 0 else ordered[-1]
    return ordered[0], max(value for value in ordered if value <= top)


def _draw_fitted(axes: "Axes", fitted: Fitted, color: str) -> None:
    axes.plot(fitted.x, fitted.y, color=color, linewidth=1, linestyle="--")
    best, loss = fitted.best
    axes.plot([best], [loss], "*", color=color, markersize=13, markeredgecolor="black", zorder=5)
    if math.isfinite(fitted.low) and math.isfinite(fitted.high):
        low, high = max(fitted.low, min(fitted.x)), min(fitted.high, max(fitted.x))
        axes.plot([low, high], [loss, loss], color=color, linewidth=6, alpha=0.25)


def heat_map(
    cells: Mapping[tuple[int, int], float],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    row_label: str,
    column_label: str,
) -> bytes:
    """Draws a number for each (row, column), the lowest one framed; a cell without one is empty."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    size = (min(14.0, 2.4 + 1.0 * len(columns)), min(14.0, 1.6 + 0.55 * len(rows)))
    figure = Figure(figsize=(max(6.0, size[0]), max(2.6, size[1])), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_title(textwrap.fill(title, 60), parse_math=False)
    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in cells.items():
        grid[row, column] = value
    low, top = view(list(cells.values()))
    image = axes.imshow(grid, cmap=COLORS, vmin=low, vmax=top, aspect="auto")
    figure.colorbar(image, ax=axes, extend="max" if max(cells.values()) > top else "neither")
    axes.set_xticks(range(len(columns)), columns, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.set(xlabel=column_label, ylabel=row_label)
    for (row, column), value in cells.items() if len(cells) <= MOST_NUMBERED else ():
        share = (value - low) / (top - low or 1.0)
        color = "white" if share < 0.55 else "black"
        axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=color, fontsize=8)
    row, column = min(cells, key=cells.__getitem__)
    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2)
    axes.add_patch(frame)
    return _png(figure)


def parallel(
    axes_of: Sequence[tuple[str, Mapping[float, str]]],
    lines: Sequence[tuple[Sequence[float], float]],
    title: str,
) -> bytes:
    """Draws each line across parallel axes, coloured by its loss, the best one on top.

    Args:
        axes_of: the name of each axis, and its ticks by their places from 0 to 1.
        lines: for each line its place on each axis, from 0 to 1, and its loss.
    """
    from matplotlib import colormaps

    figure, axes = _figure(title, dpi=110)
    ordered = sorted(lines, key=lambda line: -line[1])
    low, top = view([loss for _, loss in lines])
    colors = colormaps[COLORS]
    for place, (places, loss) in enumerate(ordered):
        is_best = place == len(ordered) - 1
        share = min(1.0, (loss - low) / (top - low or 1.0))
        look = {"color": "red", "linewidth": 2.5} if is_best else {"color": colors(PALEST * share)}
        axes.plot(range(len(places)), places, alpha=1.0 if is_best else 0.7, **look)
    for place, (_, ticks) in enumerate(axes_of):
        axes.axvline(place, color="gray", linewidth=1)
        for at, text in ticks.items():
            is_last = place == len(axes_of) - 1
            axes.annotate(
                text, (place, at), xytext=(5 if is_last else -5, 0), textcoords="offset points",
                ha="left" if is_last else "right", va="center", fontsize=8, parse_math=False,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
            )  # fmt: skip
    axes.set_xticks(range(len(axes_of)), [name for name, _ in axes_of], parse_math=False)
    axes.set_yticks([])
    axes.set(xlim=(-0.35, len(axes_of) - 0.65), ylim=(-0.05, 1.05))
    for side in axes.spines.values():
        side.set_visible(False)
    return _png(figure)


def curves(lines: Mapping[str, Sequence[tuple[int, float]]], title: str, y_label: str) -> bytes:
    """Draws points (tokens, value) of many runs, the best first: it is in red, the others are the
    darker the better. Values far above the ends of most are cut off."""
    from matplotlib import colormaps

    figure, axes = _figure(title, dpi=110)
    colors = colormaps[COLORS]
    names = list(lines)
    for number, name in reversed(list(enumerate(names))):
        color: Any = "red" if not number else colors(PALEST * number / len(names))
        x, y = zip(*lines[name], strict=True)
        label = name if number < MOST_LEGEND else "_"
        width = 2.0 if not number else 1.0
        axes.plot(x, y, color=color, linewidth=width, label=label, marker=".", markersize=3)
    low, top = view([line[-1][1] for line in lines.values()])
    margin = 0.8 * (top - low or 0.1)
    axes.set_ylim(low - 0.1 * margin, top + margin)
    axes.set(xlabel="tokens", ylabel=y_label)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], [textwrap.shorten(t, 60) for t in labels[::-1]], fontsize=7)
    return _png(figure)


def bars(shares: Mapping[str, float], title: str, x_label: str) -> bytes:
    """Draws a share from 0 to 1 for each name, the largest at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.45 * len(shares)), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_title(textwrap.fill(title, TITLE_CHARACTERS), parse_math=False)
    ordered = sorted(shares.items(), key=lambda item: item[1])
    axes.barh([name for name, _ in ordered], [share for _, share in ordered], color=BLUE)
    for place, (_, share) in enumerate(ordered):
        axes.text(share + 0.01, place, f"{share:.0%}", va="center")
    axes.set(xlim=(0, 1.08), xlabel=x_label)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    return _png(figure)
