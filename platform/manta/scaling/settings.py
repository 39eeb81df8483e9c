"""Settings of a study of scaling: the runs, what is counted, the budget, the prediction."""

import dataclasses
from functools import cached_property
from typing import Any, Literal

from manta import config as configs
from manta.config import Count, Natural, PositiveFloat, PositiveFraction, RunName, Seed, config
from manta.scaling.ladder_settings import CoordinatesConfig, LadderConfig, Size
from manta.sweep.space import flat
from manta.terminal import named
from manta.train.settings import PretrainConfig


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
    size: Size | None = None
    """The model of a run of the ladder, as one of ladder.sizes; null: the width whose parameters
    are nearest to `parameters`, or to the budget's best size."""
    parameters: PositiveFloat | None = None
    """Parameters of its model, counted as `count` says; null: the budget's best size."""
    tokens: PositiveFloat | None = None
    """Tokens that it will be trained on; null: what the budget leaves."""

    def problems(self) -> list[str]:
        if self.size is not None and self.parameters is not None:
            return ["size and parameters are both given: give one of them"]
        is_sized = self.parameters is not None or self.size is not None
        if is_sized != (self.tokens is not None):
            return ["parameters (or size) and tokens belong together: give both, or neither"]
        if is_sized and self.name is None:
            return ["name is missing: the prediction is filed under the name of the run"]
        return []


@config
class ScalingConfig(PretrainConfig):
    name: RunName = "scaling"
    """Name of the study, of its folder under HOME/scaling, and of the folder of a ladder's runs
    under HOME/runs."""
    what: Literal["law", "transfer", "coordinates"] = "law"
    """What is asked. law: how the loss falls with size and tokens; transfer: whether one learning
    rate is the best for all sizes of the ladder, with optimizer.reference_width and without;
    coordinates: how activations grow with the width in the first steps, with it and without."""
    points: str | None = None
    """A CSV file with a line for each run."""
    columns: ColumnsConfig = ColumnsConfig()
    runs: tuple[str, ...] = ()
    """Names or folders of runs, instead of `points`, or in addition."""
    ladder: LadderConfig = LadderConfig()
    coordinates: CoordinatesConfig = CoordinatesConfig()
    count: Literal["all", "no_embeddings"] = "all"
    """The parameters of `runs` that are counted: all, or those outside the token and position
    embeddings. (A CSV file has one number, and only its author knows which it is.)"""
    leave_out_highest: Natural = 0
    """How many runs with the highest losses are left out of the fit."""
    samples: Count = 4000
    """Bootstrap samples, for the intervals."""
    seed: Seed = 0
    """Seed of the bootstrap, and of all runs of a ladder."""
    budget: BudgetConfig = BudgetConfig()
    predict: PredictConfig = PredictConfig()
    check: str | None = None
    """Name of a run that has been trained: compares it with its filed prediction, and fits
    nothing."""

    @classmethod
    def beneath(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """A ladder's runs have warm-up, stable phase and decay."""
        ladder = tree.get("ladder")
        has_sizes = isinstance(ladder, dict) and bool(ladder.get("sizes"))
        return super().beneath(tree) | ({"schedule": {"kind": "wsd"}} if has_sizes else {})

    def problems(self) -> list[str]:
        found = super().problems()
        if self.samples < 100:
            found.append(f"samples={self.samples}: an interval needs at least 100")
        found += self._problems_of_law() if self.what == "law" else self._problems_of_widths()
        if not self.ladder.sizes:
            if alone := [key for key, _ in flat(self.shared)]:
                found.append(
                    f"{named(alone)}: only a ladder trains runs; set ladder.sizes, or omit "
                    f"{'it' if len(alone) == 1 else 'them'}"
                )
        elif not found and not self.ladder.problems():
            # That file imports this one.
            from manta.scaling.ladder import problems

            found += problems(self)
        return found

    def _problems_of_law(self) -> list[str]:
        found, has_ladder = [], bool(self.ladder.sizes)
        if self.check is None and self.points is None and not self.runs and not has_ladder:
            found.append(
                "points=FILE.csv, runs=[a,b,...] or ladder.sizes=[...] is missing: there is "
                "nothing to fit"
            )
        if has_ladder and not (self.ladder.tokens or self.ladder.tokens_per_parameter):
            found.append("ladder.sizes need budgets: set ladder.tokens=[...]")
        has_budget = self.budget.in_flops is not None
        is_sized = self.predict.parameters is not None or self.predict.size is not None
        if self.predict.name is not None and not is_sized and not has_budget:
            found.append("predict.name needs predict.parameters and predict.tokens, or a budget")
        if not has_ladder and self.predict.size is not None:
            found.append("predict.size is a size of a ladder: give predict.parameters instead")
        if self.coordinates != CoordinatesConfig():
            found.append("coordinates is for what=coordinates: omit it")
        return found

    def _problems_of_widths(self) -> list[str]:
        """What is wrong with what=transfer or what=coordinates, which compare widths."""
        found, ladder, what = [], self.ladder, f"what={self.what}"
        if len(ladder.sizes) < FEWEST_WIDTHS:
            found.append(f"{what} compares widths: set ladder.sizes to at least {FEWEST_WIDTHS}")
        if self.optimizer.reference_width is None:
            found.append(
                f"{what} compares optimizer.reference_width with none: set it to the width at "
                "which the learning rate is right"
            )
        if self.what == "transfer":
            if len(ladder.lr) < FEWEST_RATES:
                found.append(f"{what} compares rates: set ladder.lr to at least {FEWEST_RATES}")
            if len(ladder.tokens) != 1:
                found.append(f"{what} compares runs of one length: set ladder.tokens=[TOKENS]")
            if self.coordinates != CoordinatesConfig():
                found.append("coordinates is for what=coordinates: omit it")
        else:
            for key in ("tokens", "tokens_per_parameter", "lr"):
                if getattr(ladder, key):
                    found.append(f"ladder.{key}: {what} takes a few steps at one rate; omit it")
            if self.model.family == "lstm":
                found.append(f"model.family=lstm: {what} looks into the blocks of a GPT")
        if ladder.most_flops is not None:
            found.append("ladder.most_flops is for what=law: omit it")
        for key in ("points", "runs", "check", "leave_out_highest", "budget", "predict"):
            if getattr(self, key) != getattr(type(self), key):
                found.append(f"{key} is for what=law: omit it")
        return found

    def derived(self) -> dict[str, Any]:
        if not self.ladder.sizes or self.what == "coordinates":
            return {}
        from manta.scaling.ladder import cost

        return cost(self).shown()

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What a ladder's runs have in common, as the tree of a config for jobs/pretrain.py:
        values that are not the defaults."""
        own = [f.name for f in dataclasses.fields(self) if f.name not in OF_RUNS]
        return {k: v for k, v in configs.differences(self).items() if k not in (*own, *REPLACED)}


OF_RUNS = tuple(field.name for field in dataclasses.fields(PretrainConfig))
FEWEST_WIDTHS, FEWEST_RATES = 3, 3
REPLACED = ("name", "home", "seed")  # keys of a run that a study has too
