"""A ladder: the runs of each size, and where the decay to each budget leaves the stable run.

Pure arithmetic. A run of warm-up, stable phase and decay differs from a longer one only from the
step on at which its rate falls. So each size has one stable run, whose rate never falls, and for
each budget a run that begins with the stable run's checkpoint at that step: the same as if it had
been trained by itself.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from manta import config as configs
from manta.config import name_of_run
from manta.errors import ConfigError
from manta.model.cost import flops_per_token
from manta.model.shape import ModelConfig
from manta.plot import short
from manta.scaling.ladder_settings import Size
from manta.scaling.points import counted, lacking
from manta.sweep.space import BATCH, LR, label
from manta.terminal import named
from manta.train.settings import PretrainConfig

if TYPE_CHECKING:
    from manta.scaling.settings import ScalingConfig

STABLE = "stable"
WARMUP_SHARE = 0.1  # of a size's smallest budget
# Keys of a run that a ladder decides, each with what decides it.
DECIDED = {
    "total_tokens": "ladder.tokens sets the lengths",
    "schedule.warmup": "ladder.warmup_tokens sets the warm-up",
    "batch_ramp": "the runs of a ladder have one batch from start to end",
    "eval.suites": "they are for a single run",
    "eval.patience": "all runs of a ladder reach their end",
    "init.checkpoint": "a law is of runs that start from new weights",
}


@dataclasses.dataclass(frozen=True)
class Rung:
    """A run that ends at a budget."""

    run: PretrainConfig
    start: int
    """Tokens at which it leaves the stable run: its rate falls from there on."""
    tokens: int
    """Tokens at its end, a whole number of batches."""


@dataclasses.dataclass(frozen=True)
class Stem:
    """The stable run of a size, and the runs that leave it."""

    stable: PretrainConfig
    rungs: tuple[Rung, ...]
    """The runs in the order of their budgets, the smallest first."""
    parameters: int
    """Parameters, as the study counts them."""
    flops_per_token: float

    @property
    def tokens(self) -> int:
        """Tokens that all these runs train together."""
        return self.rungs[-1].start + sum(rung.tokens - rung.start for rung in self.rungs)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a ladder costs."""

    stems: tuple[Stem, ...]

    @property
    def runs(self) -> int:
        return sum(len(stem.rungs) for stem in self.stems)

    @property
    def tokens(self) -> int:
        return sum(stem.tokens for stem in self.stems)

    @property
    def flops(self) -> float:
        return sum(stem.tokens * stem.flops_per_token for stem in self.stems)

    def shown(self) -> dict[str, Any]:
        """The figures that --dry-run shows."""
        alone = sum(rung.tokens for stem in self.stems for rung in stem.rungs)
        budgets = {rung.tokens for stem in self.stems for rung in stem.rungs}
        sizes = [
            f"{stem.stable.name.rpartition('/')[2].removesuffix(f'-{STABLE}')} "
            f"({short(stem.parameters)})"
            for stem in self.stems
        ]
        return {
            "runs of the ladder": self.runs,
            "its sizes, with their parameters": named(sizes),
            "its budgets": named([short(tokens) for tokens in sorted(budgets)]),
            "tokens to train": f"{self.tokens:,} ({alone:,} without common stable runs)",
            "FLOPs to train": f"{self.flops:.3g}",
        }


def cost(c: "ScalingConfig") -> Cost:
    return Cost(tuple(stems(c)))


def stems(c: "ScalingConfig") -> Iterator[Stem]:
    """The runs of a ladder, size by size.

    Raises:
        ConfigError: a size, a budget or a rate is impossible.
    """
    for size, settings in itertools.product(c.ladder.sizes, _settings(c)):
        yield _stem(c, size, settings)


def _settings(c: "ScalingConfig") -> list[dict[str, Any]]:
    """The rates and batches that are tried with each size."""
    tried = {LR: c.ladder.lr, BATCH: c.ladder.tokens_per_batch}
    varied = {key: values for key, values in tried.items() if values}
    return [
        dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())
    ]


