"""A sweep from its start to its ranking, as the process that a person starts sees it."""

import dataclasses
import signal
import time

from manta import layout, ownership, storage
from manta.cluster import capacity, connection, nodes
from manta.data import mixture
from manta.errors import ConfigError
from manta.job import say
from manta.lock import lock
from manta.sweep import speed
from manta.sweep.journal import Journal
from manta.sweep.plan import Plan
from manta.sweep.rehearsal import Cost, cost, foreseen
from manta.sweep.results import Ranking, conclude, passed_over
from manta.sweep.running import Running
from manta.sweep.settings import SweepConfig
from manta.sweep.work import Work
from manta.train.checkpoints import checkpoint
from manta.train.faults.stopping import ask_for_time
from manta.train.records.logbook import duration
from manta.train.resume import check_enough_data


@dataclasses.dataclass(frozen=True)
class Swept:
    """How a sweep ended. `ranking`: None if a signal stopped it before its end; it goes on when it
    is started again."""

    ranking: Ranking | None
    stopped_by: signal.Signals | None = None
    page: str | None = None
    """The path of the sweep's page."""

    @property
    def exit_code(self) -> int:
        """128 + the signal that stopped the sweep, as shells report it, else 0."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


def sweep(c: SweepConfig) -> Swept:
    """Runs every trial, ranks them by their val loss and writes the best one's config.

    A sweep of this name that was begun before goes on where it was: its journal has what was
    decided. Trials that an earlier sweep has finished are not run again.

    Raises:
        MantaError: the sweep cannot work, or no trial of it ended well.
    """
    alerts, c = c.alerts, dataclasses.replace(c, alerts=c.alerts.without_webhook())
    c = dataclasses.replace(c, home=c.home_folder, engine=c.engine.inlined())
    folder = layout.run_folder(c.home_folder, c.name)
    connection.connect(name=c.name)
    runs = layout.runs_folder(c.home_folder)
    nodes.require_writable(runs)
    if not c.wait_seconds:  # (nodes that cost money are waited for when all else is right)
        _require_room(c)
    ownership.refuse_links(folder, layout.SWEEP_NAMES)
    examples = c.examples()
    for trial in examples[:1]:
        checkpoint.check_place(c.home_folder, trial.name)
    if c.resume == "never" and storage.exists(storage.join(folder, layout.DECISIONS)):
        raise ConfigError(
            f"resume=never, but the sweep {c.name} exists ({folder}): give another name=, or set "
            "resume=auto to go on with it"
        )
    datasets = mixture.open_datasets(c.data, c.home_folder, say, c.wait_seconds)
    for trial in examples:
        check_enough_data(c.config_of(trial), datasets)
    _require_room(c)
    nodes.require(runs, mixture.files(datasets), bool(c.gpus_per_worker), say)
    if time_to_stop := ask_for_time(c.checkpoint.every):
        say(time_to_stop)
    with lock(storage.join(folder, layout.RUN_LOCK), f"sweep {c.name}"):
        ownership.remove_scratch(folder, layout.RAY_RECORDS)
        fits = capacity.workers_that_fit(c.cpus_per_worker, c.gpus_per_worker) // c.most_workers
        at_once = min(max(1, fits), c.sweep.max_concurrent or fits or 1)
        plan = Plan(c, Journal(storage.join(folder, layout.DECISIONS)), at_once)
        for line in passed_over(plan):
            say(line)
        teller = _Costs(plan, at_once)
        teller.begin()
        running = Running(plan, datasets, folder, at_once, say, teller.hear, alerts)
        stopped_by = running.run()
        if stopped_by is not None:
            say(f"sweep {c.name} stopped; the same command goes on")
            return Swept(None, stopped_by)
        teller.end(running)
        ranking = conclude(plan)
        from manta.sweep import page  # with its pictures: a second that no start has to wait for

        return Swept(ranking, page=page.write(plan, ranking))


def _require_room(c: SweepConfig) -> None:
    cpus, gpus = c.cpus_per_worker, c.gpus_per_worker
    capacity.require(c.most_workers, cpus, gpus, c.wait_seconds, say)


class _Costs:
    """Says what a sweep costs: before, once the first steps are measured, and after."""

    def __init__(self, plan: Plan, lanes: int):
        self._plan, self._lanes = plan, lanes
        self._started, self._is_told = time.monotonic(), False
        self._left = self._foreseen = foreseen(plan.c, plan.lanes)

    def begin(self) -> None:
        c, whole, done = self._plan.c, self._foreseen, self._done()
        line = f"sweep {c.name}: {_trials(whole.trials)}, at most {whole.tokens:,} tokens"
        if done.tokens:
            line += f", of which {done.tokens:,} are trained"
        at_once = min(self._lanes, whole.trials)
        say(f"{line}; {at_once} at a time ({whole.flops:.2g} FLOPs)")
        left = whole.flops - done.flops
        if left > 0 and (known := speed.earlier(c)) is not None:
            rate = known.tokens_per_second * c.flops_per_token(known.trial)
            say(
                f"about {duration(left / rate / at_once)} of steps are left at most, if they are "
                f"as fast as in {known.run}: {known.tokens_per_second:,.0f} tok/s in each lane"
            )

    def hear(self, work: Work) -> None:
        """Says how long the sweep will take, once, when some steps of a trial are measured."""
        if self._is_told or (measured := work.measured()) is None:
            return
        self._is_told = True
        rate = measured * self._plan.flops_per_token(work.segment.trial)
        left = max(0.0, self._foreseen.flops - self._done().flops)
        lanes = min(self._lanes, self._foreseen.trials)
        say(
            f"about {duration(left / rate / lanes)} of steps are left at most, measured in "
            f"{work.segment.trial}: {measured:,.0f} tok/s in each of {lanes} lane(s)"
        )

    def end(self, running: Running) -> None:
        spent, seconds = running.spent, time.monotonic() - self._started
        if not spent.segments:
            say(f"sweep {self._plan.c.name} is finished; nothing was trained")
            return
        share = spent.step_seconds / seconds / min(self._lanes, self._foreseen.trials)
        say(
            f"trained {spent.tokens:,} tokens in {duration(seconds)}; {share:.0%} of the lanes' "
            f"time was steps"
        )

    def _done(self) -> Cost:
        """What is trained already."""
        ready = {(s.trial, s.until) for s in self._plan.ready()}
        whole = cost(self._plan)
        left = [s for s in self._plan.segments if (s.trial, s.until) in ready]
        tokens = sum(s.until - s.start for s in left)
        flops = sum((s.until - s.start) * self._plan.flops_per_token(s.trial) for s in left)
        return dataclasses.replace(whole, tokens=whole.tokens - tokens, flops=whole.flops - flops)


def _trials(count: int) -> str:
    return f"{count} trial{'s' if count != 1 else ''}"
