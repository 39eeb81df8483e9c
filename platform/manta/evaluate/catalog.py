"""The suites of evals/, and suggestions for a misspelt name."""

import difflib
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / "evals"


def names() -> list[str]:
    """The names of the suites, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def nearest(name: str, known: Sequence[str]) -> str:
    """The text "; did you mean ...?", or an empty one if no known name is similar."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
