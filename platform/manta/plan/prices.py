"""Prices of machines, from a dated file: clusters/prices.yaml, or one of a person's own."""

import dataclasses
import datetime
from pathlib import Path

from manta.cluster.check import documents
from manta.config import PositiveFloat
from manta.errors import ClusterError, ConfigError
from manta.foreign import Whole, check, exact

PRICES = Path(__file__).resolve().parents[3] / "clusters" / "prices.yaml"


@exact
@dataclasses.dataclass
class Rates:
    """Dollars an hour."""

    on_demand: PositiveFloat | None = None
    spot: PositiveFloat | None = None


@exact
@dataclasses.dataclass
class Listed:
    """A kind of machine in the file of prices."""

    gpus: Whole = 0
    gpu: str | None = None
    gpu_memory_gib: PositiveFloat | None = None
    regions: dict[str, Rates] = dataclasses.field(default_factory=dict)
    read: datetime.date | None = None
    source: str | None = None


def load(given: str | None) -> dict[str, Listed]:
    """The machines in the file of prices, by their type.

    Raises:
        MantaError: the file cannot be read, or has something else in it.
    """
    file = Path(given) if given is not None else PRICES
    try:
        return check(documents.mapping(file), dict[str, Listed])
    except ClusterError as e:  # which names the file
        raise ConfigError(f"prices={e}; {PRICES} shows how it is written") from None
    except ValueError as e:
        raise ConfigError(f"prices={file}: {e}; {PRICES} shows how it is written") from None


def of(
    listed: Listed | None, instance: str, region: str | None, spot: bool, nodes: int
) -> tuple[float | None, str]:
    """Dollars an hour of so many machines, and where the price comes from. None: it is not known,
    and the text says which."""
    where = region or "a region that the cluster's file does not say"
    what = f"{instance} in {where}, {'spot' if spot else 'on demand'}"
    rates = listed.regions.get(region or "") if listed else None
    rate = None if rates is None else rates.spot if spot else rates.on_demand
    if listed is None or rate is None:
        return None, f"no price of {what} is in the file of prices"
    dated = f"read {listed.read} in {listed.source}"
    return nodes * rate, f"{nodes} x {what}: {rate:,.2f} an hour each, {dated}"
