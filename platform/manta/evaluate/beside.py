"""Evaluates a run while it trains: jobs/evaluate.py watch=true, in a process of its own."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from manta import config as configs
from manta.cluster import connection
from manta.evaluate.settings import EvaluateConfig
from manta.train.settings import PretrainConfig

JOB = Path(__file__).resolve().parents[3] / "jobs" / "evaluate.py"


@contextlib.contextmanager
def beside(training: PretrainConfig) -> Iterator[Callable[[], None]]:
    """A context in which jobs/evaluate.py follows the run in a process of its own, if `eval.suites`
    names suites. Yields a function that waits until this process is done with an ended run."""
    if not training.eval.suites:
        yield lambda: None
        return
    arguments = _arguments(training)
    command = [sys.executable, str(JOB), *arguments]
    process = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": connection.address()})

    def wait() -> None:
        if process.poll() is None:
            print("waiting for the evaluation of the last checkpoints", flush=True)
            process.wait()

    try:
        yield wait
    finally:
        process.terminate()
        process.wait()


def check(training: PretrainConfig) -> None:
    """Raises ConfigError if jobs/evaluate.py would reject eval.suites or eval.arguments."""
    if training.eval.suites:
        configs.load(EvaluateConfig, _arguments(training))


def _arguments(training: PretrainConfig) -> list[str]:
    c = training.eval
    run = [f"checkpoint={training.name}", f"home={training.home_folder}", "watch=true"]
    return [f"suite=[{','.join(c.suites)}]", *run, *c.arguments]
