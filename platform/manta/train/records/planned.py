"""The plan of a run, made by jobs/plan.py before its start, next to what came of it."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from manta import foreign, layout, storage
from manta.config import PositiveFloat
from manta.errors import DataError
from manta.foreign import Whole
from manta.terminal import named
from manta.train.records import history, ledger
from manta.train.records.logbook import evaluations, read_metrics

# Keys of a run's config that do not change what it takes.
ELSEWHERE = (
    "home", "resume", "wait_seconds", "max_failures", "hang_seconds", "log_every", "alerts",
    "track",
)  # fmt: skip
CLOSE = 0.01  # the share by which a run's length may miss that of its plan
GB = 1e9


@dataclasses.dataclass
class Plan:
    """What is computed with of a plan. None: the plan did not know it."""

    run: str
    tokens: Whole
    config: dict[str, Any]
    hours: PositiveFloat | None = None
    counts_start: bool = True
    """Whether these hours include the start of the workers, which the home's first run has not
    known."""
    train_hours: PositiveFloat | None = None
    """The part of these hours that goes into steps."""
    tokens_per_second: PositiveFloat | None = None
    """All workers' together."""
    peak_memory_bytes: PositiveFloat | None = None
    """The peak of the fullest worker."""
    loss: PositiveFloat | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of a plan, and what the run measured."""

    name: str
    planned: float
    measured: float

    @property
    def error(self) -> float:
        """The share by which the run missed its plan: 0.1 is 10% more than planned."""
        return self.measured / self.planned - 1


def header(name: str, config: dict[str, Any], made: str) -> dict[str, Any]:
    """What identifies a plan: the run's name, its config, and the time at which it was made."""
    return {"run": name, "made": made, "config": config}


def adopt(
    home: str, name: str, run: str, config: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Copies the plan of a run that begins now into its folder. A plan for another config stays
    where it is, and a line says so; so does one that is damaged. No plan stops a run."""
    path = layout.plan_file(home, name)
    if not storage.exists(path):
        return
    try:
        plan = foreign.read_json(path, Plan, DataError, "plan again with jobs/plan.py")
    except DataError as e:
        say(f"{e}; the run begins without a plan")
        return
    differ = sorted(_differences(plan.config, config))
    if differ:
        say(
            f"the plan {path} is for another config, and is left there (it differs in "
            f"{named(differ, most=5)}): jobs/plan.py plans this one"
        )
        return
    storage.write_bytes(storage.join(run, layout.PLAN), storage.read_bytes(path))


def _differences(a: dict[str, Any], b: dict[str, Any], before: str = "") -> set[str]:
    """The keys in which two configs differ, without those that do not matter."""
    found = set()
    for key in {*a, *b} - ({*ELSEWHERE} if not before else set()):
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= _differences(one, other, f"{before}{key}.")
        elif one != other:
            found.add(f"{before}{key}")
    return found


def read(run: str) -> Plan | None:
    """The plan in a run's folder; None if there is none, or a damaged one."""
    path = storage.join(run, layout.PLAN)
    if not storage.exists(path):
        return None
    try:
        return foreign.read_json(path, Plan, DataError)
    except DataError:
        return None


def figures(run: str) -> list[Figure]:
    """The figures of a run's plan that the run has measured; none if it has no plan."""
    plan = read(run)
    if plan is None:
        return []
    metrics = read_metrics(storage.join(run, layout.METRICS))
    speeds = [r["tokens_per_second"] for r in metrics if "tokens_per_second" in r]
    last: dict[str, Any] = next(
        reversed(evaluations(metrics, metrics[-1]["step"] if metrics else 0)), {}
    )
    hours = ledger.seconds_of(run) / 3600
    if not plan.counts_start:
        hours -= ledger.causes_of(run)["start"] / 3600
    trained = max((r.get("tokens") or 0 for r in metrics), default=0)
    is_whole = abs(trained - plan.tokens) <= CLOSE * plan.tokens
    measured = {
        hours_name(plan.counts_start): (plan.hours, hours if is_whole else None),
        "hours of steps": (plan.train_hours, _steps(run) / 3600 if is_whole else None),
        "tok/s": (plan.tokens_per_second, statistics.median(speeds) if speeds else None),
        "peak memory in GB": (plan.peak_memory_bytes, peak_memory(run, metrics)),
        "val loss": (plan.loss, last.get("val_loss") if is_whole else None),
    }
    return [
        Figure(name, planned, float(found))
        for name, (planned, found) in measured.items()
        if planned is not None and isinstance(found, int | float) and found > 0
    ]


def hours_name(counts_start: bool) -> str:
    """How a comparison names the hours of a plan."""
    return "hours" if counts_start else "hours after the start"


def _steps(run: str) -> float:
    """Seconds of the steps that the run kept."""
    causes = ledger.causes_of(run)
    return causes["productive"] + causes["data wait"]


def peak_memory(run: str, metrics: list[dict[str, Any]]) -> float | None:
    """The most bytes that the first worker took; None if the run has not measured it."""
    events, _ = history.read(run)
    found = [r["memory_peak"] for r in metrics if isinstance(r.get("memory_peak"), int)]
    found += [e["bytes"] for e in events if e["event"] == "memory" and "bytes" in e]
    return max((n for n in found if isinstance(n, int | float)), default=None)


def line(run: str) -> list[str]:
    """The line of a run's summary that says how wrong its plan was; [] without a plan."""
    found = figures(run)
    if not found:
        return []
    return ["plan         " + ", ".join(map(_shown, found))]


def _shown(figure: Figure) -> str:
    scale = GB if figure.name.endswith("GB") else 1.0
    pair = [_short(value / scale) for value in (figure.measured, figure.planned)]
    return f"{figure.name} {pair[0]} (planned {pair[1]}: {figure.error:+.1%})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
