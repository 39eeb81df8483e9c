"""How much of the differences between trials each key explains. Pure arithmetic.

The loss is taken as a sum of a part for each key: a number for each of its values, or a parabola if
it has many (over their logarithm where they are far apart). A key's importance is the share of the
variance that would be unexplained without its part, less what chance alone explains (omega squared,
Hays 1963; sums of squares of type II). What two keys do together counts as noise.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from manta.sweep.naming import many
from manta.sweep.space import Settings

FREE = 10  # trials more than the parts have numbers, from which on shares mean something
WIDE = 4.0  # the ratio of the largest to the smallest value, from which on logarithms are taken


@dataclasses.dataclass(frozen=True)
class Importances:
    """The share of each key, and what they are known from."""

    shares: dict[str, float]
    """A share for each key, from 0 to 1."""
    trials: int
    enough: int
    """The number of trials from which on the shares mean something."""


def importances(trials: Sequence[tuple[Settings, float]]) -> Importances | str:
    """The importances of the keys of some trials.

    Args:
        trials: the settings and the loss of each trial, at equal tokens. Repeats are trials too.

    Returns:
        The importances; a text that says why there are none.
    """
    keys = list(trials[0][0]) if trials else []
    y = np.array([loss for _, loss in trials])
    parts = {key: _part([settings[key] for settings, _ in trials]) for key in keys}
    parts = {key: part for key, part in parts.items() if part.shape[1]}
    count = 1 + sum(part.shape[1] for part in parts.values())
    if len(trials) <= count:
        return f"{many(len(trials), 'trial')} ended well, and the keys have {count} numbers to find"
    total = float(np.sum((y - y.mean()) ** 2))
    if not parts or not total:
        return "all losses are the same"
    whole = _unexplained(y, list(parts.values()))
    noise = whole / (len(y) - count)
    shares = dict.fromkeys(keys, 0.0)
    for key, part in parts.items():
        without = _unexplained(y, [p for k, p in parts.items() if k != key])
        share = (without - whole - part.shape[1] * noise) / (total + noise)
        shares[key] = min(1.0, max(0.0, share))
    return Importances(shares, len(trials), count + FREE)


def _part(values: list[Any]) -> np.ndarray:
    """The columns that stand for a key: fewer than it has values."""
    distinct = list({repr(v): v for v in values}.values())
    is_numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in distinct)
    if is_numeric and 2 * len(distinct) > len(values):
        x = np.array(values, float)
        if x.min() > 0 and x.max() / x.min() >= WIDE:
            x = np.log(x)
        x = x - x.mean()
        x = x / (np.abs(x).max() or 1.0)
        columns = [x, x**2]
    else:
        columns = [np.array([repr(v) == repr(one) for v in values], float) for one in distinct]
    return np.array(columns[: len(distinct) - 1]).reshape(-1, len(values)).T


def _unexplained(y: np.ndarray, parts: list[np.ndarray]) -> float:
    """The sum of squares that the sum of some parts leaves."""
    design = np.concatenate([np.ones((len(y), 1)), *parts], 1)
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    return float(math.fsum((y - design @ solution) ** 2))
