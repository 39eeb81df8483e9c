"""How far each trial of a sweep trains: to its end, to the rungs of ASHA, in the parts of PBT.

A scheduler is pure: what it chooses follows from the results that it was told, in their order.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from manta.sweep.settings import SweepConfig, Trial
from manta.sweep.space import Dimension, Settings, label

KEPT, REPLACED = 0.25, 0.25  # of a population: the shares that pbt copies from, and copies over
RESAMPLE = 0.25  # the chance that pbt draws a value of a changed setting from its whole range
FACTORS = (0.8, 1.25)  # else it multiplies a number by one of these


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a trial: to train a run from a number of tokens to another one, then to pause."""

    trial: str
    """The name of the run."""
    start: int
    """Tokens that the run has at its start, rounded up to whole batches of the trial; 0: a new
    run."""
    until: int
    """Tokens to train to, rounded up to whole batches of the trial; the run's val loss is measured
    there, and a checkpoint saved. total_tokens: the run's end."""
    settings: Mapping[str, Any]
    """Values of the keys that the sweep varies, from here on."""
    seed: int
    source: str | None = None
    """The run from whose checkpoint at `start` tokens this run, a new one, begins (pbt). The next
    segment of the source comes later in a plan, so its newest checkpoint is still that one."""


class Group:
    """Settings, the trials that have them (one for each seed), and their losses."""

    def __init__(self, trials: list[Trial]):
        self.trials = trials
        self.losses: dict[int, dict[str, float]] = {}
        """By tokens and trial; infinite: failed or diverged."""

    @property
    def name(self) -> str:
        return self.trials[0].group

    def loss(self, tokens: int) -> float:
        """The mean over the seeds at a number of tokens; infinite if one of them failed."""
        return math.fsum(self.losses[tokens].values()) / len(self.losses[tokens])

    def has(self, tokens: int) -> bool:
        """Whether all seeds have reached a number of tokens, or failed on the way."""
        return len(self.losses.get(tokens, ())) == len(self.trials)

    def segments(self, start: int, until: int) -> list[Segment]:
        return [Segment(t.name, start, until, t.settings, t.seed) for t in self.trials]


Fresh = Callable[[], Group | None]
"""Gives the next group that has not started yet; None: there is none now."""


class Scheduler:
    """Trains every trial to its end; other schedulers derive from it."""

    def __init__(self, c: SweepConfig):
        self.c, self.total = c, c.total_tokens
        self.groups: dict[str, Group] = {}

    def choose(self, fresh: Fresh, is_idle: bool) -> list[Segment]:
        """What to train next, if a lane is free: a segment, or several if no result could change
        which ones they are. Empty: nothing, until there is another result. `is_idle`: no lane
        works, so that no result will come."""
        del is_idle  # for other schedulers
        return self._started(fresh, self.total)

    def told(self, trial: Trial, tokens: int, loss: float) -> None:
        """Takes a result, the val loss at a number of tokens; infinite: failed or diverged. Those
        of repeats that contenders alone get do not count."""
        if self._counts(trial):
            self.groups[trial.group].losses.setdefault(tokens, {})[trial.name] = loss

    def forget(self, trial: Trial, tokens: int) -> None:
        """Takes a result back: the trial is tried again from where it was."""
        if self._counts(trial):
            losses = self.groups[trial.group].losses
            del losses[tokens][trial.name]
            if not losses[tokens]:
                del losses[tokens]

    def _counts(self, trial: Trial) -> bool:
        group = self.groups.get(trial.group)
        return group is not None and trial.name in {t.name for t in group.trials}

    def _started(self, fresh: Fresh, until: int) -> list[Segment]:
        """The first segments of what has not started: of all of them, or, if the results so far
        decide what is tried next, of the next ones."""
        found: list[Segment] = []
        while (group := fresh()) is not None:
            self.groups[group.name] = group
            found += group.segments(0, until)
            if self.c.sweep.search == "optuna":
                break
        return found


