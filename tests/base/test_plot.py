"""Pictures show the data that they are given, and are drawn without a display."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from faults.kills import overlaid
from manta import plot

ROOT = Path(__file__).resolve().parents[2]

TRAIN: list[dict[str, Any]] = [
    {"step": s, "tokens": s * 10, "loss": 1 / s, "grad_norm": 1.0} for s in range(1, 50)
]
VAL: list[dict[str, Any]] = [
    {"step": s, "tokens": s * 10, "val_loss": 2 / (s + 1)} for s in (0, 25, 49)
]
BILLIONS: list[dict[str, Any]] = [{"step": 1, "tokens": 2 * 10**9, "loss": 1.0}]
NAN: list[dict[str, Any]] = [
    {"step": 1, "tokens": 10, "loss": "nan"},
    {"step": 1, "tokens": 10, "val_loss": "nan"},
]


def drawn(draw: Callable[..., bytes], *arguments: Any) -> Figure:
    """The figure that `draw` makes, as a matplotlib object; its PNG opens and has the same size."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **keys: Any) -> None:
        figures.append(figure)
        save(figure, *args, **keys)

    with mock.patch.object(Figure, "savefig", keep):
        png = draw(*arguments)
    (figure,) = figures
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    assert image.size == tuple((figure.get_size_inches() * figure.dpi).round())
    return figure


def data_of(line: Line2D) -> tuple[list[float], list[float]]:
    return list(line.get_xdata()), list(line.get_ydata())  # type: ignore[arg-type]


def numbers(records: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [r for r in records if isinstance(r.get(key), float)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("records", [TRAIN + VAL, TRAIN, VAL, BILLIONS, NAN + TRAIN, NAN, []])
def test_the_loss_curve_has_the_losses_over_their_tokens(records: list[dict[str, Any]]) -> None:
    (axes,) = drawn(plot.loss_curve, records, "title").axes
    unit, name = (1e9, "billion") if records == BILLIONS else (1e6, "million")
    assert axes.get_title() == "title"
    assert axes.get_xlabel() == f"{name} tokens" and axes.get_ylabel() == "loss (nats per token)"
    lines = {line.get_label(): data_of(line) for line in axes.get_lines()}
    train, val = numbers(records, "loss"), numbers(records, "val_loss")
    expected = {}
    if train:
        x, losses = [r["tokens"] / unit for r in train], [r["loss"] for r in train]
        expected = {"train": (x, losses), "train, smoothed": (x, plot._smooth(losses))}
    if val:
        expected["val"] = ([r["tokens"] / unit for r in val], [r["val_loss"] for r in val])
    assert lines == expected
    assert [text.get_text() for text in axes.texts] == [f"{r['val_loss']:.3f}" for r in val[-1:]]
    legend = axes.get_legend()
    shown = [text.get_text() for text in legend.get_texts()] if legend else []
    assert shown == list(expected)


@pytest.mark.filterwarnings("error")
def test_the_curve_has_a_picture_of_each_figure_of_an_objective() -> None:
    names = ("loss", "accuracy", "chosen_reward", "margin")
    train = [{"step": s, "tokens": s * 10, **dict.fromkeys(names, 1 / s)} for s in range(1, 9)]
    val = [{"step": s, "tokens": s * 10, **{f"val_{n}": float(s) for n in names}} for s in (0, 8)]
    axes = drawn(plot.loss_curve, [*train, *val, {"step": 8, "val_loss/a": 1.0}], "title").axes
    shown = [one for one in axes if one.has_data()]
    assert [one.get_title() for one in shown] == [name.replace("_", " ") for name in names]
    for one in shown:
        lines = {line.get_label(): data_of(line) for line in one.get_lines()}
        assert lines["val"] == ([0, 8e-5], [0, 8]) and len(lines["train"][0]) == len(train)
    labels = [text.get_text() for text in axes[0].figure.legends[0].get_texts()]
    assert labels == ["train", "train, smoothed", "val"]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60))
