"""The plan of a ladder: what to train next, for the lanes of a sweep. It has no state of its own.

What is trained is in the checkpoints of the runs: a run that has reached its end is not trained
again, and one that was killed goes on from its newest checkpoint.
"""

from collections.abc import Callable, Iterable, Sequence

from manta import config as configs
from manta import layout, storage
from manta.data.order import batches_for
from manta.errors import ConfigError
from manta.scaling.ladder import Rung, Stem
from manta.sweep.plan import Result, Segment
from manta.sweep.settings import FREE
from manta.sweep.space import flat, shown
from manta.terminal import named
from manta.train.checkpoints import checkpoint
from manta.train.resume import is_finished
from manta.train.settings import PretrainConfig, load_run_config
from manta.train.step.schedule import warmup_steps

# What an extension of the ladder changes in a stable run.
OF_LENGTH = ("total_tokens", "schedule.warmup")


class Climb:
    """The parts of a ladder's runs that wait for a lane, as `sweep.running.Running` asks for them.

    A stable run is trained from one budget's start to the next. A budget's run is ready as soon as
    the stable run is there, and comes before the stable run's next part, so that it copies the
    newest checkpoint.
    """

    def __init__(self, stems: Sequence[Stem], tell: Callable[[Result], None] = lambda _: None):
        """Takes stems of which something is left to train. `tell` is called with each result."""
        self.stems = tuple(stems)
        self.failed: dict[str, str] = {}
        """The runs that failed, or whose stable run did, each with the reason."""
        self.segments: list[Segment] = []
        self._tell = tell
        self._told: set[tuple[str, int]] = set()
        self._runs = {
            run.name: run
            for stem in stems
            for run in (stem.stable, *(rung.run for rung in stem.rungs))
        }

    def ready(self) -> list[Segment]:
        return [s for stem in self.stems for s in self._ready(stem) if s.trial not in self.failed]

    def _ready(self, stem: Stem) -> Iterable[Segment]:
        start = 0
        for rung in stem.rungs:
            part = _segment(stem.stable, start, rung.start)
            if (part.trial, part.until) not in self._told:
                yield part
                return
            decay = _segment(rung.run, rung.start, rung.tokens, stem.stable.name)
            if (decay.trial, decay.until) not in self._told:
                yield decay
            start = rung.start

    @property
    def is_over(self) -> bool:
        return not self.ready()

    def tell(self, result: Result) -> None:
        """Takes the result of a part that was ready."""
        self._told.add((result.trial, result.tokens))
        if result.loss is None:
            why = result.why or "its loss is not a finite number"
            self.failed[result.trial] = why
            for stem in self.stems:
                if stem.stable.name == result.trial:
                    later = [r for r in stem.rungs if r.start >= result.tokens]
                    self.failed |= {rung.run.name: why for rung in later}
        self._tell(result)

    def states(self) -> dict[str, str]:
        """What has become of every run: failed, complete, or waiting."""
        waiting = {segment.trial for segment in self.ready()}
        trained = {trial for trial, _ in self._told} - waiting
        found = dict.fromkeys(self._runs, "waiting")
        return found | dict.fromkeys(trained, "complete") | dict.fromkeys(self.failed, "failed")

    def config_of(self, segment: Segment) -> PretrainConfig:
        return self._runs[segment.trial]


def _segment(run: PretrainConfig, start: int, until: int, source: str | None = None) -> Segment:
    return Segment(run.name, start, until, {}, run.seed, source)


def left(stems: Iterable[Stem]) -> list[Stem]:
    """The stems with budgets that no run has reached, with these budgets only.

    Raises:
        ConfigError: a run of this name is there that is of another ladder, or a stable run has
            passed the place at which a budget would leave it.
    """
    found = []
    for stem in stems:
        rungs = tuple(rung for rung in stem.rungs if not is_trained(rung))
        for run in (stem.stable, *(rung.run for rung in stem.rungs)):
            _require_same(run, run is stem.stable)
        for rung in rungs:
            _require_place(stem, rung)
        if rungs:
            found.append(Stem(stem.stable, rungs, stem.parameters, stem.flops_per_token))
    return found


def is_trained(rung: Rung) -> bool:
    """Whether a run has reached its end."""
    found = checkpoint.find(rung.run.run_folder)
    return bool(found) and is_finished(rung.run, found[-1])


def trained_tokens(stems: Iterable[Stem]) -> dict[str, int]:
    """The tokens that each run of these has been trained on, its own only, by name."""
    found = {}
    for stem in stems:
        starts = {stem.stable.name: 0} | {rung.run.name: rung.start for rung in stem.rungs}
        for run in (stem.stable, *(rung.run for rung in stem.rungs)):
            there = checkpoint.find(run.run_folder)
            step = layout.step_of(there[-1]) if there else 0
            found[run.name] = max(0, run.tokens_before(step) - starts[run.name])
    return found


def _require_same(run: PretrainConfig, is_stable: bool) -> None:
    file = storage.join(run.run_folder, layout.RUN_CONFIG)
    had = load_run_config(run.run_folder)
    if had is None:
        return
    old, new = (dict(flat(configs.to_dict(c))) for c in (had, run))
    free = (*FREE, *OF_LENGTH) if is_stable else FREE
    other = [
        f"{key} was {shown(old.get(key))}, and now is {shown(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
        and not any(key == group or key.startswith(f"{group}.") for group in free)
    ]
    if is_stable and _warm(had) != _warm(run):
        other.append(f"its warm-up was {_warm(had):,} steps, and now is {_warm(run):,}")
    if other:
        raise ConfigError(
            f"{file} is of another ladder: {named(other, between='; ')}. More sizes, rates and "
            "larger budgets can be added to a ladder; for anything else, give another name="
        )


def _warm(run: PretrainConfig) -> int:
    return warmup_steps(run.total_steps, run.schedule)


def _require_place(stem: Stem, rung: Rung) -> None:
    """Raises ConfigError if the stable run is beyond a budget's start and has no checkpoint there,
    and the budget's run has not begun."""
    if checkpoint.find(rung.run.run_folder):
        return
    there = [layout.step_of(path) for path in checkpoint.find(stem.stable.run_folder)]
    start = batches_for(stem.stable.stages, rung.start, stem.stable.sequence_length)
    if there and there[-1] > start and start not in there:
        raise ConfigError(
            f"ladder.tokens: the run of {rung.run.total_tokens:,} tokens would leave the stable "
            f"run at step {start:,}, but {stem.stable.name} is at step {there[-1]:,} and has no "
            "checkpoint there; add larger budgets only, or give another name="
        )
