"""Settings with the losses of their seeds, and the best ones compared with the others.

Only losses at equal tokens are compared. A test that knew nothing of the choice would call the best
of many settings better than it is; here each p-value is of the best among all. It assumes that all
settings vary alike over seeds, so the two settings are compared by their own variances as well
(Welch), and the larger p-value counts: where one of six equal settings varied ten times as much as
the others, "beats the second" would be said of 12% of sweeps without that, and is said of 3%.
"""

import dataclasses
import math
from collections.abc import Sequence

from manta import statistics
from manta.statistics import Estimate
from manta.sweep.plan import Plan, Standing
from manta.sweep.space import Settings


@dataclasses.dataclass(frozen=True)
class Group:
    """Settings, and what came of their seeds."""

    name: str
    """The run of the first seed."""
    settings: Settings
    standings: tuple[Standing, ...]
    """One for each seed, the first one first."""

    @property
    def why(self) -> str | None:
        """Why the first of its seeds that failed or diverged did so; None: none did."""
        return next((s.why for s in self.standings if s.why), None)

    @property
    def tokens(self) -> int:
        """The tokens that all of its seeds have reached."""
        return min(s.tokens for s in self.standings)

    def losses(self, tokens: int) -> list[float]:
        """The val losses at a number of tokens of the seeds that got there."""
        return [s.losses[tokens] for s in self.standings if tokens in s.losses]

    def fresh(self, tokens: int) -> list[float]:
        """The same without the first seed, for which the settings may have been chosen."""
        return [s.losses[tokens] for s in self.standings[1:] if tokens in s.losses]

    @property
    def loss(self) -> Estimate:
        """The mean of the newest val loss over the seeds that did not fail; nan: there is none."""
        return statistics.mean(self.losses(self.tokens)) if self.tokens else NOTHING

    @property
    def rank(self) -> tuple[bool, int, int, float]:
        """What settings are ranked by: failed ones last, else the longest trained first, then those
        with the most seeds, as no lucky seed should decide; then their mean loss."""
        loss = self.loss.value if self.tokens else math.inf
        return bool(self.why), -self.tokens, -len(self.standings), loss


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def groups(plan: Plan) -> list[Group]:
    """The settings that have begun, the best first."""
    found: dict[str, list[Standing]] = {}
    for standing in plan.standings():
        found.setdefault(standing.trial.group, []).append(standing)
    made = []
    for name, standings in found.items():
        ordered = sorted(standings, key=lambda s: (s.trial.name != name, s.trial.seed))
        made.append(Group(name, ordered[0].trial.settings, tuple(ordered)))
    return sorted(made, key=lambda group: group.rank)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much better the best settings are than others."""

    value: float
    """Mean loss of the others, less that of the best."""
    error: float
    """Its standard error."""
    p: float
    """The chance of such a difference, or a larger one, if all settings were equal."""
    more: int | None
    """Seeds that each of the two would need on top of what they have for a p below 0.05 with a
    chance of 80%, if the difference is as large as it seems; 0: it shows already; None: no number
    of seeds would show it."""

    @property
    def is_shown(self) -> bool:
        return self.value > 0 and self.p < 1 - statistics.LEVEL


def against_best(losses: Sequence[Sequence[float]], best: int) -> list[Difference | None]:
    """Compares the best settings with each of the others.

    Args:
        losses: the final losses of each settings, a number for each seed, at least two of them
            somewhere.
        best: the place of the best settings.

    Returns:
        A difference for each settings; None at the place of the best.
    """
    means = [statistics.mean(values).value for values in losses]
    spread, degrees = statistics.pooled(losses)
    counts = [len(values) for values in losses]
    order = sorted(range(len(means)), key=means.__getitem__)
    corrected = statistics.against_best(means, counts, spread, degrees)
    found: list[Difference | None] = []
    for place, values in enumerate(losses):
        if place == best:
            found.append(None)
            continue
        own = statistics.welch(losses[best], values)
        error = spread * math.sqrt(1 / counts[best] + 1 / counts[place])
        shown = Estimate(own.value, error, degrees, min(counts[best], counts[place]))
        p = corrected[place] if means[best] == means[order[0]] else 1.0
        if math.isfinite(own.error) and own.p_value() > p:
            p, shown = own.p_value(), own
        # All but the runner-up are compared at a stricter level, as there are many.
        others = 1 if place in order[:2] else len(losses) - 1
        more = shown.more(1 - (1 - statistics.LEVEL) / others)
        if more == 0 and p >= 1 - statistics.LEVEL:
            more = 1
        found.append(Difference(own.value, shown.error, p, more))
    return found
