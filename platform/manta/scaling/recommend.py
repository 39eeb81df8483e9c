"""What to train next: size, tokens, rate and batch for a budget, and the run of a prediction."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from manta import config as configs
from manta import layout, storage
from manta.errors import ConfigError
from manta.plot import short
from manta.scaling import predictions
from manta.scaling.fit import LEVEL, Fit
from manta.scaling.ladder import nearest, predicted, shape
from manta.scaling.misfit import misfit
from manta.scaling.points import Point
from manta.scaling.powers import FEWEST, Power, power
from manta.scaling.settings import ScalingConfig
from manta.sweep.space import BATCH, LR
from manta.terminal import aligned

Key = Literal["lr", "batch"]
REACH = 1.5  # times the largest size, or the longest run, beyond which a prediction is a guess
NAMES: dict[Key, str] = {"lr": "learning rate", "batch": "tokens per batch"}


@dataclasses.dataclass(frozen=True)
class Tried:
    """The best rates and batches of the points where several were tried."""

    points: dict[Key, list[Point]]
    laws: dict[Key, Power | None]
    """Power laws of compute; None: too few points."""

    @classmethod
    def of(cls, points: Sequence[Point]) -> "Tried":
        known: dict[Key, list[Point]] = {
            key: [p for p in points if getattr(p, key) is not None] for key in NAMES
        }
        laws = {
            key: power([p.flops for p in there], [getattr(p, key) for p in there])
            for key, there in known.items()
        }
        return cls(known, laws)

    def lines(self) -> Iterator[str]:
        for key, law in self.laws.items():
            if law is not None:
                yield (
                    f"best {NAMES[key]}: grows as C^{law.exponent:.3f} ({LEVEL:.0%} interval "
                    f"{law.exponent_low:.3f} to {law.exponent_high:.3f}, {law.points} points)"
                )
            there = self.points[key]
            if edges := sum(key in p.edges for p in there):
                yield (
                    f"the best {NAMES[key]} is the first or the last one tried in {edges} of "
                    f"{len(there)} points: better ones may be beyond"
                )

    def at(self, key: Key, flops: float) -> float | None:
        """The best value for this compute: by the power law, else that of the nearest point; None:
        nothing else was tried."""
        law, there = self.laws[key], self.points[key]
        if law is not None:
            return law.at(flops)[0]
        near = min(there, key=lambda p: abs(math.log(p.flops / flops)), default=None)
        return None if near is None else getattr(near, key)


def recommend(found: Fit, points: Sequence[Point], c: ScalingConfig, tried: Tried) -> Iterator[str]:
    """The lines about what the config's budget is best spent on."""
    budget = c.budget.in_flops
    assert budget is not None, "asked for only then"
    n = found.law.best_size(budget)
    d = budget / (6 * n)
    low, high = found.interval(lambda law: law.best_size(budget))
    loss, loss_low, loss_high = found.prediction(n, d)
    times = budget / max(p.flops for p in points)
    yield f"for {budget:.3g} FLOPs{_price(budget, c)}, {times:.3g} times the largest run's:"
    rows = [["", "best", f"{LEVEL:.0%} interval"]]
    rows.append(["parameters", short(n), f"{short(low)} to {short(high)}"])
    rows.append(
        ["tokens", short(d), f"{short(budget / (6 * high))} to {short(budget / (6 * low))}"]
    )
    rows.append(["tokens per parameter", f"{d / n:.3g}", ""])
    rows.append(["loss", f"{loss:.4f}", f"{loss_low:.4f} to {loss_high:.4f}"])
    for key, law in tried.laws.items():
        if law is not None:
            middle, least, most = law.at(budget)
            rows.append([NAMES[key], f"{middle:.3g}", f"{least:.3g} to {most:.3g}"])
    yield from aligned(rows)
    for key, law in tried.laws.items():
        if law is None:
            yield f"best {NAMES[key]}: {_unmeasured(key, tried)}"
    if c.ladder.sizes and math.isfinite(n):
        made = shape(c.model, nearest(c, n), c.ladder.grow)
        keys = ", ".join(f"{key}: {value}" for key, value in made.items())
        yield f"the model of the ladder's proportions that is nearest to it: {{{keys}}}"


