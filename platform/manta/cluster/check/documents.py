"""YAML with the line of each key, values that are left to fill in, names that nearly fit."""

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from manta.errors import ClusterError

# What stands in the project's files for a value that only a person knows: the word itself, ids of
# AWS that are all zeros, and the addresses that are reserved for documentation (RFC 5737).
PLACEHOLDER = re.compile(
    r"[^\s'\"=,{}\[\]]*(?:FILL.IN|\b(?:ami|sg|subnet)-0{8,}|\b192\.0\.2\.\d+)[^\s'\",{}\[\]]*"
)
COMMENT = re.compile(r"(^|\s)#(?!SBATCH\b).*")

Path_ = tuple[str | int, ...]


class Problem(NamedTuple):
    """What is wrong in a file, and the line where (0: in no line of it)."""

    line: int
    text: str


@dataclass(frozen=True)
class Document:
    """A YAML document: its value, and the lines on which its keys and items stand."""

    value: Any
    lines: dict[Path_, int] = field(default_factory=dict)

    def at(self, *path: str | int) -> int:
        """The line of a key or an item, or of what is nearest above it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 0)

    def problem(self, text: str, *path: str | int) -> Problem:
        return Problem(self.at(*path), text)


def read(file: Path) -> str:
    """The text of a file.

    Raises:
        ClusterError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "not UTF-8"
        raise ClusterError(f"{file}: cannot be read ({reason}); give a file of clusters/") from None


def load(text: str) -> list[Document]:
    """The YAML documents of a text, those that are empty left out.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    found = []
    for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
        if node is not None:
            loader = yaml.SafeLoader("")
            value = loader.construct_document(node)
            found.append(Document(value, dict(_lines(node))))
    return found


def mapping(file: Path) -> dict[str, Any]:
    """The keys and values of the first YAML document in a file that has such.

    Raises:
        ClusterError: the file cannot be read, or has none.
    """
    try:
        found = [document.value for document in load(read(file))]
    except yaml.YAMLError as e:
        raise ClusterError(f"{file}: not YAML ({' '.join(str(e).split())[:200]})") from None
    for value in found:
        if isinstance(value, dict):
            return value
    raise ClusterError(f"{file}: has no keys; give a file as those of clusters/")


def _lines(node: yaml.Node, path: Path_ = ()) -> Iterator[tuple[Path_, int]]:
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            yield from _lines(value, here)
            yield here, key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _lines(value, (*path, i))


def placeholders(text: str) -> Iterator[Problem]:
    """The values that are left to fill in, outside comments."""
    for number, line in enumerate(text.splitlines(), start=1):
        for found in PLACEHOLDER.finditer(COMMENT.sub("", line)):
            yield Problem(number, f"{found[0]} is left to fill in (the comments say what it is)")


def unknown(name: str, known: Collection[str], where: str) -> str:
    """The text of the problem that `where` has no key of this name."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"valid: {', '.join(sorted(known))}"
    return f"{where} has no key {name}; {hint}"


def strings(value: object, *path: str | int) -> Iterator[tuple[Path_, str]]:
    """Every string in a value with the path to it, keys left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(inner, *path, key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from strings(inner, *path, i)
    elif isinstance(value, str):
        yield path, value
