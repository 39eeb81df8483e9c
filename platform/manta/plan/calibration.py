"""A machine's calibration: the seconds that each kind of work (work.py) takes there.

Measured over small whole steps by `python jobs/bench.py what=calibrate`, fitted by non-negative
least squares of the relative errors, and kept in the home as calibration.json, one entry for each
number of workers, device and data type.
"""

import dataclasses
import datetime
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import optimize

from manta import foreign, layout, storage
from manta.config import NonNegativeFloat
from manta.errors import ConfigError, DataError
from manta.foreign import Whole
from manta.plan.work import KINDS, OF_A_MICRO_BATCH

MEASURE = "python jobs/bench.py what=calibrate"


@dataclasses.dataclass
class Machine:
    """The machine on which a calibration was measured."""

    cpu: str
    cores: Whole
    system: str
    torch: str


@dataclasses.dataclass
class Layout:
    """How workers were laid out, and the seconds that one unit of each kind of work took."""

    workers: Whole
    device: str
    """The device of each worker, with a CPU's threads, as a run says it."""
    dtype: str
    measured: str
    """Date and time, UTC."""
    step: dict[str, NonNegativeFloat]
    forward: dict[str, NonNegativeFloat]
    """The same for the forward pass of an evaluation."""
    median_error: NonNegativeFloat
    """Errors of the shapes, each predicted from the others."""
    worst_error: NonNegativeFloat
    busy: NonNegativeFloat
    """Wall time against CPU time of the worker's threads while it was measured; 1: idle else."""


@dataclasses.dataclass
class Calibration:
    """The content of calibration.json."""

    machine: Machine
    layouts: list[Layout]
    write_bytes_per_second: NonNegativeFloat
    """How fast a large file is written to the home's disk, until it is on it."""

    def find(self, workers: int, device: str, dtype: str) -> Layout | None:
        for one in self.layouts:
            if (one.workers, one.device, one.dtype) == (workers, device, dtype):
                return one
        return None


def here() -> Machine:
    """This machine. Its name is nobody's business, and changes with each container."""
    return Machine(_cpu(), os.cpu_count() or 1, platform.system(), torch.__version__)


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load(home: str) -> Calibration | None:
    """The calibration in this home; None: there is none.

    Raises:
        MantaError: the file is damaged, or was measured on another machine.
    """
    path = storage.join(home, layout.CALIBRATION)
    if not storage.exists(path):
        return None
    found = foreign.read_json(path, Calibration, DataError, f"measure again: {MEASURE}")
    now = here()
    if (found.machine.cpu, found.machine.cores, found.machine.system) != (
        now.cpu, now.cores, now.system,
    ):  # fmt: skip
        raise ConfigError(
            f"{path}: measured on another machine ({found.machine.cpu}, {found.machine.cores} "
            f"cores; here {now.cpu}, {now.cores} cores); measure here: {MEASURE} (it replaces the "
            "file), or give another home="
        )
    return found


def keep(home: str, entry: Layout, write_bytes_per_second: float) -> str:
    """Puts an entry into the home's calibration, in place of its earlier one. What another machine
    measured is dropped, as its seconds are not this one's. Returns the file's path."""
    path = storage.join(home, layout.CALIBRATION)
    before: list[Layout] = []
    try:
        found = load(home)
    except (ConfigError, DataError):
        found = None
    if found is not None and found.machine.torch == here().torch:
        before = found.layouts
    key = (entry.workers, entry.device, entry.dtype)
    others = [one for one in before if (one.workers, one.device, one.dtype) != key]
    made = Calibration(here(), [*others, entry], write_bytes_per_second)
    with storage.writing(path, "free some space there, then measure again"):
        storage.write_json(path, dataclasses.asdict(made))
    return path


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def seconds(of: dict[str, float], work: dict[str, float]) -> float:
    """Seconds that this work takes, with the seconds `of` one unit of each kind."""
    return sum(of.get(kind, 0.0) * n for kind, n in work.items())


def fit(works: list[dict[str, float]], times: list[float]) -> dict[str, float]:
    """Seconds of one unit of each kind of work, from steps with these works and times. A kind of
    work that no step has gets no entry."""
    kinds = [kind for kind in KINDS if any(work.get(kind) for work in works)]
    table = np.array([[work.get(kind, 0.0) for kind in kinds] for work in works])
    table /= np.array(times)[:, None]  # so that relative errors count
    scale = table.max(axis=0)
    found, _ = optimize.nnls(table / scale, np.ones(len(times)))
    return dict(zip(kinds, (found / scale).tolist(), strict=True))


def left_out(works: list[dict[str, float]], times: list[float]) -> list[float]:
    """The relative error of each step when it is predicted from all others."""
    errors = []
    for i, (work, time) in enumerate(zip(works, times, strict=True)):
        others = fit(works[:i] + works[i + 1 :], times[:i] + times[i + 1 :])
        errors.append(abs(seconds(others, work) / time - 1))
    return errors


def table(entry: dict[str, Any]) -> list[str]:
    """Lines about an entry, for a terminal."""
    units = {
        "products": "GFLOP", "attention": "GFLOP", "head": "GFLOP", "muon": "GFLOP",
        "calls": "block", "steps": "step",
    }  # fmt: skip
    lines = [f"{'kind of work':<14}{'of a step':>16}{'of an evaluation':>20}"]
    for kind in KINDS:
        unit = units.get(kind, "GB")
        factor = 1.0 if unit in ("block", "step") else 1e9
        step, forward = (entry[part].get(kind) for part in ("step", "forward"))
        if step is None:
            continue
        if kind not in OF_A_MICRO_BATCH:
            forward = None
        cells = [
            "" if seconds is None else f"{seconds * factor * 1e3:,.3f} ms"
            for seconds in (step, forward)
        ]
        lines.append(f"{kind:<14}{cells[0]:>16}{cells[1]:>20}  a {unit}")
    return lines
