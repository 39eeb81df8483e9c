"""Evaluates a checkpoint with Ray workers: the suites of evals/ and tasks of lm-eval."""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from manta import layout, storage
from manta.cluster import capacity, connection, nodes
from manta.evaluate import farm, report, suites
from manta.evaluate.adapter import MantaLM
from manta.evaluate.conversation import ChatForm
from manta.evaluate.documents import Documents
from manta.evaluate.farm import Farm
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.suites import Chat, Scores
from manta.monitor.metrics import lasting
from manta.progress import Progress
from manta.train.checkpoints import checkpoint as checkpoints


def evaluate(c: EvaluateConfig) -> dict[str, Scores]:
    """Evaluates the checkpoint (a run's newest), prints tables and writes JSON to the run's folder.
    Returns the scores, by suite or task.

    Raises:
        MantaError: the checkpoint or data are missing, damaged or not available here.
    """
    path = checkpoints.resolve(c.checkpoint, c.home_folder)
    _name_newer(path)
    _form(c, path)
    documents = Documents(c, path)
    suites.check(c.suites, c.tasks, documents.check)  # before workers start
    with workers(c, storage.join(path, layout.MANIFEST)) as pool:
        found = {}
        for unit in units(c):
            found[unit], file = score(c, path, unit, pool, documents)
            print(f"{report.table(found[unit].results)}\nwritten to {file}", flush=True)
    picture = report.draw(layout.split_checkpoint(path)[0])
    if picture is not None:
        print(f"drawn in {picture}")
    return found


def _name_newer(path: str) -> None:
    """Prints a line for each newer checkpoint that is not whole."""
    run = layout.split_checkpoint(path)[0]
    for newer in checkpoints.unfinished(run):
        if newer > path:
            name, taken = (p.rpartition("/")[2] for p in (newer, path))
            print(f"{name} is not whole: evaluating {taken}", flush=True)


def _form(c: EvaluateConfig, path: str) -> ChatForm | None:
    """The chat template of the checkpoint, if tasks are to be put into it. Raises DataError if it
    has none, and ConfigError if it has no place for `system`."""
    return ChatForm(checkpoints.load_tokenizer(path), c.system) if c.chat else None


def units(c: EvaluateConfig) -> Iterator[str]:
    """The suites and tasks to run; each gets a file of scores."""
    yield from c.suites
    for task in c.tasks:
        yield f"task-{task}"


def workers(c: EvaluateConfig, file: str) -> AbstractContextManager[Farm]:
    """Workers on the cluster that this joins or starts. Raises ClusterError if they do not fit, or
    a node does not see `file`, which belongs to what they read."""
    connection.connect(name=f"evaluate {c.checkpoint}")
    capacity.require(c.num_workers, c.cpus, c.gpus, 0)
    nodes.require(None, [file], bool(c.gpus))
    return farm.workers(c.num_workers, c.cpus, c.gpus, c.threads, c.dtype)


def score(
    c: EvaluateConfig,
    path: str,
    unit: str,
    pool: Farm,
    documents: Documents,
    is_quiet: bool = False,
) -> tuple[Scores, str]:
    """The scores of a suite or task for the checkpoint at `path`, and the file that has them.

    Raises:
        MantaError: the checkpoint is damaged or gone, or the data are not available.
    """
    started = time.perf_counter()
    tokenizer = checkpoints.load_tokenizer(path)
    model = checkpoints.load_model_config(path)
    assert model.vocab_size is not None
    form = _form(c, path)
    chat = Chat(c.system, c.fewshot_as_multiturn) if c.chat else None
    lm = MantaLM(pool.load(path), tokenizer, model.context_length, model.vocab_size, c.seed, form)
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
        scores = suites.run_task(lm, current, c.limit, c.num_fewshot, data_dir, chat)
    else:
        scores = suites.run_suite(
            lm, unit, documents, c.limit, data_dir, tokenizer, chat=chat, say=say
        )
    metrics = lasting(layout.split_checkpoint(path)[0].rpartition("/runs/")[2])
    for found in report.figures(scores.results, once=True):
        metrics.publish({"score": found.value}, task=found.task, metric=found.metric)
    return scores, report.write(c, path, unit, scores, time.perf_counter() - started)
