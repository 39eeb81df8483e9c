"""Fixtures for faults from outside: the run that they hit, its weights without a fault, and the
table."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.inject import SEED
from faults.jobs import final, job
from faults.runs import KEYS
from helpers.common import tiny_arguments

# 400 steps are long enough to act from outside in the middle of them, also on a fast machine.
LONGER = ["total_tokens=409600", "tokens_per_batch=1024", "eval.tokens=64", "checkpoint.every=50"]
HEAD = """| fault | what happened | steps lost | seconds to the next step | final weights |
|---|---|---|---|---|
"""


@pytest.fixture(scope="session")
def note(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`note(fault, happened, lost, seconds, end)` writes a row of the table of `make faults` at
    once, to the file that --faults-table names."""
    file, rows = request.config.getoption("faults_table"), 0

    def write(fault: str, happened: str, lost: int, seconds: float | None, end: str) -> None:
        nonlocal rows
        rows += 1
        took = "-" if seconds is None else f"{seconds:.0f}"
        if file:
            with Path(file).open("a") as f:
                f.write(HEAD if rows == 1 else "")
                f.write(f"| {fault} | {happened} | {lost} | {took} | {end} |\n")

    yield write
    if file and rows:
        with Path(file).open("a") as f:
            f.write(f"\n{rows} faults, seed {SEED}\n")


@pytest.fixture(scope="session")
def arguments(prepared: Path, corpus: Path) -> list[str]:
    return [*tiny_arguments(prepared, corpus), *KEYS, "num_workers=1", *LONGER]


@pytest.fixture(scope="session")
def weights(arguments: list[str], prepared: Path) -> bytes:
    """The final weights of the run without a fault."""
    with job("driver-whole", *arguments) as whole:
        assert whole.end() == 0, "\n".join(whole.lines)
    return final(prepared, "driver-whole")
