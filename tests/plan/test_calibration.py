"""A calibration finds the seconds of each kind of work again, and belongs to its machine."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta import layout, storage
from manta.config import from_dict
from manta.errors import MantaError
from manta.model.cost import flops_per_token
from manta.plan import calibration, work
from manta.plan.calibration import Layout
from manta.train.settings import PretrainConfig

few = settings(deadline=None, max_examples=25)
SHAPES = [
    work.Shape(*numbers)
    for numbers in (
        (1, 64, 64, 512, 4), (4, 64, 128, 512, 8), (2, 128, 256, 1024, 4), (8, 128, 64, 512, 4),
        (2, 256, 64, 4096, 4), (4, 256, 256, 512, 4, 2), (2, 128, 1024, 512, 2),
        (1, 256, 128, 16384, 4), (6, 512, 64, 512, 1), (2, 512, 256, 1024, 2),
    )
]  # fmt: skip


def work_of(shape: work.Shape, **more: object) -> dict[str, float]:
    c = from_dict(PretrainConfig, {**shape.keys(1), **more})
    return work.of_step(c, c.model, shape.micro_batch, "fp32", "cpu")


def an_entry(workers: int = 1, median_error: float = 0.0) -> Layout:
    return Layout(
        workers, "CPU, 2 threads", "fp32", calibration.now(), {"products": 1e-10}, {}, median_error,
        0.0, 1.0,
    )  # fmt: skip


@given(rates=st.lists(st.floats(1e-11, 1e-9), min_size=3, max_size=3), call=st.floats(0, 1e-2))
@few
def test_the_seconds_of_made_machines_are_found(rates: list[float], call: float) -> None:
    """A machine whose time is products, traffic, optimizer and calls is predicted exactly."""
    of = dict(zip(("products", "traffic", "optimizer"), rates, strict=True)) | {"calls": call}
    works = [work_of(shape) for shape in SHAPES]
    found = calibration.fit(works, [calibration.seconds(of, it) for it in works])
    other = work_of(work.Shape(3, 192, 96, 777, 6, 3))
    wanted = calibration.seconds(of, other)
    assert calibration.seconds(found, other) == pytest.approx(wanted, rel=0.02)


def test_noise_of_a_tenth_gives_errors_of_about_a_tenth() -> None:
    of = {"products": 1e-10, "traffic": 1e-9, "optimizer": 1e-9, "calls": 1e-3}
    noise = 1 + 0.1 * np.random.default_rng(0).standard_normal(len(SHAPES))
    works = [work_of(shape) for shape in SHAPES]
    times = [calibration.seconds(of, it) * n for it, n in zip(works, noise, strict=True)]
    errors = calibration.left_out(works, times)
    assert 0.03 < np.median(errors) < 0.3


@pytest.mark.parametrize("family", ["gpt2", "modern"])
def test_products_attention_and_head_are_the_flops_of_the_cost_model(family: str) -> None:
    shape = work.Shape(3, 128, 64, 500, 4, family=family)
    found = work_of(shape)
    c = from_dict(PretrainConfig, shape.keys(1))
    flops = flops_per_token(c.model, 64) * 64 * 4
    assert found["products"] + found["attention"] + found["head"] == pytest.approx(flops)


def test_work_grows_with_micro_batches_and_not_with_workers_of_their_own_batch() -> None:
    one, two = work_of(SHAPES[1]), work_of(dataclasses.replace(SHAPES[1], grad_accum_steps=2))
    for kind in work.OF_A_MICRO_BATCH:
        assert two[kind] == 2 * one[kind]
    for kind in work.OF_A_STEP:
        assert two[kind] == one[kind]
    c = from_dict(PretrainConfig, SHAPES[1].keys(2))
    both = work.of_step(c, c.model, SHAPES[1].micro_batch, "fp32", "cpu")
    assert {**both, "reduced": 0.0} == one and both["reduced"] > 0


def test_entries_are_kept_next_to_each_other_and_replaced(tmp_path: Path) -> None:
    home = str(tmp_path)
    assert calibration.load(home) is None
    for entry in (an_entry(1), an_entry(2), an_entry(1, median_error=0.5)):
        calibration.keep(home, entry, 1e9)
    found = calibration.load(home)
    assert found is not None and len(found.layouts) == 2
    one = found.find(1, "CPU, 2 threads", "fp32")
    assert one is not None and one.median_error == 0.5
    assert found.find(1, "CPU, 4 threads", "fp32") is None


def test_a_calibration_of_another_machine_is_refused_and_replaced(tmp_path: Path) -> None:
    home = str(tmp_path)
    path = calibration.keep(home, an_entry(), 1e9)
    there = storage.read_json(path)
    there["machine"]["cpu"] = "a faster CPU"
    storage.write_json(path, there)
    with pytest.raises(MantaError, match=r"measured on another machine \(a faster CPU"):
        calibration.load(home)
    calibration.keep(home, an_entry(2), 1e9)
    found = calibration.load(home)
    assert found is not None and [entry.workers for entry in found.layouts] == [2]


@pytest.mark.parametrize("content", ["{", "[]", '{"machine": {"cpu": 1}}'])
def test_a_damaged_calibration_is_said_with_what_to_do(tmp_path: Path, content: str) -> None:
    (tmp_path / layout.CALIBRATION).write_text(content)
    with pytest.raises(MantaError, match=r"calibration\.json: .*; measure again: python"):
        calibration.load(str(tmp_path))
