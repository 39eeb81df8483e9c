"""Evaluates each checkpoint of a run as it lands, while training runs or afterwards."""

import contextlib
import time
from collections.abc import Callable, Sequence

from manta import layout, storage
from manta.errors import CheckpointError, DataError, MantaError
from manta.evaluate import report, suites
from manta.evaluate.documents import Documents
from manta.evaluate.evaluate import score, units, workers
from manta.evaluate.farm import Farm
from manta.evaluate.settings import EvaluateConfig
from manta.lock import lock
from manta.train.checkpoints import checkpoint as checkpoints
from manta.train.resume import is_finished
from manta.train.settings import load_run_config


def watch(c: EvaluateConfig, say: Callable[[str], None]) -> None:
    """Evaluates the checkpoints of a run, oldest first, and new ones as they land, until the run
    has ended. It skips a checkpoint that already has its scores, so a watcher that is started again
    continues.

    Raises:
        MantaError: the run does not exist, another watcher follows it, or a setting is wrong.
    """
    run = _run_of(c)
    asked = list(units(c))
    folder = layout.evals_folder(run)
    with lock(storage.join(folder, f".watch-{'-'.join(asked)}"[:200]), f"watching {run}", say):
        suites.check((), c.tasks)
        with workers(c, storage.join(run, layout.RUN_CONFIG)) as pool:
            say(f"watching {run} for checkpoints to evaluate: {', '.join(asked)}")
            _follow(c, run, asked, pool, say)
    say(f"the run has ended, and each of its checkpoints is evaluated\nscores  {folder}")


def _follow(
    c: EvaluateConfig, run: str, asked: Sequence[str], pool: Farm, say: Callable[[str], None]
) -> None:
    given_up: set[str] = set()
    while True:
        # Checked first, so that a checkpoint that lands in this round is seen in the next one.
        has_ended = _has_ended(run)
        paths = [path for path in checkpoints.find(run) if path not in given_up]
        for path in paths:
            left = [unit for unit in asked if not report.is_there(c, path, unit)]
            if left and not _evaluate(c, path, left, pool, say):
                given_up.add(path)
            elif left:
                report.draw(run)
        if has_ended and paths == [p for p in checkpoints.find(run) if p not in given_up]:
            return
        time.sleep(c.watch_seconds)


def _evaluate(
    c: EvaluateConfig, path: str, asked: Sequence[str], pool: Farm, say: Callable[[str], None]
) -> bool:
    """Whether the checkpoint could be evaluated; `checkpoint.keep` may delete it meanwhile.

    Raises:
        MantaError: the checkpoint exists and is whole, but something else is wrong.
    """
    try:
        state = checkpoints.load_state(path)
        documents = Documents(c, path)
        for unit in asked:
            started = time.perf_counter()
            scores, _ = score(c, path, unit, pool, documents, is_quiet=True)
            took = time.perf_counter() - started
            say(f"step {state.step} | {report.in_short(scores.results)} | {took:.0f} s")
        return True
    except (CheckpointError, DataError, OSError) as e:
        try:
            checkpoints.verify(path)
        except CheckpointError:
            why = "is damaged" if storage.exists(path) else "was deleted"
            say(f"{path} {why} before it was evaluated: passed over ({e})")
            return False
        raise


def _run_of(c: EvaluateConfig) -> str:
    """The folder of the run to watch, which need not have a checkpoint yet."""
    home = c.home_folder
    for folder in checkpoints.candidates(c.checkpoint, home):
        if storage.exists(storage.join(folder, layout.MANIFEST)):
            raise CheckpointError(
                f"checkpoint={c.checkpoint} is one checkpoint: watch=true needs a run"
            )
        if storage.exists(storage.join(folder, layout.RUN_CONFIG)):
            return folder
    raise checkpoints.not_found(f"checkpoint={c.checkpoint}", home)


def _has_ended(run: str) -> bool:
    paths = checkpoints.find(run)
    if not paths:
        return False
    # Another version of Manta may have written the config, or the run is being deleted: then it is
    # not known to have ended.
    with contextlib.suppress(MantaError):
        config = load_run_config(run)
        return config is not None and is_finished(config, paths[-1])
    return False
