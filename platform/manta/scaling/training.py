"""Trains a ladder in the lanes of a sweep, and says what it costs, before and after."""

import math
import signal

from manta.data.manifest import Manifest
from manta.errors import DataError, TrainingError
from manta.job import say
from manta.scaling.climbing import Climb, is_trained, left, trained_tokens
from manta.scaling.ladder import Cost, Rung, Stem, cost
from manta.scaling.settings import ScalingConfig
from manta.sweep import opening
from manta.sweep.costs import Bill, Costs
from manta.sweep.running import Running
from manta.terminal import named
from manta.train import earlier
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
    c = opening.here(c)
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
    what, first = f"ladder {c.name}", todo[0].stable.name

    def check(datasets: tuple[Manifest, ...]) -> None:
        require_data(c, whole, datasets)

    with opening.opened(c, what, first, check, c.ladder.max_concurrent) as opened:
        climb, costs = Climb(todo), Costs(_bill(c, whole, opened.lanes), say)
        costs.begin(*_known(c, whole, opened.lanes))
        running = Running(
            climb, opened.datasets, opened.folder, opened.lanes, say, costs.hear, c.alerts
        )
        stopped_by = running.run()
        if stopped_by is not None:
            say(f"{what} stopped; the same command goes on")
        else:
            costs.end(running.spent)
    return stopped_by, climb.failed


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


def _bill(c: ScalingConfig, whole: Cost, lanes: int) -> Bill:
    flops = {
        run.name: stem.flops_per_token
        for stem in whole.stems
        for run in (stem.stable, *(rung.run for rung in stem.rungs))
    }

    def trained() -> tuple[int, float]:
        done = trained_tokens(whole.stems)
        return sum(done.values()), sum(tokens * flops[name] for name, tokens in done.items())

    return Bill(
        what=f"ladder {c.name}",
        runs=f"{whole.runs} runs of {len(whole.stems)} stable ones, {whole.tokens:,} tokens",
        flops=whole.flops,
        lanes=lanes,
        flops_per_token=flops.__getitem__,
        trained=trained,
        doubt="larger models reach more FLOPs per second",
    )


def _known(c: ScalingConfig, whole: Cost, lanes: int) -> tuple[float | None, str]:
    """The FLOPs per second of each lane as they are known before any step, and what tells them."""
    if c.budget.speed is not None:
        return c.budget.speed / lanes, "at the speed that budget gives"
    found = earlier.pace(c.home_folder, [rung.run for rung in _rungs(whole)])
    if found is None:
        return None, ""
    return found.flops_per_second, f"if they are as fast as in {named(found.runs, most=3)}"
