"""Settings of a study of scaling: the runs, what is counted, the budget, the prediction."""

from typing import Literal

from manta.config import Count, Natural, PositiveFloat, PositiveFraction, RunName, Seed, config
from manta.storage import HomeConfig


@config
class ColumnsConfig:
    """The names of a CSV file's columns."""

    parameters: str = "parameters"
    """Parameters of the run's model."""
    tokens: str = "tokens"
    """Tokens that the run was trained on."""
    flops: str | None = None
    """Training FLOPs; given, tokens are FLOPs / (6 x parameters) and the file needs no tokens."""
    loss: str = "loss"
    """Loss at the end, in nats per token."""
    lr: str | None = None
    """The best learning rate of this size and these tokens; null: not in the file."""
    batch: str | None = None
    """The best tokens per batch of this size and these tokens; null: not in the file."""


@config
class BudgetConfig:
    """What the next run may cost: one of `flops`, `hours` and `dollars`."""

    flops: PositiveFloat | None = None
    """Training FLOPs, as 6 x parameters x tokens."""
    hours: PositiveFloat | None = None
    """Hours of the machine or cluster; needs a speed."""
    dollars: PositiveFloat | None = None
    """Its price; needs a speed and `price_per_hour`."""
    price_per_hour: PositiveFloat | None = None
    """Price of an hour of the machine or cluster."""
    flops_per_second: PositiveFloat | None = None
    """The speed, as measured: 6 x parameters x tokens per second of a run."""
    peak_flops: PositiveFloat | None = None
    """The peak FLOPs per second of the machine or cluster; with `mfu`, it gives the speed."""
    mfu: PositiveFraction | None = None
    """The share of `peak_flops` that training reaches."""

    def problems(self) -> list[str]:
        found = []
        given = [k for k in ("flops", "hours", "dollars") if getattr(self, k) is not None]
        if len(given) > 1:
            found.append(f"{' and '.join(given)} are both given: one of them is the budget")
        if (self.peak_flops is None) != (self.mfu is None):
            found.append("peak_flops and mfu give the speed together: give both, or neither")
        if self.flops_per_second is not None and self.mfu is not None:
            found.append("flops_per_second and mfu both give the speed: give one of them")
        if (self.hours or self.dollars) and self.speed is None:
            found.append(
                "a budget in hours or dollars needs flops_per_second, or peak_flops and mfu"
            )
        if self.dollars and self.price_per_hour is None:
            found.append("a budget in dollars needs price_per_hour")
        return found

    @property
    def speed(self) -> float | None:
        """FLOPs per second; None: not given."""
        if self.peak_flops is not None and self.mfu is not None:
            return self.peak_flops * self.mfu
        return self.flops_per_second

    @property
    def in_flops(self) -> float | None:
        """The budget in FLOPs; None: there is none."""
        hours = self.hours
        if self.dollars is not None and self.price_per_hour is not None:
            hours = self.dollars / self.price_per_hour
        if hours is not None and self.speed is not None:
            return hours * 3600 * self.speed
        return self.flops


@config
class PredictConfig:
    """A run whose loss is predicted before it is trained."""

    name: RunName | None = None
    """The run's name; given, the prediction is filed, and nothing ever replaces it."""
    parameters: PositiveFloat | None = None
    """Parameters of its model, counted as `count` says; null: the budget's best size."""
    tokens: PositiveFloat | None = None
    """Tokens that it will be trained on; null: what the budget leaves."""

    def problems(self) -> list[str]:
        if (self.parameters is None) != (self.tokens is None):
            return ["parameters and tokens belong together: give both, or neither"]
        if self.parameters is not None and self.name is None:
            return ["name is missing: the prediction is filed under the name of the run"]
        return []


@config
class ScalingConfig(HomeConfig):
    name: RunName = "scaling"
    """Name of the study, and of its folder under HOME/scaling."""
    points: str | None = None
    """A CSV file with a line for each run."""
    columns: ColumnsConfig = ColumnsConfig()
    runs: tuple[str, ...] = ()
    """Names or folders of runs, instead of `points`, or in addition."""
    count: Literal["all", "no_embeddings"] = "all"
    """The parameters of `runs` that are counted: all, or those outside the token and position
    embeddings. (A CSV file has one number, and only its author knows which it is.)"""
    leave_out_highest: Natural = 0
    """How many runs with the highest losses are left out of the fit."""
    samples: Count = 4000
    """Bootstrap samples, for the intervals."""
    seed: Seed = 0
    """Seed of the bootstrap."""
    budget: BudgetConfig = BudgetConfig()
    predict: PredictConfig = PredictConfig()
    check: str | None = None
    """Name of a run that has been trained: compares it with its filed prediction, and fits
    nothing."""

    def problems(self) -> list[str]:
        found = []
        if self.check is None and self.points is None and not self.runs:
            found.append("points=FILE.csv or runs=[a,b,...] is missing: there is nothing to fit")
        if self.samples < 100:
            found.append(f"samples={self.samples}: an interval needs at least 100")
        has_budget = self.budget.in_flops is not None
        if self.predict.name is not None and self.predict.parameters is None and not has_budget:
            found.append("predict.name needs predict.parameters and predict.tokens, or a budget")
        return found
