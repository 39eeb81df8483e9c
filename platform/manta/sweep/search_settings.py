"""The config of a search: what it varies, how many settings it tries, and how far they train."""

import dataclasses
from typing import Any, ClassVar, Literal

from manta.config import Count, Natural, PositiveFloat, Seed, config
from manta.sweep import space as spaces
from manta.sweep.space import BATCH, LR, Dimension

MOST_TRIALS = 10_000
STOCK: dict[str, list[Any]] = {"lr": [1e-3, 2e-3, 4e-3], "tokens_per_batch": [2048, 4096]}


@config
class SearchConfig:
    only_for: ClassVar = (
        ("trials", "search", ("random", "optuna")),
        ("reduction_factor", "scheduler", ("asha",)),
        ("rungs", "scheduler", ("asha",)),
        ("exchanges", "scheduler", ("pbt",)),
        ("contenders", "repeat", ("contenders",)),
    )
    sources: ClassVar = ("space", "replay")

    space: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What to vary: any keys of jobs/pretrain.py, each with a list of values, or with a range:
    {log_uniform: [lowest, highest]}, {uniform: [..]}, {int_uniform: [..]}; {choice: [..]} is the
    same as a list. Examples: sweep.space.model.n_layer=[2,4];
    sweep.space.optimizer.lr.log_uniform=[1e-4,1e-2]. Combinations that no run can have are listed
    and passed over."""
    lr: tuple[PositiveFloat, ...] | None = tuple(STOCK["lr"])
    """Peak learning rates to try: short for space.optimizer.lr. null: not varied, which is the
    default where there is a space."""
    tokens_per_batch: tuple[Count, ...] | None = tuple(STOCK["tokens_per_batch"])
    """Batch sizes to try, in tokens: short for space.tokens_per_batch. Every trial trains on
    total_tokens, whatever its batch. null: not varied, which is the default where there is a
    space."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """How the settings are chosen. grid: every combination of the lists; random: `trials` draws;
    optuna: `trials` suggestions by Optuna's TPE, which learns from the losses so far (needs the
    package optuna: pip install 'manta[optuna]')."""
    trials: Count | None = None
    """Settings to try, for search=random and search=optuna. More of them continue the sweep."""
    seed: Seed = 0
    """Seed of the draws of search=random and optuna, and of the changes of scheduler=pbt."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """How far trials train. none: each to its end; asha: all to a first rung, the better half from
    there to the next rung, and so on; the others stay paused at their checkpoints, and go on if
    more is known (Li et al. 2020); pbt: all to their end in `exchanges` parts, and after each part
    the worst quarter continues from the weights of the best quarter, with other settings (Jaderberg
    et al. 2017)."""
    reduction_factor: Count = 2
    """One of this many trials at a rung of asha is promoted; the next rung is this many times as
    far."""
    rungs: Count = 4
    """Rungs of asha, total_tokens included: 4 rungs of factor 2 are at 1/8, 1/4, 1/2 and all of
    total_tokens."""
    exchanges: Count = 8
    """Parts of equal length into which pbt divides total_tokens."""
    repeats: Count = 1
    """Seeds that each settings are trained with: seed, seed + 1, ..."""
    repeat: Literal["all", "contenders"] = "all"
    """Settings that get the repeats. all; contenders: the best ones, once the search is over."""
    contenders: Count = 3
    """How many of the best settings get the repeats of repeat=contenders."""
    max_concurrent: Count | None = None
    """Trials at once; null: as many as fit on the cluster."""
    retry_failed: bool = False
    """Whether trials that failed are tried again from where they were, when their sweep is started
    again. (A trial that diverged would diverge again.)"""
    replay: dict[Natural, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Settings that change along one run, as {tokens: {key: value}}: pbt writes what it found in
    this form, and a sweep with it trains that one run. Example: {0: {optimizer.lr: 0.001}, 204800:
    {optimizer.lr: 0.0005}}."""

    @classmethod
    def beneath(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """Without a space of its own, a sweep varies rate and batch; with one, nothing else."""
        return dict.fromkeys(STOCK) if tree.get("space") or tree.get("replay") else {}

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The keys that the sweep varies, in the order of their names in trials. Raises ValueError
        if a key has no valid values; the message has the key."""
        given: dict[str, tuple[str, Any]] = {}
        for short, key, values in (
            ("lr", LR, self.lr), ("tokens_per_batch", BATCH, self.tokens_per_batch)
        ):  # fmt: skip
            if values is not None:
                given[key] = (f"sweep.{short}", list(values))
        for key, spec in spaces.flat(self.space):
            where = f"sweep.space.{key}"
            if key in given:
                raise ValueError(f"{where} and {given[key][0]} are the same key: omit one of them")
            given[key] = (where, spec)
        found = []
        for key, (where, spec) in given.items():
            try:
                found.append(spaces.parse(key, spec))
            except ValueError as e:
                raise ValueError(f"{where}={e}") from None
        # One order, whichever form the keys were given in: names of trials follow it.
        first = [LR, BATCH]
        return tuple(sorted(found, key=lambda d: (d.key not in first, d.key)))

    def where(self, key: str) -> str:
        """The argument that varies a key: sweep.lr or sweep.space.optimizer.lr."""
        short = {LR: ("lr", self.lr), BATCH: ("tokens_per_batch", self.tokens_per_batch)}
        name, values = short.get(key, ("", None))
        return f"sweep.space.{key}" if values is None else f"sweep.{name}"

    def problems(self) -> list[str]:
        found = []
        for key, choice, values in self.only_for:
            value, default = getattr(self, key), type(self).__dataclass_fields__[key].default
            if value != default and getattr(self, choice) not in values:
                wanted = " or ".join(f"{choice}={choice_value}" for choice_value in values)
                found.append(f"{key}={value} is for {wanted}: omit it, or set that")
        if self.search != "grid" and self.trials is None:
            found.append(f"search={self.search} needs the number of trials: set sweep.trials")
        if (self.trials or 0) > MOST_TRIALS:
            found.append(f"trials={self.trials}: at most {MOST_TRIALS:,} is valid")
        if self.reduction_factor < 2:
            found.append(f"reduction_factor={self.reduction_factor}: at least 2 is valid")
        if self.scheduler == "pbt" and self.repeats > 1:
            found.append(f"repeats={self.repeats} is not for scheduler=pbt, whose settings change")
        if self.scheduler == "pbt" and self.search == "optuna":
            found.append("search=optuna is not for scheduler=pbt: set search=random")
        if self.repeat == "contenders" and self.repeats < 2:
            found.append("repeat=contenders needs repeats=2 or more")
        if self.retry_failed and self.scheduler == "pbt":
            found.append("retry_failed=true is not for scheduler=pbt, which replaces what failed")
        if self.replay:
            default = type(self)()
            for key in ("search", "scheduler", "repeats"):
                if getattr(self, key) != getattr(default, key):
                    found.append(f"replay trains one run: omit {key}={getattr(self, key)}")
            if self.space or self.lr or self.tokens_per_batch:
                found.append("replay trains one run: omit space, lr and tokens_per_batch")
        return found
