"""The run that faults from outside befall, and what it ends in without one."""

from pathlib import Path

import pytest
from conftest import tiny_arguments

from faults.jobs import final, job
from faults.runs import KEYS

# Long enough for somebody outside to act in the middle of it.
LONGER = ["total_tokens=102400", "eval.tokens=64", "checkpoint.every=50"]  # 400 steps


@pytest.fixture(scope="module")
def arguments(prepared: Path, corpus: Path) -> list[str]:
    one = [*KEYS, "num_workers=1", *LONGER]
    return [*tiny_arguments(prepared, corpus), *one]


@pytest.fixture(scope="module")
def weights(arguments: list[str], prepared: Path) -> bytes:
    """Of the run that nothing befell."""
    with job("driver-whole", *arguments) as whole:
        assert whole.end() == 0, "\n".join(whole.lines)
    return final(prepared, "driver-whole")
