"""The benches that plans rest on: peaks of memory against the cost model, and a calibration."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from manta.bench import calibrate, peaks
from manta.bench.settings import BenchConfig
from manta.bench.stages import STAGES
from manta.config import from_dict, load
from manta.errors import ConfigError
from manta.plan import calibration
from manta.train.settings import PretrainConfig


def test_the_cases_of_peaks_are_twelve_configs_that_load() -> None:
    assert len({case.name for case in peaks.CASES}) == len(peaks.CASES) == 12
    for case in peaks.CASES:
        found = [peaks.predict(case, stage) for stage in STAGES]
        assert min(found) > 100e6  # far above the noise in a process's size


def test_the_table_of_peaks_has_each_stage() -> None:
    rows = [{"name": "a", "stage": n, "predicted": 1.1e8, "measured": 1e8} for n in STAGES]
    errors = {"median_error": 0.1, "worst_error": 0.1, "close": 0}
    shown = peaks.table({"workers": 2, "rows": rows, **errors})
    assert shown.count("110 / 100 (1.100)") == 4 and shown.endswith("within 5%: 0 of 4")


@pytest.mark.long
def test_the_peak_of_a_step_is_what_is_predicted() -> None:
    c = from_dict(BenchConfig, {"what": "peaks", "parts": "modern"})
    assert peaks.peaks(c)["worst_error"] < 0.08


def test_parts_are_for_two_benches() -> None:
    with pytest.raises(ConfigError, match="parts=modern is for what=gpu or peaks"):
        load(BenchConfig, ["what=model", "parts=modern"])


def test_each_shape_of_the_survey_is_a_config_for_any_number_of_workers() -> None:
    for shape in calibrate.SHAPES:
        for workers in (1, 2):
            c = from_dict(PretrainConfig, shape.keys(workers))
            assert c.micro_batch == shape.micro_batch and c.workers == workers
            assert c.grad_accum_steps(0) == shape.grad_accum_steps


def test_the_table_of_a_calibration_names_where_it_is_kept(tmp_path: Path) -> None:
    entry = calibration.Layout(
        1, "CPU, 2 threads", "bf16", calibration.now(), {"products": 1e-12, "muon": 2e-12},
        {"products": 1e-12}, 0.05, 0.2, 1.3,
    )  # fmt: skip
    result: dict[str, Any] = {
        "layout": dataclasses.asdict(entry), "kept": str(tmp_path), "write_bytes_per_second": 1e9
    }  # fmt: skip
    shown = calibrate.table(result)
    assert "products" in shown and "1.000 ms" in shown and str(tmp_path) in shown