def _unmeasured(key: Key, tried: Tried) -> str:
    """Why no power law says the best rate or batch."""
    there = tried.points[key]
    several = {"lr": "ladder.lr", "batch": "ladder.tokens_per_batch"}[key]
    if not there:
        return (
            "not measured, as no two runs of the same size and tokens differ in it; "
            f"{several}=[...] tries several"
        )
    return (
        f"not known as a power law, which takes the best ones of at least {FEWEST} budgets, and "
        f"there are {len(there)}"
    )


def _price(flops: float, c: ScalingConfig) -> str:
    """The hours and dollars of a budget, as far as they are known."""
    if c.budget.speed is None:
        return ""
    hours = flops / c.budget.speed / 3600
    price = c.budget.price_per_hour
    return f" ({hours:,.3g} hours" + (f", {hours * price:,.2f} dollars)" if price else ")")


def predict(
    found: Fit,
    c: ScalingConfig,
    folder: str,
    count: str,
    inputs: dict[str, str],
    tried: Tried,
    points: Sequence[Point],
) -> Iterator[str]:
    """Files the prediction that is asked for, with the config of the run that tests it if that is
    one of a ladder, and says so."""
    if c.predict.name is None:
        return
    n, d = c.predict.parameters, c.predict.tokens
    if d is None:
        budget = c.budget.in_flops
        assert budget is not None, "checked by the config"
        n = found.law.best_size(budget)
        d = budget / (6 * n)
    if not math.isfinite((n or 1.0) * d):
        raise ConfigError("predict: the law has no best size for this budget")
    run = None
    if c.ladder.sizes:
        run, n, d = predicted(c, n, d)
        run, n, d = predicted(c, n, d, _settings(c, 6 * n * d, tried))
    assert n is not None, "checked by the config"
    filed = predictions.file(folder, c.predict.name, c.home_folder, found, n, d, count, inputs)
    yield ""
    yield (
        f"filed on {filed.filed}: {filed.run}, with N = {filed.parameters:,.0f} and D = "
        f"{filed.tokens:,.0f}, will have a loss of {filed.loss:.4f} ({filed.level:.0%} interval "
        f"{filed.low:.4f} to {filed.high:.4f})"
    )
    yield from _reach(n, d, points, filed.run)
    if more := misfit(points, found.residuals).at(n, d):
        yield (
            f"beware: size and tokens together {'lower' if more < 0 else 'raise'} the loss of "
            "these runs in a way that the law has no term for; going on like that, "
            f"{filed.run} would be {more:+.1%} off. Budgets of more tokens per parameter bring a "
            "ladder to where the law holds"
        )
    if run is not None:
        file = layout.predicted_config(folder, filed.run)
        storage.write_bytes(file, configs.to_yaml(configs.differences(run)).encode())
        yield f"train it:  python jobs/pretrain.py {file}"
        yield f"check it:  python jobs/scaling.py name={c.name} check={filed.run}"


def _reach(n: float, d: float, points: Sequence[Point], run: str) -> Iterator[str]:
    """Says that a run is larger, or longer, than all runs that the law knows."""
    sizes, lengths = n / max(p.n for p in points), d / max(p.d for p in points)
    if max(sizes, lengths) > REACH:
        yield (
            f"beware: {run} has {sizes:.2g} times the parameters of the largest of these runs, and "
            f"{lengths:.2g} times the tokens of the longest; small ladders missed such runs by 5% "
            "to 9%, and by 3% with a few runs of that size on few tokens, and of those tokens with "
            "few parameters (ladder.most_flops keeps what they cost)"
        )


def _settings(c: ScalingConfig, flops: float, tried: Tried) -> dict[str, Any]:
    """The rate and the batch of a run of this compute, as far as a ladder tried several."""
    found: dict[str, Any] = {}
    lr, batch = tried.at("lr", flops), tried.at("batch", flops)
    if c.ladder.lr:
        found[LR] = float(f"{lr or c.ladder.lr[0]:.3g}")
    if batches := c.ladder.tokens_per_batch:
        best = batch or batches[0]
        found[BATCH] = min(batches, key=lambda size: abs(math.log(size / best)))
    return found
