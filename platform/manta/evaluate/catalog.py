"""The suites of evals/, and the names that a person may have meant."""

import difflib
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / "evals"


def names() -> list[str]:
    """Of the suites."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def nearest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?", or nothing where no name is like it."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
