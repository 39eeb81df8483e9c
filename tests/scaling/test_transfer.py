"""What a rate is worth at other widths: the coordinate check, optima, and their pictures."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.datasets import write_dataset
from manta.config import from_dict
from manta.errors import DataError
from manta.scaling.answer import answer
from manta.scaling.coordinates import LOGITS, growth
from manta.scaling.powers import optimum
from manta.scaling.settings import ScalingConfig
from manta.scaling.transfer import Curve, compared
from manta.train.settings import TrainConfig

WIDTHS = (32, 64, 128, 256)
VOCAB = 128


def text(count: int) -> np.ndarray:
    """Ids of a text of a few frequent tokens and many rare ones (Zipf's law)."""
    shares = 1 / np.arange(1, VOCAB + 1)
    drawn = np.random.default_rng(0).choice(VOCAB, count, p=shares / shares.sum())
    return drawn.astype(np.uint16)


def of_width(width: int, reference: int | None) -> TrainConfig:
    model = {"context_length": 64, "n_layer": 2, "n_embd": width, "n_head": width // 16}
    more = {"vocab_size": VOCAB, "qk_norm": True, "tie_embeddings": False}
    tree = {"tokens_per_batch": 512, "model": model | more, "init": {"kind": "identity"}}
    return from_dict(TrainConfig, {**tree, "optimizer": {"reference_width": reference}})


def test_with_reference_width_activations_hardly_grow_with_the_width() -> None:
    """muP's coordinate check: the power of the width with which each activation grows is near 0
    with reference_width, and well above that without."""
    tokens, steps = torch.from_numpy(text(65 * 8 * 7).astype(np.int64)), 6
    exponents = {}
    for reference in (64, None):
        found = growth([of_width(width, reference) for width in WIDTHS], tokens, steps)
        assert found.sizes[LOGITS].shape == (4, steps + 1)
        assert not found.exponents(0)  # each block passes its input on, and the head is zero
        exponents[reference] = found.exponents(steps)
    assert len(exponents[64]) == len(exponents[None]) == 2 * 2 + 1
    median = {reference: float(np.median([*e.values()])) for reference, e in exponents.items()}
    assert abs(median[64]) < 0.25 < 0.5 < median[None], exponents


@given(
    st.floats(-6, 6), st.floats(0.01, 10), st.floats(0.05, 2), st.integers(3, 7),
    st.integers(0, 6),
)  # fmt: skip
def test_the_optimum_of_a_parabola_is_its_lowest_point(
    at: float, curvature: float, step: float, count: int, shift: int
) -> None:
    z = at + step * (np.arange(count) - min(shift, count - 1) + 0.3)
    found = optimum([*np.exp(z)], [*(2 + curvature * (z - at) ** 2)])
    if found.is_edge:
        assert found.value in np.exp(z)[[0, -1]]
    else:
        assert math.log(found.value) == pytest.approx(at, abs=1e-5)


def test_a_best_rate_at_the_edge_is_said() -> None:
    found = optimum([1e-3, 2e-3, 4e-3], [3.0, 2.9, 2.8])
    assert found.is_edge and found.value == 4e-3
    assert optimum([1e-3, 2e-3, 4e-3], [2.9, 2.9, 2.9]).value == 1e-3


def settings(home: Path, **keys: Any) -> ScalingConfig:
    model = {"context_length": 32, "n_layer": 1, "n_embd": 32, "n_head": 2, "qk_norm": True}
    optimizer = {"lr": 4e-3, "reference_width": 32}
    tree = {"home": str(home), "tokens_per_batch": 256, "model": model, "optimizer": optimizer}
    return from_dict(ScalingConfig, {**tree, "data": {"mix": {"made": 1.0}}, **keys})


def test_a_coordinate_check_is_drawn_and_written(tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "data" / "made",
        [text(4000).astype(np.uint16)],
        [text(100).astype(np.uint16)],
        2000,
    )
    keys = {"what": "coordinates", "ladder": {"sizes": [32, 64, 96], "grow": "width"}}
    done = answer(settings(tmp_path, coordinates={"steps": 3, "seeds": 2}, **keys))
    assert done.exit_code == 0 and done.folder is not None
    assert any(line.startswith("logits") for line in done.lines)
    facts = json.loads(Path(done.folder, "coordinates.json").read_text())
    assert facts["with"]["widths"] == [32, 64, 96]
    assert np.array(facts["without"]["mean_absolute"]["mlp 1"]).shape == (3, 4)
    Image.open(io.BytesIO(Path(done.folder, "coordinates.png").read_bytes())).load()
    with pytest.raises(DataError, match="take fewer steps"):
        answer(settings(tmp_path, coordinates={"steps": 50}, **keys))


def test_the_rate_transfer_says_where_the_best_rate_goes(tmp_path: Path) -> None:
    rates = [1e-3, 2e-3, 4e-3, 8e-3]
    ladder = {"sizes": [32, 64, 128], "lr": rates, "tokens": [40_960], "grow": "width"}
    c = settings(tmp_path, what="transfer", ladder=ladder)

    def curve(width: int, best: float) -> Curve:
        return Curve(width, tuple(rates), tuple(3 + 0.1 * math.log(r / best) ** 2 for r in rates))

    found = {
        "with": [curve(w, 3e-3) for w in (32, 64, 128)],
        "without": [curve(w, 5e-3 * 32 / w) for w in (32, 64, 128)],
    }
    lines, facts, picture = compared(c, found)  # type: ignore[arg-type]
    assert facts["with"]["exponent"] == pytest.approx(0, abs=1e-6)
    assert facts["without"]["exponent"] == pytest.approx(-1, abs=0.2)
    assert [k["at_edge"] for k in facts["without"]["curves"]] == [False, False, True]
    text = "\n".join(lines)
    assert "1e-03*" in text or "0.001*" in text
    assert "at the edge of the rates tried" in text and "costs 0.0000 nats at width 128" in text
    Image.open(io.BytesIO(picture)).load()
