"""The space of a sweep: the keys that it varies, the values that each may take, and how trials are
named after theirs. Pure arithmetic."""

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

Kind = Literal["choice", "uniform", "log_uniform", "int_uniform"]
RANGES = ("uniform", "log_uniform", "int_uniform")
KINDS = ("choice", *RANGES)
LR, BATCH = "optimizer.lr", "tokens_per_batch"
SHORT = {LR: "lr", BATCH: "batch"}  # how names of trials have called these keys from the start
DIGITS = 3  # of a number that is drawn from a range: more would not be seen in the loss
LONGEST = 160  # characters of a trial's own name; a longer one ends in a digest

Settings = dict[str, Any]
"""The keys that a sweep varies, dotted, each with its value in one trial."""


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A key and what it may be: one of `values`, or a number from `low` to `high`."""

    key: str
    kind: Kind
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def is_range(self) -> bool:
        return self.kind in RANGES

    @property
    def all_values(self) -> Sequence[Any]:
        """All values of a choice or of a range of whole numbers."""
        if self.kind == "int_uniform":
            return range(int(self.low), int(self.high) + 1)
        return self.values

    def at(self, share: float) -> Any:
        """The value at a share from 0 to 1 of the dimension; numbers of a range are rounded to
        three digits, and stay inside it."""
        if self.kind == "choice":
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.kind == "int_uniform":
            low, high = int(self.low), int(self.high)
            return min(low + int(share * (high - low + 1)), high)
        if self.kind == "log_uniform":
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return self.nearest(value)

    def nearest(self, value: float) -> Any:
        """The value of a range that is nearest to a number, rounded to three digits."""
        if self.kind == "int_uniform":
            return int(min(max(round(value), self.low), self.high))
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def spec(self) -> Any:
        """The dimension as a config has it: a list, or {kind: [low, high]}."""
        if self.kind == "choice":
            return list(self.values)
        bounds = [self.low, self.high]
        return {self.kind: [int(b) for b in bounds] if self.kind == "int_uniform" else bounds}

    def lacks(self, older: "Dimension") -> list[str]:
        """What an older dimension of this key allowed and this one does not, in words."""
        if self.kind != older.kind:
            return [f"it was {shown(older.spec())}, and now is {shown(self.spec())}"]
        if self.kind == "choice":
            kept = set(map(_in_name, self.values))
            lost = [shown(v) for v in older.values if _in_name(v) not in kept]
            return [f"{', '.join(lost)} is missing now"] if lost else []
        if (self.low, self.high) != (older.low, older.high):
            return [f"it was {shown(older.spec())}, and now is {shown(self.spec())}"]
        return []


def shown(value: Any) -> str:
    """A value as an argument has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of `sweep.space` with dotted keys. A leaf is a list or {log_uniform: [a, b]};
    anything else above it is a part of the key."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not any(map(_is_like_a_kind, value)):
            yield from flat(value, f"{key}.")
        else:
            yield key, value


def _is_like_a_kind(name: Any) -> bool:
    """Whether a name is that of a kind, or nearly, as a key with a typing error is not a group."""
    return bool(difflib.get_close_matches(str(name), KINDS, n=1, cutoff=0.8))


def parse(key: str, spec: Any) -> Dimension:
    """A key of `sweep.space` with its values. Raises ValueError, which says in one line what is
    wrong with them and what would be right."""
    if isinstance(spec, Mapping):
        if len(spec) != 1 or (kind := next(iter(spec))) not in KINDS:
            near = difflib.get_close_matches(str(next(iter(spec), "")), KINDS, n=1)
            raise ValueError(
                f"{shown(dict(spec))}: a list, or one of {', '.join(KINDS)} is expected"
                + (f"; did you mean {near[0]}?" if near and len(spec) == 1 else "")
            )
        values = spec[kind]
    else:
        kind, values = "choice", spec
    if not isinstance(values, list | tuple):
        example = "[1, 2]" if kind == "choice" else f"{{{kind}: [1, 2]}}"
        raise ValueError(f"{shown(spec)}: a list is expected, as in {example}")
    if kind == "choice":
        return Dimension(key, "choice", _choices(tuple(values)))
    return _range(key, kind, values)


def _choices(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("[]: it needs a value")
    names = list(map(_in_name, values))
    for index, value in enumerate(values):
        if names[index] in names[:index]:  # two trials would have one name
            raise ValueError(f"{shown(list(values))}: {shown(value)} is there twice: omit one")
    return values


def _range(key: str, kind: Any, bounds: Any) -> Dimension:
    given = f"{{{kind}: {shown(list(bounds))}}}"
    if len(bounds) != 2 or not all(_is_number(b) for b in bounds):
        raise ValueError(f"{given}: two numbers are expected, [lowest, highest]")
    low, high = bounds
    if not low < high:
        raise ValueError(f"{given}: the first number has to be below the second")
    if kind == "log_uniform" and low <= 0:
        raise ValueError(f"{given}: both have to be above 0, or use uniform")
    if kind == "int_uniform" and not all(float(b).is_integer() for b in bounds):
        raise ValueError(f"{given}: two whole numbers are expected")
    return Dimension(key, kind, (), float(low), float(high))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def grid(space: tuple[Dimension, ...]) -> Iterator[Settings]:
    """Every combination of the values, the last key's fastest. No key may have a range of real
    numbers."""
    for values in itertools.product(*(d.all_values for d in space)):
        yield dict(zip((d.key for d in space), values, strict=True))


def drawn(space: tuple[Dimension, ...], seed: int, index: int) -> Settings:
    """The settings of draw number `index`; they depend on the seed and the number alone, so that
    more trials leave those before as they were."""
    random = np.random.default_rng(np.random.SeedSequence([seed, index]))
    return {d.key: d.at(float(random.random())) for d in space}


def size(space: tuple[Dimension, ...]) -> float:
    """The number of combinations; infinite if a key has a range of real numbers."""
    is_real = any(d.kind in ("uniform", "log_uniform") for d in space)
    return math.inf if is_real else math.prod(len(d.all_values) for d in space)


def label(settings: Settings) -> str:
    """The name of a trial within its sweep: lr0.001-batch4096. A key is called by its last part, or
    in full if two have the same."""
    ends = [key.rpartition(".")[2] for key in settings]
    parts = []
    for key, value in settings.items():
        end = key.rpartition(".")[2]
        called = SHORT.get(key) or (end if ends.count(end) == 1 else key)
        parts.append(f"{called}{_in_name(value)}")
    name = "-".join(parts)
    if len(name) > LONGEST:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[:LONGEST]}-{digest}"
    return name


def _in_name(value: Any) -> str:
    """A value as a part of a name: in short if that is exact. Where characters cannot be in a name,
    a digest tells the value from others."""
    if isinstance(value, float) and math.isfinite(value):
        return exact(value)
    text = shown(value)
    kept = re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("_")
    if kept == text:
        return text
    return f"{kept[:40]}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def exact(number: float) -> str:
    """A number as a part of a name: in short if that is exact, else with all its digits."""
    short = f"{number:g}"
    return (short if float(short) == number else repr(float(number))).replace("+", "")