def shape(base: ModelConfig, size: Size, grow: str) -> dict[str, Any]:
    """The keys of a model of some size. Raises ConfigError if `base` has no model of this width."""
    if not isinstance(size, int):
        return dict(size)
    times = size / base.n_embd
    layers = base.n_layer if grow == "width" else max(1, round(base.n_layer * times))
    found: dict[str, Any] = {"n_embd": size, "n_layer": layers}
    if base.is_recurrent:
        return found
    if size % base.head_size or (size // base.head_size * base.kv_heads) % base.n_head:
        unit = base.head_size * base.n_head // math.gcd(base.n_head, base.kv_heads)
        raise ConfigError(
            f"ladder.sizes: a width of {size} does not divide into heads of {base.head_size} "
            f"channels, as model has them; multiples of {unit} do"
        )
    heads = size // base.head_size
    found["n_head"] = heads
    if base.head_dim is not None:
        found["head_dim"] = base.head_dim
    if base.n_kv_head is not None:
        found["n_kv_head"] = heads * base.n_kv_head // base.n_head
    if base.mlp_hidden is not None:
        found["mlp_hidden"] = max(1, round(base.mlp_hidden * times))
    return found


def size_name(size: Size) -> str:
    return f"w{size}" if isinstance(size, int) else label(size)


def run_of(
    c: "ScalingConfig", name: str, size: Size, settings: dict[str, Any], tokens: int
) -> PretrainConfig:
    """The run of a size that ends at `tokens`, rounded up to whole batches, with the ladder's
    warm-up and decay. Raises ConfigError if no run can be that."""
    tree: dict[str, Any] = {**c.shared, "home": c.home, "name": name, "seed": c.seed}
    tree["total_tokens"] = tokens
    tree["model"] = {**tree.get("model", {}), **shape(c.model, size, c.ladder.grow)}
    if LR in settings:
        tree["optimizer"] = {**tree.get("optimizer", {}), "lr": settings[LR]}
    if BATCH in settings:
        tree["tokens_per_batch"] = settings[BATCH]
    tree["schedule"] = {**tree.get("schedule", {}), "warmup": 0.0}
    # Several train at the same time, so each uses only the CPUs that it reserved.
    tree["threads_per_worker"] = c.threads_per_worker or max(1, int(c.cpus_per_worker))
    name_of_run(name)
    made = configs.from_dict(PretrainConfig, tree)
    made = dataclasses.replace(made, alerts=made.alerts.without_webhook())
    return _warming(made, warmup(c, made))


def plain(c: "ScalingConfig") -> list[PretrainConfig]:
    """A run of each size, of no length in particular. Raises ConfigError if no run can be that."""
    return [run_of(c, c.name, size, {}, c.tokens_per_batch) for size in c.ladder.sizes]


def warmup(c: "ScalingConfig", run: PretrainConfig) -> int:
    """The steps of warm-up of a run of this size and batch."""
    tokens = c.ladder.warmup_tokens or WARMUP_SHARE * min(_budgets(c, run), default=0)
    return max(1, round(tokens / run.tokens_per_batch))


def _warming(run: PretrainConfig, steps: int) -> PretrainConfig:
    """A run with this many steps of warm-up."""
    share = min(1.0, steps / run.total_steps)
    while math.ceil(share * run.total_steps) > steps:
        share = math.nextafter(share, 0)
    return dataclasses.replace(run, schedule=dataclasses.replace(run.schedule, warmup=share))


def _budgets(c: "ScalingConfig", run: PretrainConfig) -> list[int]:
    """The budgets of a size in tokens, ascending."""
    n, most = counted(run.expected_model, c.count), c.ladder.most_flops
    multiples = [math.ceil(times * n) for times in c.ladder.tokens_per_parameter]
    budgets = sorted(c.ladder.tokens or multiples)
    if most is None:
        return budgets
    found = [tokens for tokens in budgets if 6 * n * tokens <= most]
    if not found:
        raise ConfigError(
            f"its smallest budget takes {6 * n * budgets[0]:.3g} FLOPs, more than "
            f"ladder.most_flops={most:.3g}: raise that, or leave this size out"
        )
    return found


def _stem(c: "ScalingConfig", size: Size, settings: dict[str, Any]) -> Stem:
    base = "-".join([size_name(size), *([label(settings)] if settings else [])])
    name = f"{c.name}/{base}"
    try:
        first = run_of(c, f"{name}-{STABLE}", size, settings, 1)
        rungs = []
        for tokens in _budgets(c, first):
            run = run_of(c, f"{name}-d{tokens}", size, settings, tokens)
            rungs.append(Rung(run, _start(run), run.tokens_before(run.total_steps)))
        for before, after in itertools.pairwise(rungs):
            if before.start == after.start:
                raise ConfigError(
                    f"the budgets of {before.run.total_tokens:,} and {after.run.total_tokens:,} "
                    "tokens are too near each other: they decay from the same step"
                )
        stable = run_of(c, first.name, size, settings, rungs[-1].start)
        stable = dataclasses.replace(
            stable, schedule=dataclasses.replace(stable.schedule, decay=0.0)
        )
    except (ConfigError, ValueError) as e:
        why = "; ".join(text.strip() for text in str(e).splitlines() if text.strip())
        raise ConfigError(f"{name}: {why}") from None
    model = stable.expected_model
    flops = flops_per_token(model, stable.sequence_length)
    return Stem(stable, tuple(rungs), counted(model, c.count), flops)


def _start(run: PretrainConfig) -> int:
    """The tokens of a run from which on its rate falls."""
    steps, warm = run.total_steps, math.ceil(run.schedule.warmup * run.total_steps)
    decay = math.ceil(run.schedule.decay * steps)
    if decay < 1 or warm + decay > steps or steps - decay < 1:
        raise ConfigError(
            f"a budget of {run.total_tokens:,} tokens is {steps:,} step(s), and warm-up ({warm:,}) "
            f"and decay ({decay:,}) have to fit into them, with at least one step each: give a "
            "larger budget, a smaller batch, or other ladder.warmup_tokens and schedule.decay"
        )
    return run.tokens_before(steps - decay)


def predicted(
    c: "ScalingConfig", n: float | None, d: float, settings: dict[str, Any] | None = None
) -> tuple[PretrainConfig, int, int]:
    """The run that tests a prediction for `n` parameters (or for predict.size) and `d` tokens, or
    the nearest that there is; and its parameters and tokens."""
    size = c.predict.size
    if size is None:
        assert n is not None, "checked by the config"
        size = nearest(c, n)
    run = run_of(c, c.predict.name or c.name, size, settings or {}, max(1, round(d)))
    run = dataclasses.replace(run, threads_per_worker=c.threads_per_worker)  # it trains alone
    return run, counted(run.expected_model, c.count), run.tokens_before(run.total_steps)


def nearest(c: "ScalingConfig", n: float) -> int:
    """The width of a model with the number of parameters that is nearest to `n`."""
    base = c.expected_model
    unit = 1
    if not base.is_recurrent:
        unit = base.head_size * base.n_head // math.gcd(base.n_head, base.kv_heads)

    def off(width: int) -> float:
        model = dataclasses.replace(base, **shape(base, width, c.ladder.grow))
        return abs(math.log(counted(model, c.count) / n))

    width = unit
    while off(width + unit) < off(width):
        width += unit
    return width


def problems(c: "ScalingConfig") -> list[str]:
    """What is wrong with a ladder."""
    found = []
    default = PretrainConfig()
    for key, why in DECIDED.items():
        value, usual = c, default
        for part in key.split("."):
            value, usual = getattr(value, part), getattr(usual, part)
        if value != usual:
            found.append(f"{key}: {why}; omit it")
    if c.data.kind != "text":
        found.append(f"data.kind={c.data.kind}: a ladder trains on texts; omit it")
    if c.schedule.kind != "wsd":
        found.append(f"schedule.kind={c.schedule.kind}: the runs of a ladder have wsd; omit it")
    if found:
        return found
    try:
        if c.what == "coordinates":
            plain(c)
            return []
        made = list(stems(c))
        if isinstance(size := c.predict.size, int | dict):
            run_of(c, c.predict.name or c.name, size, {}, int(c.predict.tokens or 1))
    except ConfigError as e:
        return [str(e)]
    names = [rung.run.name for stem in made for rung in stem.rungs]
    if len(set(names)) < len(names):
        return ["ladder.sizes: two of them have the same name; omit one"]
    if c.what == "law" and c.points is None and not c.runs:
        pairs = [(stem.parameters, rung.tokens) for stem in made for rung in stem.rungs]
        if missing := lacking([n for n, _ in pairs], [d for _, d in pairs]):
            return [f"ladder: too few runs for a scaling law: {missing}"]
    return []
