"""Pictures open, have their size, and are drawn of whatever there is, without a display."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return image


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("records", [TRAIN + VAL, TRAIN, VAL, BILLIONS, NAN + TRAIN, NAN, []])
def test_the_loss_curve_is_a_png_that_opens(records: list[dict[str, Any]]) -> None:
    assert opened(plot.loss_curve(records, "title")).size == (960, 540)


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 10**12), max_size=50), st.booleans())
def test_the_histogram_is_a_png_that_opens(counts: list[int], with_tokens: bool) -> None:
    tokens = [count << i for i, count in enumerate(counts)] if with_tokens else None
    assert opened(plot.histogram(counts, "title", tokens)).size == (880, 495)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0], [1], [0, 3]])
def test_a_histogram_of_little_or_nothing_is_drawn(counts: list[int]) -> None:
    assert opened(plot.histogram(counts, "title", counts)).size == (880, 495)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("title", ["", "a$b$c", "$", "\\", "$\\nothing{$", "a_b^c", "W" * 300])
def test_any_name_can_be_a_title(title: str) -> None:
    opened(plot.loss_curve([], title))
    opened(plot.histogram([1, 2], title))


def test_pictures_show_what_they_are_given() -> None:
    assert plot.histogram([1, 2, 3], "title") != plot.histogram([3, 2, 1], "title")
    assert plot.histogram([1, 2, 3], "title") != plot.histogram([1, 2, 3], "title", [1, 6, 20])
    assert plot.histogram([1, 2, 3], "title") != plot.histogram([1, 2, 3], "another")


@pytest.mark.parametrize(
    ("exponent", "label"),
    [(0, "1"), (1, "2"), (9, "512"), (10, "1k"), (12, "4k"), (20, "1M"), (33, "8G")],
)
def test_powers_of_two_read_well(exponent: int, label: str) -> None:
    assert plot._power_of_two(exponent) == label


def test_a_machine_without_a_display_can_draw_and_keeps_no_figure() -> None:
    """Whatever backend is asked for: pyplot, which would open it and keep figures, stays out."""
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
