"""The config of a sweep: the run of each of its trials, and what no run can have."""

import dataclasses
import itertools
from functools import cached_property
from typing import Any

from manta import config as configs
from manta.config import Count, RunName, config, name_of_run
from manta.data.recipe import PrepareConfig
from manta.errors import ConfigError
from manta.model.cost import flops_per_token
from manta.sweep import space as spaces
from manta.sweep.search_settings import MOST_TRIALS, SearchConfig
from manta.sweep.space import Dimension, Settings
from manta.terminal import named
from manta.train import earlier
from manta.train.earlier import Pace
from manta.train.records.logbook import duration
from manta.train.settings import PretrainConfig

__all__ = ["SearchConfig", "SweepConfig", "Trial"]

# Keys that do not change what a trial learns: a sweep goes on with other values of theirs.
FREE = (
    "name", "home", "threads_per_worker", "cpus_per_worker", "gpus_per_worker", "wait_seconds",
    "max_failures", "out_of_memory", "hang_seconds", "resume", "log_every", "sample", "checkpoint",
    "eval.every", "data.verify", "data.on_changed", "num_workers", "zero_stage", "engine",
    "micro_batch_size", "memory_per_worker", "activation_checkpointing", "compile",
    "track", "alerts",
)  # fmt: skip
# Keys that a sweep cannot vary, each with the reason. A group stands for all keys in it.
FIXED = {
    "total_tokens": "trials compare at equal tokens (jobs/scaling.py compares lengths)",
    "eval": "trials compare by the same measure",
    **{
        f"data.{f.name}": "trials compare on one dataset" for f in dataclasses.fields(PrepareConfig)
    },
    **dict.fromkeys(FREE, "it does not change what a trial learns"),
}
# Keys that can change while a run trains: its checkpoints continue with another value of theirs.
CHANGEABLE = ("optimizer.", "schedule.", "spikes.")
UNCHANGEABLE = ("optimizer.kind",)
MOST_DRAWS = 50  # in a row that are impossible or known already


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

    def derived(self) -> dict[str, Any]:
        # That file imports this one.
        from manta.sweep.rehearsal import foreseen

        cost = foreseen(self, 1)
        found: dict[str, Any] = {
            "trials": f"{cost.trials:,}",
            "tokens of all trials": f"{cost.tokens:,}",
            "FLOPs of all trials": f"{cost.flops:.3g}",
        }
        if (known := self.pace) is not None:
            found["steps of all trials in one lane"] = (
                f"{duration(cost.flops / known.flops_per_second)}, if as fast as in "
                f"{named(known.runs, most=3)}"
            )
        if self.sweep.search == "grid" and self.grid[1]:
            passed = [f"{name} ({why})" for name, why in self.grid[1].items()]
            found["combinations that no run can have"] = named(passed)
        example = self.config_of(self.examples()[0])
        return found | {f"{key}, of {example.name}": v for key, v in example.derived().items()}

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

    @property
    def pace(self) -> Pace | None:
        """How fast the trials will be, by earlier runs; None: not known."""
        return earlier.pace(self.home_folder, [self.config_of(t) for t in self.examples()])

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
        drawn = (spaces.drawn(self.dimensions, self.sweep.seed, n) for n in range(MOST_DRAWS))
        made = (trial for trial in map(self.trial, drawn) if not self.why_impossible(trial))
        return list(itertools.islice(made, self.sweep.trials))

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
            count = spaces.size(self.dimensions)
            if count > MOST_TRIALS:
                return [
                    f"the grid has {count:,} combinations, and at most {MOST_TRIALS:,} can be "
                    "tried: set sweep.search=random and sweep.trials, or give fewer values"
                ]
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
        found: list[str] = []
        for value in (d.low, d.high) if d.is_range else d.values:
            value = d.nearest(value) if d.is_range else value
            tree = {**self.shared, "name": "trial"}
            tree = configs.merged(tree, _nested(d.key, value))
            for problem in configs.problems_of_types(PretrainConfig, tree):
                found.append(_named_after(where, d.key, problem))
        if found:
            return list(dict.fromkeys(found))
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
                f"change: omit it, or set it to null; keys of "
                f"{', '.join(k.rstrip('.') for k in CHANGEABLE)} can change"
            ]
        return []

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
