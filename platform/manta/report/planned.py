"""The section of a report that puts a run's plan next to what came of it."""

from collections.abc import Callable

from manta import layout
from manta.report.facts import Fact, Files, pointer
from manta.train.records.planned import hours_name

TITLE = "Plan against outcome"
START = pointer("seconds", "start")
STEPS = (pointer("seconds", "productive"), pointer("seconds", "data wait"))
HEAD = ("", "planned", "measured", "off by")

Place = tuple[str, str]
Row = list[Fact | str]


def rows(files: Files, at: Callable[[str], str]) -> list[Row]:
    """A row for each figure of the plan that the run has measured; none without a plan. `at` gives
    the path of a file in the run."""
    plan, metrics, events = at(layout.PLAN), at(layout.METRICS), at(layout.HISTORY)
    goodput = at(layout.GOODPUT)
    if not isinstance(files.content(plan), dict):
        return []
    every = tuple((goodput, pointer("seconds", k)) for k in files.get(goodput, "/seconds") or {})
    counts_start = files.get(plan, "/counts_start") is not False
    counted = tuple(p for p in every if counts_start or p[1] != START)
    steps = tuple(place for place in every if place[1] in STEPS)
    speeds: tuple[Place, ...] = ((metrics, "/*/tokens_per_second"),)
    memory: tuple[Place, ...] = ((metrics, "/*/memory_peak"),)
    if not files.get(*memory[0]):
        memory = ((events, "/*/bytes"),)
    found = [
        _row(files, hours_name(counts_start), (plan, "/hours"), counted, _hours, "sum(v) / 3600",
             "sum(v[1:]) / 3600 / v[0] - 1"),
        _row(files, "hours of steps", (plan, "/train_hours"), steps, _hours, "sum(v) / 3600",
             "sum(v[1:]) / 3600 / v[0] - 1"),
        _row(files, "tokens a second", (plan, "/tokens_per_second"), speeds, _whole,
             "median(numbers(v[0]))", "median(numbers(v[1])) / v[0] - 1"),
        _row(files, "peak memory, GB", (plan, "/peak_memory_bytes"), memory, _gb,
             "max(numbers(v[0]))", "max(numbers(v[1])) / v[0] - 1"),
    ]  # fmt: skip
    last = _last_evaluation(files, metrics)
    if last is not None:
        places = (last, (plan, "/loss"))
        planned = files.fact("planned", (places[1],), _loss)
        measured = files.fact("measured", (last,), _loss)
        off = files.fact("off by", places, _percent, "v[0] / v[1] - 1")
        found.append(_cells("val loss", planned, measured, off))
    return [row for row in found if row]


def _row(
    files: Files,
    name: str,
    plan: Place,
    places: tuple[Place, ...],
    shown: Callable[[float], str],
    formula: str,
    error: str,
) -> Row:
    if not places:
        return []
    planned = files.fact("planned", (plan,), shown)
    measured = files.fact("measured", places, shown, formula)
    off = files.fact("off by", (plan, *places), _percent, error)
    return _cells(name, planned, measured, off)


def _cells(name: str, planned: Fact | None, measured: Fact | None, off: Fact | None) -> Row:
    if planned is None or measured is None or off is None:
        return []
    return [name, planned, measured, off]


def _last_evaluation(files: Files, metrics: str) -> Place | None:
    records = files.content(metrics) or []
    measured = [i for i, r in enumerate(records) if isinstance(r, dict) and "val_loss" in r]
    return (metrics, pointer(measured[-1], "val_loss")) if measured else None


def _hours(value: float) -> str:
    return f"{value:,.3f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _gb(value: float) -> str:
    return f"{value / 1e9:,.3f}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{value:+.1%}"
