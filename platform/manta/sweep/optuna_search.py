"""Optuna's TPE, as a function: the settings to try next follow from those tried, and a seed.

A study is made again for each suggestion, so that nothing has to be kept but the sweep's journal.
"""

import importlib.util
import math
import warnings
from typing import Any

import numpy as np

from manta.errors import ConfigError
from manta.sweep.search import Tried
from manta.sweep.space import Dimension, Settings


def require() -> None:
    """Raises ConfigError if Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "sweep.search=optuna needs the package optuna: pip install 'manta[optuna]', or set "
            "sweep.search=random"
        )


def suggest(space: tuple[Dimension, ...], tried: list[Tried], seed: int, index: int) -> Settings:
    """The settings that TPE suggests as number `index`. The trials without a loss count as if they
    were bad (constant liar), so that lanes at work do not all try the same."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental features: multivariate is TPE's default
        (mixed,) = np.random.SeedSequence([seed, index]).generate_state(1)
        sampler = optuna.samplers.TPESampler(seed=int(mixed))
        study = optuna.create_study(sampler=sampler)
        distributions = {d.key: _distribution(d) for d in space}
        known = [t.losses[max(t.losses)] for t in tried if t.losses]
        worst = max([loss for loss in known if math.isfinite(loss)], default=0.0) + 1.0
        for one in tried:
            study.add_trial(_frozen(optuna, one, distributions, space, worst))
        asked = study.ask(distributions)
    return {d.key: _value(d, asked.params[d.key]) for d in space}


def _frozen(
    optuna: Any,
    tried: Tried,
    distributions: dict[str, Any],
    space: tuple[Dimension, ...],
    worst: float,
) -> Any:
    """A trial as Optuna keeps it. One that is paused counts as pruned: TPE ranks these by how far
    they got, then by their loss."""
    states = optuna.trial.TrialState
    losses = {t: v if math.isfinite(v) else worst for t, v in sorted(tried.losses.items())}
    has_failed = any(not math.isfinite(loss) for loss in tried.losses.values())
    state = states.RUNNING
    if tried.is_complete or has_failed:
        state = states.COMPLETE
    elif losses:
        state = states.PRUNED
    params = {d.key: _parameter(d, tried.settings[d.key]) for d in space}
    return optuna.trial.create_trial(
        state=state,
        params=params,
        distributions=distributions,
        value=list(losses.values())[-1] if state == states.COMPLETE else None,
        intermediate_values=losses,
    )


def _distribution(d: Dimension) -> Any:
    from optuna import distributions

    if d.kind == "choice":
        # Numbers of the values, as Optuna takes no lists or dicts for a category.
        return distributions.CategoricalDistribution(range(len(d.values)))
    if d.kind == "int_uniform":
        return distributions.IntDistribution(int(d.low), int(d.high))
    return distributions.FloatDistribution(d.low, d.high, log=d.kind == "log_uniform")


def _parameter(d: Dimension, value: Any) -> Any:
    return d.values.index(value) if d.kind == "choice" else value


def _value(d: Dimension, parameter: Any) -> Any:
    return d.values[parameter] if d.kind == "choice" else d.nearest(parameter)
