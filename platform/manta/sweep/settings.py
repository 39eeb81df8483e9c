"""The configs of a sweep: what it varies, how it searches, and when trials pause."""

import dataclasses
from functools import cached_property
from typing import Any, ClassVar, Literal

from manta import config as configs
from manta.config import Count, Natural, PositiveFloat, RunName, Seed, config, name_of_run
from manta.errors import ConfigError
from manta.model.cost import flops_per_token
from manta.sweep import space as spaces
from manta.sweep.space import BATCH, LR, Dimension, Settings
from manta.train.settings import PretrainConfig

STOCK: dict[str, list[Any]] = {"lr": [1e-3, 2e-3, 4e-3], "tokens_per_batch": [2048, 4096]}
# Keys that a sweep cannot vary, each with the reason. A group stands for all keys in it.
FIXED = {
    "name": "each trial has a name of its own",
    "home": "all trials are in one home",
    "resume": "a sweep continues its trials by itself",
    "total_tokens": "trials compare at equal tokens; jobs/scaling.py compares lengths",
    "eval": "trials compare by the same measure",
    "data.name": "trials compare on the same val split",
    "data.source": "trials compare on the same val split",
    "data.val_source": "trials compare on the same val split",
    "data.tokenizer": "losses of different tokens do not compare",
    "data.vocab_size": "losses of different tokens do not compare",
}
# Keys that can change while a run trains: its checkpoints continue with another value of theirs.
CHANGEABLE = ("optimizer.", "schedule.", "spikes.")
UNCHANGEABLE = ("optimizer.kind",)
MOST_DRAWS = 50  # in a row that are impossible or known already, before a search ends


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
    same as a list. Example: sweep.space.optimizer.lr=[1e-3,2e-3] sweep.space.model.n_layer=[2,4].
    Combinations that no run can have are listed and passed over."""
    lr: tuple[PositiveFloat, ...] | None = tuple(STOCK["lr"])
    """Peak learning rates to try: short for space.optimizer.lr. null: not varied, which is the
    default where there is a space."""
    tokens_per_batch: tuple[Count, ...] | None = tuple(STOCK["tokens_per_batch"])
    """Batch sizes to try, in tokens: short for space.tokens_per_batch. Every trial trains on
    total_tokens, whatever its batch. null: not varied, which is the default where there is a
    space."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """Which settings are tried. grid: every combination of the lists; random: `trials` draws;
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
    """Which settings get the repeats. all; contenders: the best ones, once the search is over."""
    contenders: Count = 3
    """How many of the best settings get the repeats of repeat=contenders."""
    max_concurrent: Count | None = None
    """Trials at once; null: as many as fit on the cluster."""
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
        if (self.search == "grid") != (self.trials is None):
            found.append(
                f"trials={self.trials} is for search=random and search=optuna: omit it"
                if self.trials
                else f"search={self.search} needs the number of trials: set sweep.trials"
            )
        if self.scheduler == "asha" and self.reduction_factor < 2:
            found.append(f"reduction_factor={self.reduction_factor}: at least 2 is valid")
        if self.scheduler == "pbt" and self.repeats > 1:
            found.append(f"repeats={self.repeats} is not for scheduler=pbt, whose settings change")
        if self.repeat == "contenders" and self.repeats < 2:
            found.append("repeat=contenders needs repeats=2 or more")
        if self.replay and (self.space or self.lr or self.tokens_per_batch):
            found.append("replay trains one run: omit space, lr and tokens_per_batch")
        return found


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep: some settings, with one seed."""

    name: str
    """The run's name: SWEEP/lr0.001-batch4096."""
    settings: Settings
    """The values of the keys that the sweep varies; they identify the trial within the sweep."""
    seed: int
    group: str
    """The name of these settings with the first seed: repeats have the same group."""


