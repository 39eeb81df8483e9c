"""A prediction of a run's loss: filed before the run begins, never replaced, checked after."""

import dataclasses
import datetime
import math
import time

from manta import foreign, layout, storage
from manta.config import PositiveFloat
from manta.errors import ConfigError, DataError
from manta.foreign import exact
from manta.lock import lock
from manta.scaling.fit import LEVEL, Fit
from manta.scaling.points import from_run
from manta.train.records import history

CLOSE = 0.01  # the share by which a run may miss the N and D that were filed
EMBEDDINGS = ("all", "no_embeddings")


@exact
@dataclasses.dataclass(frozen=True)
class Filed:
    """What is filed."""

    run: str
    filed: str
    """Date and time, UTC."""
    time: PositiveFloat
    """The same in seconds since 1970."""
    parameters: PositiveFloat
    tokens: PositiveFloat
    count: str
    """The parameters that are counted; "file": those of a CSV file, whose author knows."""
    loss: PositiveFloat
    low: PositiveFloat
    high: PositiveFloat
    """The interval: uncertainty of the law (bootstrap) and a run's own residual together."""
    level: PositiveFloat
    law: dict[str, float]
    points: int
    inputs: dict[str, str]
    """sha256 of the files that the law was fitted to."""


def file(
    study: str, run: str, home: str, found: Fit, n: float, d: float, count: str,
    inputs: dict[str, str],
) -> Filed:  # fmt: skip
    """Files the loss predicted for a run of `n` parameters and `d` tokens. If the same prediction
    is made again, the one on file stays.

    Raises:
        ConfigError: another prediction for this run is on file, or the run has begun.
    """
    path = layout.prediction_file(study, run)
    loss, low, high = found.prediction(n, d)
    if not all(0 < value < math.inf for value in (loss, low, high)):
        raise DataError(
            f"predict.name={run}: the law says {loss:.3g} ({low:.3g} to {high:.3g}) for {n:.3g} "
            f"parameters and {d:.3g} tokens, which is no loss; add runs"
        )
    now = time.time()
    date = datetime.datetime.fromtimestamp(now, datetime.UTC).isoformat(timespec="seconds")
    made = Filed(
        run, date, now, n, d, count, loss, low, high, LEVEL, dataclasses.asdict(found.law),
        len(found.residuals), inputs,
    )  # fmt: skip
    with lock(layout.prediction_lock(study, run), f"the prediction for {run}"):
        if storage.exists(path):
            there = read(path)
            if dataclasses.replace(made, filed=there.filed, time=there.time) == there:
                return there
            raise ConfigError(
                f"{path}: another prediction for this run was filed on {there.filed}, and a filed "
                "prediction is never replaced; name another run with predict.name="
            )
        if not storage.is_empty(layout.run_folder(home, run)):
            raise ConfigError(
                f"predict.name={run}: this run has begun already, and a prediction is filed before "
                "the run that tests it; name a new run"
            )
        with storage.writing(path, "free some space there, then run the same command again"):
            storage.write_json(path, dataclasses.asdict(made))
    return made


def read(path: str) -> Filed:
    return foreign.read_json(path, Filed, DataError, "restore the file")


def check(study: str, run: str, home: str) -> list[str]:
    """The lines that compare a finished run with its prediction.

    Raises:
        MantaError: nothing was filed for this run, it began before the filing or is not finished,
            or it is a run of another size or length.
    """
    path = layout.prediction_file(study, run)
    if not storage.exists(path):
        raise ConfigError(
            f"check={run}: no prediction for this run is on file ({path} is missing); one is filed "
            "with predict.name= before the run begins"
        )
    filed = read(path)
    folder = layout.run_folder(home, run)
    events, _ = history.read(folder) if storage.exists(folder) else ([], None)
    count = filed.count if filed.count in EMBEDDINGS else "all"
    point = from_run(run, home, count).point
    if not events:
        raise DataError(
            f"check={run}: {layout.HISTORY} of the run has no start, so it cannot be told whether "
            "it began after the prediction was filed"
        )
    began = min(event["time"] for event in events)
    if began < filed.time:
        raise DataError(
            f"check={run}: the run began {filed.time - began:,.0f} seconds before the prediction "
            "was filed, so it tests nothing; predict a new run"
        )
    sizes = [point.n]
    if filed.count not in EMBEDDINGS and point.other_n is not None:
        sizes.append(point.other_n)
    size = min(sizes, key=lambda n: abs(n - filed.parameters))
    for what, is_, was in (
        ("parameters", size, filed.parameters),
        ("tokens", point.d, filed.tokens),
    ):
        if abs(is_ - was) > CLOSE * was:
            raise DataError(
                f"check={run}: the run has {is_:,.0f} {what}, and the prediction is for "
                f"{was:,.0f}; a run tests it that has, within 1%, as many"
            )
    inside = filed.low <= point.loss <= filed.high
    return [
        f"filed on {filed.filed}: {run} will have a loss of {filed.loss:.4f} "
        f"({filed.level:.0%} interval {filed.low:.4f} to {filed.high:.4f})",
        f"measured: {point.loss:.4f}, which is {'inside' if inside else 'OUTSIDE'} the interval "
        f"and {point.loss / filed.loss - 1:+.2%} off the prediction",
    ]
