"""The settings that a sweep tries next: a grid's, random ones, or those that Optuna suggests."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from manta.sweep import space as spaces
from manta.sweep.search_settings import MOST_TRIALS
from manta.sweep.settings import MOST_DRAWS, SweepConfig, Trial
from manta.sweep.space import Settings


@dataclasses.dataclass(frozen=True)
class Tried:
    """Settings that were tried, as far as is known."""

    settings: Settings
    losses: dict[int, float]
    """Val loss by tokens; infinite: failed or diverged. Empty: none is known yet."""
    is_complete: bool
    """Whether they were trained to the end."""


class Search:
    """Gives the settings of a sweep one after the other. The same calls give the same settings."""

    def __init__(self, c: SweepConfig):
        if c.sweep.search == "optuna":
            # An extra, and its import takes a second: only where it is used.
            from manta.sweep import optuna_search

            optuna_search.require()
        self.passed_over: dict[str, str] = {}
        """Names of trials that are impossible, each with the reason."""
        self._known: dict[str, Settings] = {}
        self._drawn = 0
        self.extend(c)

    def extend(self, c: SweepConfig) -> None:
        """Goes on with another config, whose space has more values, or which has more trials."""
        self.c = c
        self._is_exhausted = False
        if c.sweep.search == "grid":
            self.passed_over |= c.grid[1]
            self._left = [t for t in reversed(c.grid[0]) if t.name not in self._known]

    def next(self, tried: list[Tried]) -> Trial | None:
        """The first trial of the next settings; None: there are no more. `tried` is what is known
        so far, in the order of starts."""
        if self.c.sweep.search == "grid":
            trial = self._left.pop() if self._left else None
        else:
            trial = self._next_drawn(tried)
        if trial is not None:
            self._known[trial.name] = trial.settings
        return trial

    def _next_drawn(self, tried: list[Tried]) -> Trial | None:
        if self._is_exhausted or len(self._known) >= (self.c.sweep.trials or 0):
            return None
        tried = list(tried)
        for _ in range(MOST_DRAWS):
            if trial := self._new(self._draw(tried)):
                return trial
            failed = Tried(self._last, {self.c.total_tokens: math.inf}, is_complete=True)
            tried.append(failed)  # so that it is not suggested again
        for settings in self._left_over():
            if trial := self._new(settings):
                return trial
        self._is_exhausted = True
        return None

    def _new(self, settings: Settings) -> Trial | None:
        """The trial of these settings; None if it is known, or impossible."""
        self._last, trial = settings, self.c.trial(settings)
        if trial.name in self._known or trial.name in self.passed_over:
            return None
        if why := self.c.why_impossible(trial):
            self.passed_over[trial.name] = why
            return None
        return trial

    def _left_over(self) -> Iterator[Settings]:
        """All settings of a small space, in a random order."""
        space = self.c.dimensions
        if spaces.size(space) <= MOST_TRIALS:
            every = list(spaces.grid(space))
            random = np.random.default_rng([self.c.sweep.seed, self._drawn])
            yield from (every[place] for place in random.permutation(len(every)))

    def _draw(self, tried: list[Tried]) -> Settings:
        c, index = self.c, self._drawn
        self._drawn += 1
        if c.sweep.search == "random":
            return spaces.drawn(c.dimensions, c.sweep.seed, index)
        from manta.sweep import optuna_search

        return optuna_search.suggest(c.dimensions, tried, c.sweep.seed, index)
