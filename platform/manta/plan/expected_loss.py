"""The loss that a scaling law in the home expects of a run."""

import dataclasses
from typing import Any

from manta import foreign, layout, storage
from manta.config import PositiveFloat
from manta.errors import ConfigError, DataError
from manta.foreign import Finite
from manta.model.cost import parameters
from manta.model.shape import ModelConfig
from manta.scaling.fit import Law


@dataclasses.dataclass
class _Figure:
    value: Finite


@dataclasses.dataclass
class _Point:
    n: PositiveFloat
    d: PositiveFloat


@dataclasses.dataclass
class _Fit:
    law: dict[str, _Figure]
    count: str
    points: list[_Point]


@dataclasses.dataclass(frozen=True)
class Expected:
    loss: float | None
    """Nats per token; None: there is no law."""
    why: str
    """The law, and what is doubtful about it; or why there is none."""

    def tree(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def expected(home: str, law: str | None, model: ModelConfig, tokens: int) -> Expected:
    """The loss that the law of a study in the home expects of `model` after so many tokens.

    Raises:
        MantaError: the study that is named has no law, or its file is damaged.
    """
    folder = storage.join(home, "scaling")
    if law is None:
        there = [
            item.base_name
            for item in storage.list_files(folder, recursive=False)
            if storage.exists(storage.join(folder, item.base_name, layout.LAW))
        ]
        if not there:
            return Expected(None, "no scaling law is in the home (jobs/scaling.py fits one)")
        if len(there) > 1:
            names = ", ".join(sorted(there))
            return Expected(None, f"several laws are in the home: choose one with law= ({names})")
        law = there[0]
    path = storage.join(layout.scaling_folder(home, law), layout.LAW)
    if not storage.exists(path):
        raise ConfigError(
            f"law={law}: {path} is missing; python jobs/scaling.py name={law} fits it"
        )
    fit = foreign.read_json(path, _Fit, DataError, "fit the law again")
    found = parameters(model)
    n = (
        found.total
        if fit.count != "no_embeddings"
        else found.total - (found.embedding + found.positions)
    )
    try:
        figures = Law(**{key: figure.value for key, figure in fit.law.items()})
    except TypeError:
        raise DataError(f"{path}: its law is not E, A, B, alpha, beta; fit it again") from None
    doubts = []
    for what, value, there_are in (
        ("parameters", n, [p.n for p in fit.points]),
        ("tokens", tokens, [p.d for p in fit.points]),
    ):
        if there_are and not min(there_are) <= value <= max(there_are):
            doubts.append(f"its runs have {min(there_are):.3g} to {max(there_are):.3g} {what}")
    why = f"law {law}, of {len(fit.points)} runs, for data like theirs"
    return Expected(float(figures.loss(n, tokens)), "; ".join([why, *doubts]))
