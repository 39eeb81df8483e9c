"""A sweep from its start to its ranking, as the process that a person starts sees it."""

import dataclasses
import signal

from manta import layout, storage
from manta.data.manifest import Manifest
from manta.errors import ConfigError
from manta.job import say
from manta.sweep import opening
from manta.sweep.costs import Bill, Costs
from manta.sweep.journal import Journal
from manta.sweep.naming import many
from manta.sweep.plan import Plan
from manta.sweep.rehearsal import foreseen
from manta.sweep.results import Ranking, conclude, passed_over
from manta.sweep.running import Running
from manta.sweep.settings import SweepConfig
from manta.terminal import named
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
    alerts, c = c.alerts, opening.here(dataclasses.replace(c, alerts=c.alerts.without_webhook()))
    journal = storage.join(layout.run_folder(c.home_folder, c.name), layout.DECISIONS)
    if c.resume == "never" and storage.exists(journal):
        raise ConfigError(
            f"resume=never, but the sweep {c.name} exists ({journal}): give another name=, or set "
            "resume=auto to go on with it"
        )
    examples, what = c.examples(), f"sweep {c.name}"
    first = examples[0].name if examples else None

    def check(datasets: tuple[Manifest, ...]) -> None:
        for trial in examples:
            check_enough_data(c.config_of(trial), datasets)

    with opening.opened(c, what, first, check, c.sweep.max_concurrent) as opened:
        plan = Plan(c, Journal(journal), opened.lanes)
        for line in passed_over(plan):
            say(line)
        costs = Costs(_bill(plan, opened.lanes), say)
        costs.begin(*_known(c))
        running = Running(
            plan, opened.datasets, opened.folder, opened.lanes, say, costs.hear, alerts
        )
        stopped_by = running.run()
        if stopped_by is not None:
            say(f"{what} stopped; the same command goes on")
            return Swept(None, stopped_by)
        costs.end(running.spent)
        ranking = conclude(plan)
        from manta.sweep import page  # with its pictures: a second that no start has to wait for

        return Swept(ranking, page=page.write(plan, ranking))


def _bill(plan: Plan, lanes: int) -> Bill:
    c, whole = plan.c, foreseen(plan.c, plan.lanes)
    batches = {c.config_of(trial).tokens_per_batch for trial in c.examples()}
    return Bill(
        what=f"sweep {c.name}",
        runs=f"{many(whole.trials, 'trial')}, at most {whole.tokens:,} tokens",
        flops=whole.flops,
        lanes=min(lanes, whole.trials),
        flops_per_token=plan.flops_per_token,
        trained=lambda: _trained(plan),
        left="left at most",
        doubt="batches of other sizes have another speed" if len(batches) > 1 else "",
    )


def _known(c: SweepConfig) -> tuple[float | None, str]:
    """The speed of the trials by earlier runs, and what tells it."""
    found = c.pace
    if found is None:
        return None, ""
    return found.flops_per_second, f"if they are as fast as in {named(found.runs, most=3)}"


def _trained(plan: Plan) -> tuple[int, float]:
    """Tokens and FLOPs of the segments that are trained."""
    ready = {(s.trial, s.until) for s in plan.ready()}
    done = [s for s in plan.segments if (s.trial, s.until) not in ready]
    flops = sum((s.until - s.start) * plan.flops_per_token(s.trial) for s in done)
    return sum(s.until - s.start for s in done), flops