def test_smoothing_begins_at_the_first_value_and_stays_among_all(values: list[float]) -> None:
    smoothed = plot._smooth(values)
    assert len(smoothed) == len(values)
    assert smoothed[0] == pytest.approx(values[0])
    for end, value in enumerate(smoothed, 1):
        assert min(values[:end]) - 1e-9 <= value <= max(values[:end]) + 1e-9


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 10**12), max_size=50), st.booleans())
@example([], True)
@example([0], True)
@example([0, 0, 0], True)
@example([1], True)
@example([0, 3], True)
@example([0, 3], False)
def test_the_histogram_has_each_lengths_share(counts: list[int], with_tokens: bool) -> None:
    tokens = [count << i for i, count in enumerate(counts)] if with_tokens else None
    figure = drawn(plot.histogram, counts, "title", tokens)
    (axes,) = figure.axes
    assert axes.get_title() == "title" and axes.get_xlabel() == "document length in tokens"
    series = [counts] if tokens is None else [counts, tokens]
    filled = [i for i, count in enumerate(counts) if count] or [0]
    first, end = filled[0], filled[-1] + 1
    assert axes.get_xlim() == (first, end)
    for bars, values in zip(axes.containers, series, strict=True):
        heights = [bar.get_height() for bar in bars]
        assert heights == [v / (sum(values) or 1) for v in values[first:end] or [0]]
        places = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars]
        assert all(i < left < right < i + 1 for i, (left, right) in enumerate(places, first))
    texts = [text.get_text() for text in axes.get_xticklabels()]
    ticks = dict(zip(map(int, axes.get_xticks()), texts, strict=True))
    assert len(ticks) <= plot.MOST_TICKS + 1 and set(ticks) <= set(range(first, end + 1))
    assert ticks == {at: plot._power_of_two(at) for at in ticks}
    (legend,) = figure.legends
    names = ["documents", "tokens"][: len(series)]
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{sum(values):,} {name}" for values, name in zip(series, names, strict=True)
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("title", ["", "a$b$c", "$", "\\", "$\\nothing{$", "a_b^c", "W" * 300])
def test_any_name_can_be_a_title(title: str) -> None:
    for figure in (drawn(plot.loss_curve, [], title), drawn(plot.histogram, [1, 2], title)):
        assert figure.axes[0].get_title().replace("\n", "") == title


def test_runs_are_overlaid_with_marks_at_their_tokens() -> None:
    runs = {"one": TRAIN, "two": TRAIN[:9] + VAL}
    (axes,) = drawn(overlaid, runs, "title", [100, 200], "killed").axes
    one, two, *marks = axes.get_lines()
    assert [one.get_label(), two.get_label()] == ["one (smoothed)", "two (smoothed)"]
    for line, records in ((one, TRAIN), (two, TRAIN[:9])):
        smoothed = plot._smooth([r["loss"] for r in records])
        assert data_of(line) == ([r["tokens"] / 1e6 for r in records], smoothed)
    assert [set(data_of(mark)[0]) for mark in marks] == [{100 / 1e6}, {200 / 1e6}]
    assert marks[0].get_label() == "killed"


def test_panels_show_each_series_with_its_errors() -> None:
    series = {"acc": [(10**6, 0.5, 0.1), (2 * 10**6, 0.75, 0.25)], "loss": [(10**6, 3.0, 0.0)]}
    acc, loss = drawn(plot.panels, series, "title").axes[:2]
    assert [axes.get_title() for axes in (acc, loss)] == ["acc", "loss"]
    assert data_of(*acc.get_lines()) == ([1, 2], [0.5, 0.75])
    assert data_of(*loss.get_lines()) == ([1], [3.0])
    (band,) = acc.collections
    corners = {(x, y) for x, y in band.get_paths()[0].vertices}
    assert corners == {(1, 0.4), (1, 0.6), (2, 0.5), (2, 1.0)}
    assert not loss.collections


def test_runs_side_by_side_have_a_color_each_and_others_are_levels() -> None:
    series = {
        "acc": {"a": [(10**6, 0.5, 0.1)], "b": [(10**6, 0.25, 0.0)]},
        "loss": {"b": [(10**6, 3.0, 0.0)]},
    }
    figure = drawn(plot.side_by_side, series, {"acc": {"GPT-2": 0.3}}, "title")
    acc, loss = figure.axes[:2]
    a, b, level = acc.get_lines()
    assert data_of(a) == ([1], [0.5]) and data_of(b) == ([1], [0.25])
    assert set(data_of(level)[1]) == {0.3} and [t.get_text() for t in acc.texts] == ["GPT-2"]
    (other,) = loss.get_lines()
    assert data_of(other) == ([1], [3.0])
    assert other.get_color() == b.get_color() != a.get_color()
    ((bar,),) = [bars.get_segments() for bars in acc.collections]
    assert bar[:, 1].tolist() == [0.4, 0.6] and not loss.collections
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    ("exponent", "label"),
    [(0, "1"), (1, "2"), (9, "512"), (10, "1k"), (12, "4k"), (20, "1M"), (33, "8G")],
)
def test_powers_of_two_read_well(exponent: int, label: str) -> None:
    assert plot._power_of_two(exponent) == label


def test_a_machine_without_a_display_can_draw_and_keeps_no_figure() -> None:
    """Drawing never imports pyplot, which would open the requested backend and keep figures."""
    code = (
        "import sys, gc; from manta import plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot.loss_curve([], 't'); plot.histogram([1], 't')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "from matplotlib.figure import Figure; gc.collect()\n"
        "assert not [o for o in gc.get_objects() if isinstance(o, Figure)]\n"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment = {**kept, "MPLBACKEND": "tkagg", "PYTHONPATH": str(ROOT / "platform")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