class Halving(Scheduler):
    """ASHA (Li et al. 2020), for a known number of trials.

    A free lane first starts what has not started, then promotes at the lowest rung that has a trial
    to promote. So on one device no trial is promoted before its rung is complete, and on more of
    them a lane promotes the best so far rather than wait. What is not promoted is paused.
    """

    def __init__(self, c: SweepConfig):
        super().__init__(c)
        self.rungs = rungs(c)
        self.promoted: list[set[str]] = [set() for _ in self.rungs]

    def choose(self, fresh: Fresh, is_idle: bool) -> list[Segment]:
        if started := self._started(fresh, self.rungs[0]):
            return started
        is_complete = True
        for level in range(len(self.rungs) - 1):
            here = self._ranked(level)
            is_complete = is_complete and len(here) == self._sent(level)
            found: list[Segment] = []
            for group in here[: len(here) // self.c.sweep.reduction_factor]:
                found += self._promote(group, level)
                if found and not is_complete:  # the next ones may be others then
                    break
            if found:
                return found
        return self._promote_one() if is_idle else []

    def _sent(self, level: int) -> int:
        """How many groups have been given to lanes to reach a rung."""
        return len(self.promoted[level - 1]) if level else len(self.groups)

    def _promote_one(self) -> list[Segment]:
        """The best of the highest rung that has any to promote, unless one got to the end: so one
        does, however few there are, and whichever fail on the way."""
        *below, top = range(len(self.rungs))
        if any(math.isfinite(group.loss(self.rungs[top])) for group in self._ranked(top)):
            return []
        for level in reversed(below):
            for group in self._ranked(level):
                if chosen := self._promote(group, level):
                    return chosen
        return []

    def _promote(self, group: Group, level: int) -> list[Segment]:
        here, above = self.rungs[level : level + 2]
        is_further = group.name in self.promoted[level] or max(group.losses, default=0) >= above
        if is_further or not math.isfinite(group.loss(here)):
            return []
        self.promoted[level].add(group.name)
        return group.segments(here, above)

    def _ranked(self, level: int) -> list[Group]:
        tokens = self.rungs[level]
        found = [g for g in self.groups.values() if g.has(tokens)]
        return sorted(found, key=lambda g: g.loss(tokens))  # of equal ones, the older one is first


class Population(Scheduler):
    """PBT (Jaderberg et al. 2017), in step: after each part of the run, the worst quarter of the
    population goes on from the weights of the best quarter, with changed settings."""

    def __init__(self, c: SweepConfig):
        super().__init__(c)
        self.bounds = parts(c)
        self.slots: list[Trial] = []  # the trial that each place of the population has now
        self.part = 0

    def choose(self, fresh: Fresh, is_idle: bool) -> list[Segment]:
        if not self.slots:
            started = self._started(fresh, self.bounds[0])
            self.slots = [t for group in self.groups.values() for t in group.trials]
            return started
        if not is_idle or self.part == len(self.bounds) - 1:
            return []
        self.part += 1
        return self._exchanged()

    def _segment(self, trial: Trial, part: int, source: str | None = None) -> Segment:
        start = self.bounds[part - 1] if part else 0
        return Segment(trial.name, start, self.bounds[part], trial.settings, trial.seed, source)

    def _exchanged(self) -> list[Segment]:
        """The next part of every place, those of the worst with the weights of the best."""
        tokens = self.bounds[self.part - 1]
        losses = [self._loss(trial, tokens) for trial in self.slots]
        order = sorted(range(len(self.slots)), key=lambda slot: losses[slot])
        alive = [slot for slot in order if math.isfinite(losses[slot])]
        if not alive:
            return []
        best = alive[: max(1, int(KEPT * len(order)))]
        # With fewer than four places, the worst one is replaced, unless it is the best as well.
        worst = [slot for slot in order[-max(1, int(REPLACED * len(order))) :] if slot != best[0]]
        worst += [slot for slot in order if slot not in alive and slot not in worst]
        found = []
        for slot, trial in enumerate(self.slots):
            source = None
            if slot in worst:
                seeds = np.random.SeedSequence([self.c.sweep.seed, self.part, slot])
                random = np.random.default_rng(seeds)
                parent = self.slots[best[int(random.integers(len(best)))]]
                trial, source = self._child(parent, slot, random), parent.name
            found.append((trial, source))
        self.slots = [trial for trial, _ in found]
        segments = [self._segment(trial, self.part, source) for trial, source in found]
        return sorted(segments, key=lambda segment: segment.source is None)

    def _child(self, parent: Trial, slot: int, random: np.random.Generator) -> Trial:
        dimensions = self.c.dimensions
        settings = {d.key: changed(d, parent.settings[d.key], random) for d in dimensions}
        if self.c.why_impossible(dataclasses.replace(parent, settings=settings)):
            settings = dict(parent.settings)
        name = f"{self.c.name}/part{self.part}-{slot}-{label(settings)}"
        child = Trial(name, settings, parent.seed, name)
        self.groups[name] = Group([child])
        return child

    def _loss(self, trial: Trial, tokens: int) -> float:
        return self.groups[trial.group].loss(tokens)


class Replay(Scheduler):
    """One run, whose settings change along its way as `sweep.replay` says."""

    def __init__(self, c: SweepConfig):
        super().__init__(c)
        self._part = 0

    def choose(self, fresh: Fresh, is_idle: bool) -> list[Segment]:
        if not self.groups:
            self._started(fresh, self.total)
        starts = sorted(self.c.replayed)
        if not is_idle or self._part == len(starts) or not self._is_alive():
            return []
        start = starts[self._part]
        self._part += 1
        until = starts[self._part] if self._part < len(starts) else self.total
        (trial,) = (trial for group in self.groups.values() for trial in group.trials)
        return [Segment(trial.name, start, until, self.c.replayed[start], trial.seed)]

    def _is_alive(self) -> bool:
        losses = [v for group in self.groups.values() for v in group.losses.values()]
        return all(math.isfinite(loss) for found in losses for loss in found.values())


def scheduler(c: SweepConfig) -> Scheduler:
    """The scheduler of a sweep."""
    if c.sweep.replay:
        return Replay(c)
    return {"none": Scheduler, "asha": Halving, "pbt": Population}[c.sweep.scheduler](c)


def rungs(c: SweepConfig) -> list[int]:
    """The tokens of each rung of asha, the whole run last."""
    factor, count = c.sweep.reduction_factor, c.sweep.rungs
    return [c.total_tokens // factor ** (count - 1 - level) for level in range(count)]


def parts(c: SweepConfig) -> list[int]:
    """The tokens at the end of each part of pbt."""
    count = c.sweep.exchanges
    return [c.total_tokens * (part + 1) // count for part in range(count)]


def changed(d: Dimension, value: Any, random: np.random.Generator) -> Any:
    """A setting after pbt changed it: near its value, or, now and then, drawn again."""
    share, again = float(random.random()), random.random() < RESAMPLE
    if again:
        return d.at(share)
    if d.is_range:
        return d.nearest(value * FACTORS[int(share * 2)])
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in d.values):
        ordered = sorted(d.values)
        place = ordered.index(value) + (-1 if share < 0.5 else 1)
        return ordered[min(max(place, 0), len(ordered) - 1)]
    return value


def replay_of(segments: list[Segment], last: str) -> dict[int, Settings]:
    """The settings along the way to the end of the run `last`, by the tokens from which they are
    used: those of the runs that it was copied from first."""
    found: dict[int, Settings] = {}
    name: str | None = last
    until = math.inf
    while name is not None:
        own = [s for s in segments if s.trial == name]
        for segment in own:
            if segment.start < until:
                found[segment.start] = dict(segment.settings)
        until, name = own[0].start, own[0].source
    kept: dict[int, Settings] = {}
    for start in sorted(found):
        if not kept or found[start] != list(kept.values())[-1]:
            kept[start] = found[start]
    return kept
