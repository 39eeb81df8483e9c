"""A plan as lines for a person."""

from collections.abc import Iterator
from typing import Any

from manta.model.memory import GIB, gib
from manta.train.records.logbook import duration


def lines(tree: dict[str, Any]) -> list[str]:
    """The lines of a plan, as plan.json has it."""
    found = [
        ("run", _run(tree)),
        ("model", _model(tree["model"])),
        ("step", _step(tree["model"], tree["machine"])),
        ("memory", _memory(tree["memory"])),
        *_speed(tree),
        ("checkpoints", _checkpoints(tree["checkpoints"])),
        *_goodput(tree),
        ("bill", _bill(tree)),
        ("loss", _loss(tree)),
        *(("not known", text) for text in tree["unknown"]),
        *(("cannot run", text) for text in tree["problems"]),
    ]
    return [f"{name:<13}{text}" for name, text in found]


def _run(tree: dict[str, Any]) -> str:
    at = tree["machine"]
    where = f"{at['workers']} x {at['device']}, {at['dtype']}, ZeRO stage {at['zero_stage']}"
    if at["instance"]:
        where += f", {at['nodes'] or '?'} x {at['instance']}"
    return f"{tree['run']} on {where}"


def _model(it: dict[str, Any]) -> str:
    return (
        f"{it['parameters'] / 1e6:,.1f}M parameters, {it['flops']:.3g} FLOPs for "
        f"{it['tokens']:,} tokens ({it['tokens'] / it['parameters']:.1f} a parameter)"
    )


def _step(it: dict[str, Any], at: dict[str, Any]) -> str:
    compiled = ", compiled" if it["compiled"] else ""
    return (
        f"{it['steps']:,} steps of {it['tokens_per_batch']:,} tokens: {at['workers']} worker(s) x "
        f"{it['grad_accum_steps']} micro batch(es) of {it['micro_batch']} x "
        f"{it['sequence_length']:,} tokens{compiled}"
    )


def _memory(it: dict[str, Any]) -> str:
    need = it["peak_bytes"] / GIB
    measured = ""
    if it["measured_bytes"] is not None:
        measured = f" (the probe took {gib(it['measured_bytes'])})"
    if it["fits"] is None:
        return f"needs {need:.2f} GiB of a device, whose memory is not known{measured}"
    usable = it["usable_bytes"] / GIB
    of = f"{it['device_bytes'] / GIB:.1f} GiB"
    if it["usable_bytes"] < it["device_bytes"]:
        of += f", of which {usable:.1f} are for a worker"
    if it["fits"]:
        return f"fits: {need:.2f} of {of}{measured}"
    return f"does not fit: needs {need:.2f} of {of}"


def _speed(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if tree["tokens_per_second"] is None:
        return
    it = tree["time"]
    mfu = f", MFU {it['mfu']:.1%}" if "mfu" in it else ""
    yield "speed", f"{tree['tokens_per_second']:,.0f} tok/s{mfu}, by the {it['source']}"
    yield "", f"({it['from']})"
    parts = [f"steps {duration(it['train_seconds'])}"]
    parts.append(f"{it['evaluations']} evaluations {duration(it['evaluation_seconds'])}")
    if it["sample_seconds"]:
        parts.append(f"samples {duration(it['sample_seconds'])}")
    if it["start_seconds"] is None:
        parts.append("its start is not known, and not counted")
    else:
        runs = it["start_from_runs"]
        parts.append(f"start {duration(it['start_seconds'])} (median of {runs} run(s) here)")
    parts.append(f"pauses for saves {duration(tree['goodput']['saves_seconds'])}")
    total = "failures come faster than it recovers: it never ends"
    if tree["hours"] is not None:
        total = duration(3600 * tree["hours"])
        if tree["hours"] >= 24:
            total += f" ({tree['hours'] / 24:,.1f} days)"
    yield "time", f"{total}: {', '.join(parts)}"


def _checkpoints(it: dict[str, Any]) -> str:
    written = ""
    if it["write"] is not None:
        written = f", {it['write']:.1f} s to write one"
    return (
        f"{it['count']:,} saves of {_size(it['bytes_each'])}, of which {it['kept']} stay: "
        f"{_size(it['kept_bytes'])}{written}"
    )


def _size(value: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= unit:
            return f"{value / unit:,.1f} {name}"
    return f"{value / 1e3:,.1f} kB"


def _goodput(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    it = tree.get("goodput")
    if it is None:
        return
    if not it["failures_per_day"]:
        yield "goodput", f"{it['expected']:.1%}, without failures (failures_per_day= counts them)"
        return
    lost = "more than all time"
    if it["lost_seconds"] is not None:
        lost = (
            f"{duration(it['lost_seconds'])} of steps again, "
            f"{duration(it['restart_seconds'])} of restarts"
        )
    yield "goodput", f"{it['expected']:.1%} with {it['failures_per_day']:g} failures a day: {lost}"
    yield (
        "",
        (
            f"a save every {duration(it['interval_seconds'])} of steps; the best by "
            f"{it['best_interval_from']} is {duration(it['best_interval_seconds'])}"
        ),
    )


def _bill(tree: dict[str, Any]) -> str:
    if tree["price_per_hour"] is None:
        return f"not known: {tree['price_from']}; give price_per_hour=, of all machines together"
    hourly = f"{tree['price_per_hour']:,.2f} dollars an hour ({tree['price_from']})"
    if tree["dollars"] is None:
        return f"not known without hours; {hourly}"
    return f"{tree['dollars']:,.2f} dollars, at {hourly}"


def _loss(tree: dict[str, Any]) -> str:
    if tree["loss"] is None:
        return f"not known: {tree['law']}"
    return f"{tree['loss']:.3f} nats a token expected ({tree['law']})"
