"""An evaluation: suites and tasks of lm-eval's on a checkpoint, or on each of a run's, by Ray
workers."""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from manta import cluster, layout
from manta.evaluate import farm, report, suites
from manta.evaluate.adapter import MantaLM
from manta.evaluate.documents import Documents
from manta.evaluate.farm import Farm
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.suites import Scores
from manta.progress import Progress
from manta.train.checkpoints import checkpoint as checkpoints


def evaluate(c: EvaluateConfig) -> dict[str, Scores]:
    """Runs what is asked for on the newest checkpoint; prints tables, writes JSON beside the run.
    The scores, by suite or task.

    Raises:
        MantaError: checkpoint or data are missing, damaged, or cannot be had here.
    """
    path = checkpoints.resolve(c.checkpoint, c.home_folder)
    _name_newer(path)
    documents = Documents(c, path)
    suites.check(c.suites, c.tasks, documents.check)  # before workers start
    with workers(c) as pool:
        found = {}
        for unit in units(c):
            found[unit], file = score(c, path, unit, pool, documents)
            print(f"{report.table(found[unit].results)}\nwritten to {file}", flush=True)
    picture = report.draw(layout.split_checkpoint(path)[0])
    if picture is not None:
        print(f"drawn in {picture}")
    return found


def _name_newer(path: str) -> None:
    """Says it where there is a newer checkpoint, which is not whole."""
    run = layout.split_checkpoint(path)[0]
    for newer in checkpoints.unfinished(run):
        if newer > path:
            name, taken = (p.rpartition("/")[2] for p in (newer, path))
            print(f"{name} is not whole: evaluating {taken}", flush=True)


def units(c: EvaluateConfig) -> Iterator[str]:
    """What is asked for: each has a file of scores."""
    yield from c.suites
    for task in c.tasks:
        yield f"task-{task}"


def workers(c: EvaluateConfig) -> AbstractContextManager[Farm]:
    """Of a cluster that is joined, or started. Raises ClusterError when they do not fit."""
    cluster.connect()
    cluster.require(c.num_workers, c.cpus, c.gpus, 0)
    return farm.workers(c.num_workers, c.cpus, c.gpus, c.threads, c.dtype)


def score(
    c: EvaluateConfig,
    path: str,
    unit: str,
    pool: Farm,
    documents: Documents,
    is_quiet: bool = False,
) -> tuple[Scores, str]:
    """A suite's or a task's scores of the checkpoint at `path`, and the file they are written to.

    Raises:
        MantaError: the checkpoint is damaged or gone; the data cannot be had.
    """
    started = time.perf_counter()
    tokenizer = checkpoints.load_tokenizer(path)
    model = checkpoints.load_model_config(path)
    assert model.vocab_size is not None
    lm = MantaLM(pool.load(path), tokenizer, model.context_length, model.vocab_size)
    current, terminal = unit.removeprefix("task-"), sys.stderr

    def say(task: str) -> None:
        nonlocal current
        current = task

    if not is_quiet:
        lm.begin = lambda count: (
            Progress(f"evaluating {current}", count, "requests", terminal).advance
        )
    data_dir = c.evals.data_dir
    if unit.startswith("task-"):
        scores = suites.run_task(lm, current, c.limit, c.num_fewshot, data_dir)
    else:
        scores = suites.run_suite(lm, unit, documents, c.limit, data_dir, tokenizer, say=say)
    return scores, report.write(c, path, unit, scores, time.perf_counter() - started)