@config
class SweepConfig(PretrainConfig):
    name: RunName = "sweep"
    """Name of the sweep; its runs are in HOME/runs/NAME/."""
    total_tokens: Count = 409_600
    """Length of each trial, in tokens; rounded up to whole batches."""
    sweep: SearchConfig = SearchConfig()

    def problems(self) -> list[str]:
        found = []
        try:
            name_of_run(f"{self.name}-best")
        except ValueError as e:
            found.append(f"name={self.name}: the best trial's name, {self.name}-best, is {e}")
        if self.eval.suites:
            found.append("eval.suites is for a single run: evaluate the best trial instead")
        return found + (self._problems_of_space() if not self.sweep.problems() else [])

    @property
    def batch_sizes(self) -> list[tuple[str, int]]:
        """Batch sizes are checked trial by trial."""
        return []

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        return self.sweep.dimensions

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What all trials have in common, as the tree of a config for jobs/pretrain.py: values that
        differ from the defaults, so that a preset that a trial names still fills in the others."""
        tree = configs.differences(self)
        tree.pop("sweep", None)
        # Trials run at the same time, so each uses only the CPUs that it reserved.
        threads = self.threads_per_worker or max(1, int(self.cpus_per_worker))
        return {**tree, "total_tokens": self.total_tokens, "threads_per_worker": threads}

    def trial(self, settings: Settings, repeat: int = 0) -> Trial:
        """The trial of these settings with one seed; repeat 0 has the sweep's own."""
        group = f"{self.name}/{spaces.label(settings)}"
        seed = settings.get("seed", self.seed + repeat)
        return Trial(group if not repeat else f"{group}-seed{seed}", settings, seed, group)

    def config_of(self, trial: Trial, settings: Settings | None = None) -> PretrainConfig:
        """The training run of a trial, or of its name with other settings. Raises ConfigError if no
        run can have them."""
        return configs.from_dict(PretrainConfig, self._tree(trial, settings or trial.settings))

    def _tree(self, trial: Trial, settings: Settings) -> dict[str, Any]:
        tree = {**self.shared, "name": trial.name, "seed": trial.seed}
        for key, value in settings.items():
            tree = configs.merged(tree, _nested(key, value))
            *groups, name = key.split(".")
            _at(tree, groups)[name] = value  # a value that is a dict is replaced, not merged
        return tree

    def flops_per_token(self, trial: Trial) -> float:
        """FLOPs of a trial for each token, forward and backward."""
        if trial.name not in self._flops:
            run = self.config_of(trial)
            found = flops_per_token(
                run.expected_model, run.sequence_length, run.trainable, run.lora
            )
            self._flops[trial.name] = found
        return self._flops[trial.name]

    @cached_property
    def _flops(self) -> dict[str, float]:
        return {}

    def why_impossible(self, trial: Trial) -> str | None:
        """Why no run can have a trial's settings; None if one can."""
        try:
            name_of_run(trial.name)
            self.config_of(trial)
        except (ConfigError, ValueError) as e:
            return "; ".join(text.strip() for text in str(e).splitlines() if text.strip())
        return None

    @cached_property
    def grid(self) -> tuple[list[Trial], dict[str, str]]:
        """The trials of every combination, first seeds only; and why the others are impossible, by
        name."""
        if self.replayed:
            settings = self.replayed[0]
            return [Trial(f"{self.name}/replay", settings, self.seed, f"{self.name}/replay")], {}
        possible, impossible = [], {}
        for settings in spaces.grid(self.dimensions):
            trial = self.trial(settings)
            if why := self.why_impossible(trial):
                impossible[trial.name] = why
            else:
                possible.append(trial)
        return possible, impossible

    @cached_property
    def replayed(self) -> dict[int, Settings]:
        """`sweep.replay`, with dotted keys; {} if the sweep replays nothing."""
        given = self.sweep.replay
        return {start: dict(spaces.flat(given[start])) for start in sorted(given)}

    def examples(self) -> list[Trial]:
        """Trials that are known before any result: those of a grid, or the first draws."""
        if self.sweep.search == "grid":
            return self.grid[0]
        drawn = range(min(self.sweep.trials or 0, MOST_DRAWS))
        made = [self.trial(spaces.drawn(self.dimensions, self.sweep.seed, n)) for n in drawn]
        return [trial for trial in made if self.why_impossible(trial) is None]

    def trials(self) -> list[PretrainConfig]:
        """The training run of every trial that is known before any result, for each seed."""
        seeds = range(self.sweep.repeats if self.sweep.repeat == "all" else 1)
        found = [self.trial(t.settings, n) if n else t for t in self.examples() for n in seeds]
        return [self.config_of(trial) for trial in found]

    def _problems_of_space(self) -> list[str]:
        """What is wrong with the keys and values that the sweep varies."""
        try:
            found = [text for d in self.dimensions for text in self._problems_of(d)]
        except ValueError as e:
            return [str(e)]
        if self.sweep.replay:
            found += self._problems_of_replay()
        elif self.sweep.search == "grid" and not found:
            found = self._problems_of_grid()
        elif not found and not self.examples():
            first = self.trial(spaces.drawn(self.dimensions, self.sweep.seed, 0))
            found = [f"no run can have the settings drawn; {first.name}: "]
            found[0] += f"{self.why_impossible(first)}"
        return found or self._problems_of_lengths()

    def _problems_of_lengths(self) -> list[str]:
        """The parts in which trials are trained have to be of at least a batch each."""
        key, part = "", self.total_tokens
        if self.sweep.scheduler == "asha":
            key = f"sweep.rungs={self.sweep.rungs}"
            part = self.total_tokens // self.sweep.reduction_factor ** (self.sweep.rungs - 1)
        elif self.sweep.scheduler == "pbt":
            key, part = f"sweep.exchanges={self.sweep.exchanges}", part // self.sweep.exchanges
        largest = max(run.tokens_per_batch for run in self.trials())
        if key and part < largest:
            return [
                f"{key}: the first part of total_tokens={self.total_tokens} has {part:,} tokens, "
                f"less than a batch of {largest:,}; use fewer"
            ]
        return []

    def _problems_of_replay(self) -> list[str]:
        replayed = self.replayed
        if 0 not in replayed or max(replayed) >= self.total_tokens:
            return [
                f"sweep.replay has settings from {list(replayed)} tokens on: the first have to be "
                f"from 0 on, and the last from before total_tokens={self.total_tokens}"
            ]
        found = []
        for start, settings in replayed.items():
            where = f"sweep.replay.{start}"
            fixed = [k for k in settings if start and not changeable(k)]
            found += [f"{where}: {key} cannot change while a run trains; omit it" for key in fixed]
            if settings.keys() != replayed[0].keys():
                found.append(f"{where} has other keys than sweep.replay.0; give the same ones")
            trial = dataclasses.replace(self.grid[0][0], settings=settings)
            if why := self.why_impossible(trial):
                found.append(f"{where}: {why}")
        return found

    def _problems_of(self, d: Dimension) -> list[str]:
        """What is wrong with a key by itself: it cannot be varied, or its values have another
        type."""
        where, search = self.sweep.where(d.key), self.sweep
        for key, why in FIXED.items():
            if d.key == key or d.key.startswith(f"{key}."):
                return [f"{where}: {why}; omit it"]
        if d.is_range and search.search == "grid":
            return [
                f"{where}={spaces.shown(d.spec())} is a range, and search=grid needs lists: set "
                "sweep.search=random and sweep.trials, or give a list"
            ]
        if d.key == "seed" and search.repeats > 1:
            return [
                f"{where}: sweep.repeats={search.repeats} varies the seed too; omit one of them"
            ]
        if search.scheduler == "pbt" and not changeable(d.key):
            return [
                f"{where}: scheduler=pbt changes settings while a run trains, and this one cannot "
                f"change; it takes keys of {', '.join(k.rstrip('.') for k in CHANGEABLE)}"
            ]
        found = []
        for value in (d.low, d.high) if d.is_range else d.values:
            value = d.nearest(value) if d.is_range else value
            tree = {**self.shared, "name": "trial"}
            tree = configs.merged(tree, _nested(d.key, value))
            for problem in configs.problems_of_types(PretrainConfig, tree):
                found.append(_named_after(where, d.key, problem))
        return list(dict.fromkeys(found))

    def _problems_of_grid(self) -> list[str]:
        """The values that no trial can take; the first reason if there is no trial at all."""
        possible, impossible = self.grid
        if not possible:
            name, why = next(iter(impossible.items()))
            return [f"no trial of the sweep is possible; {name}: {why}"]
        found = []
        for d in self.dimensions:
            for value in d.values:
                if not any(trial.settings[d.key] is value for trial in possible):
                    with_it = self.trial({**possible[0].settings, d.key: value})
                    found.append(
                        f"{self.sweep.where(d.key)}: no trial can take {spaces.shown(value)}: "
                        f"{self.why_impossible(with_it)}"
                    )
        return found


def changeable(key: str) -> bool:
    """Whether a run's checkpoints continue with another value of this key."""
    return key.startswith(CHANGEABLE) and key not in UNCHANGEABLE


def _nested(key: str, value: Any) -> dict[str, Any]:
    """The tree that has one value, at a dotted key."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _at(tree: dict[str, Any], groups: list[str]) -> dict[str, Any]:
    for name in groups:
        tree = tree[name]
    return tree


def _named_after(where: str, key: str, problem: str) -> str:
    """A problem of a config, with the argument of the sweep in place of the config's key."""
    rest = problem.removeprefix(key)
    return f"{where}{rest}" if rest != problem else f"{where}: {problem}"
