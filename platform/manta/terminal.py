"""Text for a terminal: what files and models say is shown, and cannot steer the terminal."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

# Control characters except newline and tab, other line separators, and what changes the direction
# in which a line is read; and halves of surrogate pairs (as in file names that are not UTF-8), at
# which printing fails.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""The text with each character that steers a terminal as its escape, such as \x1b."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def visible_line(text: str) -> str:
    """A visible text whose newlines are escapes too, except before an indented line: a message may
    have several lines, but no name or value in it can start one that looks like ours."""
    return re.sub(r"\n(?! )", r"\\n", visible(text))


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
    with contextlib.redirect_stdout(
        sys.stdout if sys.stdout.isatty() else getattr(sys.stdout, "exact", sys.stdout)
    ):
        yield


def keep_private() -> None:
    """Makes what this process and those that it starts write readable by their owner alone (files
    0600, folders 0700). The modes of existing files and folders stay."""
    os.umask(0o077)
