"""The lines that a person types, or that come from a pipe or a file."""

import io
import sys
from collections.abc import Callable, Iterator

from manta.errors import DataError

PROMPT = "> "
HELP = "/reset forgets the conversation; /quit and Ctrl-D end it; Ctrl-C stops an answer"


def lines(hint: Callable[[str], None]) -> Iterator[str]:
    """Yields the lines of the standard input, without white space around them; no empty ones.

    A terminal gets a prompt, the keys of readline and a line of help, through `hint`.

    Raises:
        DataError: a line is not UTF-8.
    """
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        import readline  # noqa: F401 - `input` edits lines with it

        hint(HELP)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    number = 0
    while True:
        number += 1
        try:
            text = input(PROMPT) if is_terminal else sys.stdin.readline()
        except UnicodeDecodeError as e:
            raise DataError(
                f"standard input, at line {number}: not UTF-8 ({e.reason}); convert the text"
            ) from None
        except EOFError:
            hint("")  # the shell's prompt gets a line of its own
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            hint(f"\n{HELP}")
            continue
        if not is_terminal and not text:
            return
        if text.strip():
            yield text.strip()
