"""Trains a ladder in the lanes of a sweep, and says what it costs, before and after."""

import dataclasses
import math
import signal
import time

from manta import layout, ownership, storage
from manta.cluster import capacity, connection, nodes
from manta.data import mixture
from manta.data.manifest import Manifest
from manta.errors import DataError, TrainingError
from manta.job import say
from manta.lock import lock
from manta.scaling.climbing import Climb, is_trained, left, trained_tokens
from manta.scaling.ladder import Cost, Rung, Stem, cost
from manta.scaling.settings import ScalingConfig
from manta.sweep.running import Running
from manta.sweep.work import Work
from manta.train.checkpoints import checkpoint
from manta.train.faults.stopping import ask_for_time
from manta.train.records.logbook import duration
from manta.train.resume import check_enough_data


def train(c: ScalingConfig) -> tuple[list[str], signal.Signals | None]:
    """Trains what is left of a study's ladder, if it has one and is to fit a law.

    Returns the names of the runs that have reached their budgets, and the signal that stopped the
    training before its end, if one did; the same config goes on then.

    Raises:
        MantaError: the ladder cannot work, or no run of it ended well.
    """
    if c.check is not None or not c.ladder.sizes:
        return [], None
    # The workers' environment and files may differ from ours.
    c = dataclasses.replace(c, home=c.home_folder, engine=c.engine.inlined())
    whole = cost(c)
    stopped_by: signal.Signals | None = None
    failed: dict[str, str] = {}
    if todo := left(whole.stems):
        stopped_by, failed = _train(c, whole, todo)
    else:
        say(f"ladder {c.name}: all of its {whole.runs} runs are trained")
    for name, why in failed.items():
        say(f"{name} is left out of the law: {why}")
    trained = [rung.run.name for rung in _rungs(whole) if is_trained(rung)]
    if failed and not trained:
        why = next(iter(failed.values()))
        raise TrainingError(f"no run of the ladder {c.name} ended well; {why}")
    return trained, stopped_by


def _rungs(whole: Cost) -> list[Rung]:
    return [rung for stem in whole.stems for rung in stem.rungs]


def _train(
    c: ScalingConfig, whole: Cost, todo: list[Stem]
) -> tuple[signal.Signals | None, dict[str, str]]:
    """Returns the signal that stopped the training, and the runs that failed."""
    folder, runs = layout.run_folder(c.home_folder, c.name), layout.runs_folder(c.home_folder)
    connection.connect(name=c.name)
    nodes.require_writable(runs)
    if not c.wait_seconds:  # (nodes that cost money are waited for when all else is right)
        _require_room(c)
    ownership.refuse_links(folder, layout.SWEEP_NAMES)
    checkpoint.check_place(c.home_folder, todo[0].stable.name)
    datasets = mixture.open_datasets(c.data, c.home_folder, say, c.wait_seconds)
    require_data(c, whole, datasets)
    _require_room(c)
    nodes.require(runs, mixture.files(datasets), bool(c.gpus_per_worker), say)
    if time_to_stop := ask_for_time(c.checkpoint.every):
        say(time_to_stop)
    with lock(storage.join(folder, layout.RUN_LOCK), f"ladder {c.name}"):
        ownership.remove_scratch(folder, layout.RAY_RECORDS)
        fits = capacity.workers_that_fit(c.cpus_per_worker, c.gpus_per_worker) // c.most_workers
        lanes = min(max(1, fits), c.ladder.max_concurrent or fits or 1)
        climb, teller = Climb(todo), _Costs(c, whole, lanes)
        teller.begin()
        running = Running(climb, datasets, folder, lanes, say, teller.hear, c.alerts)
        stopped_by = running.run()
        if stopped_by is not None:
            say(f"ladder {c.name} stopped; the same command goes on")
        teller.end(running)
    return stopped_by, climb.failed


def _require_room(c: ScalingConfig) -> None:
    cpus, gpus = c.cpus_per_worker, c.gpus_per_worker
    capacity.require(c.most_workers, cpus, gpus, c.wait_seconds, say)


def require_data(c: ScalingConfig, whole: Cost, datasets: tuple[Manifest, ...]) -> None:
    """Raises DataError if a run would read the data more often than it may."""
    for stem in whole.stems:
        check_enough_data(stem.stable, datasets)
    there = sum(manifest.tokens("train") for manifest in datasets)
    longest = max(rung.tokens for rung in _rungs(whole))
    longest = max(longest, round(c.predict.tokens or 0))
    if longest > c.ladder.epochs * there:
        raise DataError(
            f"the longest run reads {longest:,} tokens, and the train split has {there:,}: some "
            f"would be read again ({longest / there:.3f} epochs), and count less than new ones; "
            "give more text or smaller budgets, or allow it with "
            f"ladder.epochs={math.ceil(100 * longest / there) / 100:g}"
        )


class _Costs:
    """Says what a ladder costs: before, once the first steps are measured, and after."""

    def __init__(self, c: ScalingConfig, whole: Cost, lanes: int):
        self._c, self._whole, self._lanes = c, whole, lanes
        self._started, self._is_told = time.monotonic(), False
        self._flops = {
            run.name: stem.flops_per_token
            for stem in whole.stems
            for run in (stem.stable, *(rung.run for rung in stem.rungs))
        }

    def begin(self) -> None:
        c, whole, done = self._c, self._whole, trained_tokens(self._whole.stems)
        line = f"ladder {c.name}: {whole.runs} runs of {len(whole.stems)} stable ones, "
        line += f"{whole.tokens:,} tokens"
        if any(done.values()):
            line += f", of which {sum(done.values()):,} are trained"
        say(f"{line}; {self._lanes} at a time ({whole.flops:.2g} FLOPs)")
        if c.budget.speed is not None:
            seconds = self._left() / c.budget.speed
            say(f"about {duration(seconds)} of steps are left, at the speed that budget gives")

    def hear(self, work: Work) -> None:
        """Says how long the ladder will take, once, when some steps of a run are measured."""
        if self._is_told or (speed := work.measured()) is None:
            return
        self._is_told = True
        name = work.segment.trial
        seconds = self._left() / (speed * self._flops[name]) / self._lanes
        say(
            f"about {duration(seconds)} of steps are left, measured in {name}: {speed:,.0f} tok/s "
            f"in each of {self._lanes} lane(s); larger models reach more FLOPs per second"
        )

    def end(self, running: Running) -> None:
        spent, seconds = running.spent, time.monotonic() - self._started
        share = spent.step_seconds / seconds / self._lanes
        say(
            f"trained {spent.tokens:,} tokens in {duration(seconds)}; {share:.0%} of the lanes' "
            "time was steps"
        )

    def _left(self) -> float:
        """FLOPs that are not trained yet."""
        done = trained_tokens(self._whole.stems)
        spent = sum(tokens * self._flops[name] for name, tokens in done.items())
        return max(0.0, self._whole.flops - spent)
