"""Whether a run fits into a device's memory by the cost model, and what would fit."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from manta.model.memory import Costs, Setup, costs
from manta.model.recomputation import Recompute
from manta.train.settings import TrainConfig, memory_setup

MOST_WAYS = 4
WORKERS = (2, 4, 8, 16, 32, 64, 128, 256)
MODES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclasses.dataclass(frozen=True)
class Way:
    """A change of a run's config that makes it fit."""

    keys: dict[str, Any]
    peak: int
    """Bytes of the most that a worker then holds at once."""

    @property
    def text(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.keys.items())


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The memory of the fullest worker, and whether it fits."""

    costs: Costs
    usable: float | None
    """Bytes of the device that the worker may use; None: not known."""
    ways: tuple[Way, ...] = ()
    """Changes that make it fit, the cheapest first; none if it fits."""

    @property
    def fits(self) -> bool | None:
        return None if self.usable is None else self.costs.peak <= self.usable


def verdict(
    c: TrainConfig, setup: Setup, usable: float | None, most_workers: int | None
) -> Verdict:
    """The verdict on a run of config `c`, whose memory `setup` decides. `most_workers`: how many
    the machines have devices for; None: as many as wanted."""
    found = costs(setup)
    if usable is None or found.peak <= usable:
        return Verdict(found, usable)
    return Verdict(found, usable, tuple(ways(c, setup, usable, most_workers)))


Keys = dict[str, Any]


def changed(c: TrainConfig, s: Setup, keys: Keys) -> tuple[TrainConfig, Setup]:
    """A run's config and what decides its memory, with these keys changed."""
    for key, value in keys.items():
        group, _, name = key.rpartition(".")
        if group:
            inner = dataclasses.replace(getattr(c, group), **{name: value})
            c = dataclasses.replace(c, **{group: inner})
        else:
            c = dataclasses.replace(c, **{name: value})
    model = s.model
    if "model.n_layer" in keys:
        model = dataclasses.replace(model, n_layer=c.model.n_layer)
    made = memory_setup(c, model, s.dtype, s.device, s.compiled)
    size = keys.get("micro_batch_size", s.micro_batch_size)
    return c, dataclasses.replace(made, micro_batch_size=size)


def ways(c: TrainConfig, s: Setup, usable: float, most_workers: int | None) -> list[Way]:
    """The changes that make a run fit, of each kind the mildest, at most MOST_WAYS; the cheapest
    first. Where no single change does, changes that add up."""
    kinds = (_smaller(c, s), _sharded(s), _recomputed(s), _spread(c, s, most_workers), _moved(s))
    alone = [_first(c, s, kind, usable) for kind in kinds]
    if not any(alone):
        alone = [_together(c, s, usable, most_workers)]
    return [way for way in alone if way is not None][:MOST_WAYS]


def _first(c: TrainConfig, s: Setup, tried: Iterable[Keys], usable: float) -> Way | None:
    """The first of these changes that fits."""
    for keys in tried:
        if (peak := costs(changed(c, s, keys)[1]).peak) <= usable:
            return Way(keys, peak)
    return None


def _smaller(c: TrainConfig, s: Setup) -> Iterator[Keys]:
    """Smaller micro batches: the same training, a little slower."""
    for n in reversed(c.micro_batches):
        if n < s.micro_batch_size:
            yield {"micro_batch_size": n}


def _sharded(s: Setup) -> Iterator[Keys]:
    """More of ZeRO, on the same workers."""
    if s.num_workers > 1:
        for stage in range(s.zero_stage + 1, _top(s) + 1):
            yield {"zero_stage": stage}


def _top(s: Setup) -> int:
    return 2 if s.optimizer_kind == "muon" else 3


def _recomputed(s: Setup) -> Iterator[Keys]:
    """Activations that are computed again: up to a third more work."""
    if not s.model.is_recurrent:
        for mode in MODES[MODES.index(s.activation_checkpointing) + 1 :]:
            yield {"activation_checkpointing": mode}


def _spread(c: TrainConfig, s: Setup, most_workers: int | None) -> Iterator[Keys]:
    """More workers, which share what ZeRO shards, as far as the batches divide."""
    for n in WORKERS:
        unit = c.sequence_length * n
        if n <= s.num_workers or (most_workers is not None and n > most_workers):
            continue
        if any(size % unit for _, size in c.batch_sizes):
            continue
        shares = [size // unit for _, size in c.batch_sizes]
        fitting = range(1, s.micro_batch_size + 1)
        size = max(k for k in fitting if not any(share % k for share in shares))
        keys: Keys = {"num_workers": n}
        if size != s.micro_batch_size:
            keys["micro_batch_size"] = size
        for stage in range(s.zero_stage, _top(s) + 1):
            yield {**keys, "zero_stage": stage} if stage != s.zero_stage else keys


def _moved(s: Setup) -> Iterator[Keys]:
    """The optimizer, then the weights too, in the host's memory: much slower."""
    if s.device != "cuda" or s.optimizer_kind == "muon":
        return
    keys: Keys = {"engine.offload_optimizer": "cpu"}
    if not s.offload_optimizer:
        yield keys if s.zero_stage else {**keys, "zero_stage": 1}
    if not s.offload_parameters:
        both: Keys = {**keys, "engine.offload_parameters": "cpu"}
        yield both if s.zero_stage == 3 else {**both, "zero_stage": 3}


def _together(c: TrainConfig, s: Setup, usable: float, most_workers: int | None) -> Way | None:
    """Several changes at once, the mildest that add up; last, fewer blocks."""
    keys: Keys = {}
    if min(c.micro_batches) < s.micro_batch_size:
        keys["micro_batch_size"] = min(c.micro_batches)
    for full in (False, True):
        if full and not s.model.is_recurrent:
            keys["activation_checkpointing"] = "full"
        c2, s2 = changed(c, s, keys)
        kinds = [_sharded(s2), *([] if full else [_recomputed(s2)])]
        kinds += [_spread(c2, s2, most_workers), _moved(s2)] if full else []
        for kind in kinds:
            way = _first(c, s, ({**keys, **more} for more in kind), usable)
            if way is not None:
                return way
    fewer = ({**keys, "model.n_layer": n} for n in range(s.model.n_layer - 1, 0, -1))
    return _first(c, s, fewer, usable)
