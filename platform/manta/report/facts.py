"""Facts of a report. Each is read from a file, or computed from what is read, and says from where.

A key is a JSON pointer (RFC 6901): /seconds/productive. A file of lines is a list of its records,
and * stands for every item of a list that has what follows: /*/tokens_per_second.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from manta import config as configs
from manta import foreign, layout, storage
from manta.errors import MantaError
from manta.model.families import num_parameters
from manta.model.shape import ModelConfig
from manta.report.private import IS_PATH, without_places, without_places_in
from manta.terminal import visible
from manta.train.settings import PretrainConfig

Value = str | int | float

# How a fact follows from what its keys have, `v`. The text is what the report shows; a test
# computes it, and compares.
FORMULAS: dict[str, Callable[[list[Any]], Value]] = {
    "v[0]": lambda v: v[0],
    "v[0] - v[1]": lambda v: v[0] - v[1],
    "v[0] / sum(v)": lambda v: v[0] / sum(v),
    "sum(v)": sum,
    "sum(v) / 3600": lambda v: sum(v) / 3600,
    "v[0] * sum(v[1:]) / 3600": lambda v: v[0] * sum(v[1:]) / 3600,
    "v[0] / v[1] - 1": lambda v: v[0] / v[1] - 1,
    "sum(v[1:]) / 3600 / v[0] - 1": lambda v: sum(v[1:]) / 3600 / v[0] - 1,
    "median(numbers(v[1])) / v[0] - 1": lambda v: statistics.median(numbers(v[1])) / v[0] - 1,
    "max(numbers(v[0]))": lambda v: max(numbers(v[0])),
    "max(numbers(v[1])) / v[0] - 1": lambda v: max(numbers(v[1])) / v[0] - 1,
    "sum(v[0])": lambda v: sum(v[0]),
    "sum(n for n, split in zip(v[0], v[1]) if split == 'train')": lambda v: sum(
        n for n, split in zip(v[0], v[1], strict=True) if split == "train"
    ),
    "min(numbers(v[0]))": lambda v: min(numbers(v[0])),
    "median(numbers(v[0]))": lambda v: statistics.median(numbers(v[0])),
    "len(v[0])": lambda v: len(v[0]),
    "num_parameters(v[0])": lambda v: num_parameters(configs.from_dict(ModelConfig, v[0])),
}
IS = "v[0]"


def numbers(values: list[Any]) -> list[float]:
    """The numbers among values; a figure that is not finite is kept as a text."""
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


@dataclasses.dataclass(frozen=True)
class Source:
    """The place of a value: a file, by its path in the home, and a key in it."""

    file: str
    key: str

    def __str__(self) -> str:
        return f"{self.file} {self.key}"


@dataclasses.dataclass(frozen=True)
class Fact:
    """A value with its name, as a person reads it, and its sources."""

    name: str
    value: Value
    shown: str
    sources: tuple[Source, ...]
    formula: str = IS

    @property
    def origin(self) -> str:
        """The sources and the formula in one line."""
        places = "; ".join(map(str, self.sources))
        return places if self.formula == IS else f"{self.formula}, where v is {places}"


class Files:
    """The files of a home, each read once. A file that cannot be read has nothing in it, and
    `problems` says so."""

    def __init__(self, home: str):
        self._home = home
        self._read: dict[str, Any] = {}
        self.problems: list[str] = []

    def put(self, file: str, content: Any) -> None:
        """Takes `content` for that of a file, which need not exist."""
        self._read[file] = content

    def content(self, file: str) -> Any:
        """The content of a file in the home, None if there is none."""
        if file not in self._read:
            self._read[file] = self._open(file)
        return self._read[file]

    def get(self, file: str, key: str) -> Any:
        """What is at a key; None: nothing. A key with * gives the list of all that is there."""
        found = list(_at(self.content(file), key.split("/")[1:]))
        if "*" in key:
            return found
        return found[0] if found else None

    def fact(
        self,
        name: str,
        places: tuple[tuple[str, str], ...],
        shown: Callable[[Any], str] = str,
        formula: str = IS,
    ) -> Fact | None:
        """The fact that follows from (file, key) places by a formula; None if one of them has
        nothing."""
        values = [self.get(*place) for place in places]
        if not values or any(value is None or value == [] for value in values):
            return None
        try:
            value = FORMULAS[formula](values)
            text = self.private(value) if isinstance(value, str) else shown(value)
        except (TypeError, ValueError, ArithmeticError, MantaError) as e:
            what = f"{name}: {places[0][0]} {places[0][1]} has no such value ({e})"
            self.problems.append(self.private(what))
            return None
        value = text if isinstance(value, str) else value
        return Fact(name, value, text, tuple(Source(*p) for p in places), formula)

    def private(self, text: str) -> str:
        """A text of the files, visible, and without the places where things are."""
        if IS_PATH.match(text):
            return visible(without_places(text, self._home))
        return visible(without_places_in(text, self._home))

    def _open(self, file: str) -> Any:
        path = storage.join(self._home, file)
        if not storage.exists(path):
            return None
        try:
            if file.endswith(".jsonl"):
                lines = storage.read_bytes(path).splitlines()
                return [self._line(file, number, text) for number, text in enumerate(lines, 1)]
            if file.endswith(layout.RUN_CONFIG):
                return configs.to_dict(configs.load(PretrainConfig, [path]))
            return foreign.read_json(path, Any, MantaError)
        except MantaError as e:
            self.problems.append(self.private(f"{file} cannot be read: {e}"))
            return None

    def _line(self, file: str, number: int, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            self.problems.append(f"{file}, line {number}: damaged, and left out")
            return None


def _at(value: Any, keys: list[str]) -> Iterator[Any]:
    """What is at a pointer, already split; several with *."""
    if not keys:
        if value is not None:
            yield value
        return
    key, *rest = keys
    if key == "*" and isinstance(value, list):
        for item in value:
            yield from _at(item, rest)
    elif isinstance(value, dict):
        name = key.replace("~1", "/").replace("~0", "~")
        if name in value:
            yield from _at(value[name], rest)
    elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
        yield from _at(value[int(key)], rest)


def pointer(*keys: str | int) -> str:
    """The JSON pointer of keys."""
    return "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in keys)
