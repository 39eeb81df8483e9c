"""Text for a terminal: what files and models say is shown, and cannot steer the terminal."""

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

LONGEST = 300  # characters of a foreign text that a message quotes
LONGEST_LINE = 4000  # characters of one line of a message
MOST_NAMED = 20  # items of a list that a message names

# Control characters except newline and tab, other line separators, what changes the direction in
# which a line is read, and bytes of a name that are not UTF-8, which no stream can write.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

_OPENS, _CLOSES = "\x0e", "\x0f"  # which no visible text has


def visible(text: str) -> str:
    r"""The text with each character that steers a terminal as its escape, such as \x1b."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def line(text: str, longest: int = LONGEST) -> str:
    """The text as a part of one line, visible, and cut where it is longer than `longest`."""
    shown = visible(text[: longest + 1]).replace("\n", r"\n").replace("\t", r"\t")
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


def named(items: Collection[str], most: int = MOST_NAMED, between: str = ", ") -> str:
    """The items as a part of a message: at most `most` of them, and how many more there are."""
    shown = [line(item, LONGEST_LINE) for item in itertools.islice(items, most)]
    more = len(items) - len(shown)
    return between.join([*shown, f"and {more:,} more"] if more else shown)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines: a head, a rule and the other rows; all but the first column to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def message(error: Exception) -> str:
    """What an error says. The problems of a config have a line each, and no name or value in them
    can start one that looks like ours."""
    return "\n  ".join(line(part, LONGEST_LINE) for part in str(error).split("\n  "))


class _Visible:
    """A text stream on which everything is written visibly."""

    def __init__(self, stream: Any):
        self.exact = stream

    def write(self, text: str) -> int:
        self.exact.write(visible(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.exact, name)


@contextlib.contextmanager
def visible_output() -> Iterator[None]:
    """Makes visible what is printed to stdout while the block runs."""
    shown: Any = _Visible(sys.stdout)
    with contextlib.redirect_stdout(shown):
        yield


@contextlib.contextmanager
def exact_pipe() -> Iterator[None]:
    """Leaves what is printed to stdout while the block runs as it is, unless a terminal shows
    it."""
    with contextlib.redirect_stdout(sys.stdout if sys.stdout.isatty() else _exact()):
        yield


def marked(text: str) -> str:
    """The text, visible, for a line of which `show` makes it stand out."""
    return f"{_OPENS}{visible(text)}{_CLOSES}"


def show(line: str) -> None:
    """Prints a line. What is `marked` in it is green on a terminal, and in [[ ]] elsewhere and on a
    terminal without colours (NO_COLOR is set, or TERM=dumb)."""
    has_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if has_colour and os.environ.get("TERM") != "dumb":
        marks = {_OPENS: "\x1b[32m", _CLOSES: "\x1b[0m"}
    else:
        marks = {_OPENS: "[[", _CLOSES: "]]"}
    pieces = re.split(f"([{_OPENS}{_CLOSES}])", line)
    print("".join(marks.get(piece) or visible(piece) for piece in pieces), file=_exact())


def _exact() -> Any:
    return getattr(sys.stdout, "exact", sys.stdout)


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """Drops what is written to standard error while the block runs, also by libraries that are not
    written in Python."""
    shown = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)
        os.close(nowhere)


def keep_private() -> None:
    """Makes what this process and those that it starts write readable by their owner alone (files
    0600, folders 0700). The modes of existing files and folders stay."""
    os.umask(0o077)
