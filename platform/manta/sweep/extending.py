"""How a sweep is to go on: with more seeds, or with values beyond those that it tried. Each is a
command that works as it stands."""

import dataclasses
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manta import config as configs
from manta import layout, storage
from manta.errors import ConfigError
from manta.storage import HomeConfig
from manta.sweep.naming import called, number
from manta.sweep.settings import SweepConfig
from manta.sweep.space import DIGITS, Dimension, exact, flat, shown

SEEDS = 4  # of each contender, where nothing is known yet: one chooses them, three compare them
OUTER = 0.1  # the share of a range, at each of its ends, that counts as its edge
MOST_TIMES = 10.0  # between the best value at an edge and the one to try next


@dataclasses.dataclass(frozen=True)
class Edge:
    """The best value of a key, where nothing beyond it was tried."""

    value: float
    is_low: bool


@dataclasses.dataclass(frozen=True)
class Further:
    """What to try beyond an edge."""

    next: list[Any]
    """The values, or the ends of the range."""
    words: str
    command: str


def tree(c: SweepConfig) -> dict[str, Any]:
    """The config of a sweep as a file for jobs/sweep.py has it, whichever defaults come later."""
    search = configs.differences(c.sweep)
    if c.sweep.space:  # an argument can replace a key only where the file has it by its parts
        search["space"] = _by_parts(c.sweep.space)
    search |= {"lr": c.sweep.lr and list(c.sweep.lr)}
    search |= {"tokens_per_batch": c.sweep.tokens_per_batch and list(c.sweep.tokens_per_batch)}
    shared = {**configs.differences(c), "name": c.name, "total_tokens": c.total_tokens}
    return {**shared, "home": home(c), "sweep": search}


def _by_parts(space: dict[str, Any]) -> dict[str, Any]:
    """A space without dotted keys."""
    made: dict[str, Any] = {}
    for key, spec in flat(space):
        *groups, name = key.split(".")
        place = made
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = spec
    return made


def home(c: SweepConfig) -> str | None:
    """The home as a config file keeps it: where it is the default one, it is left out, so that the
    file goes with a home that moves."""
    is_default = c.home_folder == HomeConfig().home_folder
    return None if is_default else c.home_folder


def command(c: SweepConfig, *arguments: str) -> str:
    """The command that goes on with a sweep, by its own config file, with some more arguments."""
    folder = layout.run_folder(c.home_folder, c.name)
    file = storage.join(folder, layout.SWEEP_CONFIG)
    own = str(Path.home())
    shown_file = f"~{file.removeprefix(own)}" if file.startswith(f"{own}/") else file
    return " ".join(["python jobs/sweep.py", _quoted(shown_file), *map(_quoted, arguments)])


def _quoted(text: str) -> str:
    """A word of a command, in quotes only if a shell needs them. Plain lists need none."""
    return text if all(ch.isalnum() or ch in "~/._-=[],:+" for ch in text) else shlex.quote(text)


def with_seeds(c: SweepConfig, repeats: int) -> str | None:
    """The command that gives a sweep's settings more seeds; None: it cannot have more."""
    search = c.sweep
    if search.replay or search.scheduler == "pbt" or any(d.key == "seed" for d in c.dimensions):
        return None
    arguments = [f"sweep.repeats={repeats}"]
    if search.repeats == 1:
        arguments.append("sweep.repeat=contenders")
    elif search.scheduler == "asha" and search.repeat == "all":
        arguments.append(f"name={c.name}-more-seeds")
    return command(c, *arguments)


def edge(d: Dimension, best: Any, tried: Sequence[Any]) -> Edge | None:
    """Whether the best value of a key is at the edge of those tried; None: it is not, or the values
    have no order."""
    values = [*tried, *d.values] if not d.is_range else [d.low, d.high]
    if not _is_number(best) or not all(map(_is_number, values)) or len(set(values)) < 2:
        return None
    if d.is_range:
        share = _share(d, float(best))
        return Edge(best, share < 0.5) if not OUTER <= share <= 1 - OUTER else None
    return Edge(best, best == min(values)) if best in (min(values), max(values)) else None


def _share(d: Dimension, value: float) -> float:
    if d.kind == "log_uniform":
        return math.log(value / d.low) / math.log(d.high / d.low)
    return (value - d.low) / (d.high - d.low)


def beyond(c: SweepConfig, d: Dimension, at: Edge) -> Further | None:
    """What to try beyond an edge; None: nothing there is possible."""
    new = _range_beyond(d, at) if d.is_range else _value_beyond(d, at)
    if new is None:
        return None
    search, where, arguments = configs.to_dict(c.sweep), c.sweep.where(d.key), []
    spec: Any
    if d.is_range:
        spec, text = {d.kind: new}, " to ".join(map(number, new))
        arguments.append(f"sweep.space.{d.key}.{d.kind}={_listed(new)}")
    else:
        spec, text = sorted([*d.values, *new]), number(new[0])
        arguments.append(f"{where}={_listed(spec)}")
    if d.is_range or c.sweep.scheduler == "pbt":  # these cannot be extended
        arguments.insert(0, f"name={c.name}-{called(d.key)}-{'low' if at.is_low else 'high'}")
    elif c.sweep.search != "grid":
        more = -(-(c.sweep.trials or 0) // len(d.values))
        search["trials"] = (c.sweep.trials or 0) + more
        arguments.append(f"sweep.trials={search['trials']}")
    short = where.removeprefix("sweep.")
    if short in search:
        search[short] = spec
    else:
        search["space"] = _replaced(search["space"], d.key, spec)
    try:
        configs.from_dict(SweepConfig, {**configs.to_dict(c), "sweep": search})
    except ConfigError:
        return None
    return Further(new, f"try {text} next", command(c, *arguments))


def _replaced(space: dict[str, Any], key: str, spec: Any) -> dict[str, Any]:
    """A space with another value for a key, which may be a path of names."""
    if key in space:
        return {**space, key: spec}
    name, _, rest = key.partition(".")
    while name not in space:
        more, _, rest = rest.partition(".")
        name = f"{name}.{more}"
    return {**space, name: _replaced(space[name], rest, spec)}


def _value_beyond(d: Dimension, at: Edge) -> list[Any] | None:
    """One more value, as far from the edge as its neighbour is, or as many times, but at most
    MOST_TIMES: a neighbour that is far away may be one that nobody believed in."""
    values = sorted(set(d.values))
    first, second = (values[0], values[1]) if at.is_low else (values[-1], values[-2])
    if at.value != first:
        return None
    is_whole = all(isinstance(v, int) for v in values)
    times = min(MOST_TIMES, max(1 / MOST_TIMES, first / second)) if values[0] > 0 else 0.0
    far: float = first * times if times else 2 * first - second
    if is_whole and far != int(far):
        far = 2 * first - second
    new = int(far) if is_whole else float(f"{far:.{DIGITS}g}")
    return None if new in values else [new]


def _range_beyond(d: Dimension, at: Edge) -> list[Any]:
    """The ends of a range as wide, with the edge in its middle."""
    if d.kind == "log_uniform":
        half = math.sqrt(d.high / d.low)
        low, high = at.value / half, at.value * half
    else:
        low, high = at.value - (d.high - d.low) / 2, at.value + (d.high - d.low) / 2
    if d.kind == "int_uniform":
        return [math.floor(low), math.ceil(high)]
    return [float(f"{v:.{DIGITS}g}") for v in (low, high)]


def _listed(values: list[Any]) -> str:
    parts = [exact(v) if isinstance(v, float) else shown(v) for v in values]
    return f"[{','.join(parts)}]"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
