"""Whether a run fits into a worker's memory by the cost model, and what would.

A plan, a run that chooses its micro batch and a run that is out of memory say the same: they all
ask `verdict`.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from manta.errors import ConfigError
from manta.model.memory import GIB, USABLE, Costs, Setup, costs, gib
from manta.model.recomputation import Recompute
from manta.train.settings import TrainConfig, memory_setup

MOST_WAYS = 4
WORKERS = (2, 4, 8, 16, 32, 64, 128, 256)
MODES: tuple[Recompute, ...] = ("none", "selective", "full")
SHORTEST = 128  # tokens of the shortest sequences that are named as a way
# How much memory a worker had that ran out of it is not known. A change that saves less than this
# share of what it needs might not help.
SAVED = 0.2

Keys = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Way:
    """A change of a run's config that makes it fit."""

    keys: Keys
    peak: int
    """Bytes of the most that a worker then holds at once."""

    def __str__(self) -> str:
        changes = " ".join(f"{key}={value}" for key, value in self.keys.items())
        return f"{changes} ({gib(self.peak)})"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The memory of the fullest worker, and whether it fits."""

    setup: Setup
    costs: Costs
    usable: float | None
    """Bytes of the device that the worker may use; None: not known."""
    ways: tuple[Way, ...] = ()
    """Changes that make it fit, the cheapest first; none if it fits."""

    @property
    def fits(self) -> bool | None:
        return None if self.usable is None else self.costs.peak <= self.usable

    @property
    def needed(self) -> float:
        """Bytes of a device on which it fits as it is."""
        return self.costs.peak / (USABLE if self.setup.device == "cuda" else 1.0)

    @property
    def need(self) -> str:
        """The need of a worker, part by part."""
        found = self.costs.parts()
        whole = {"peak of a step", "on the host"}
        parts = [
            f"{name} {size / GIB:.2f}"
            for name, size in found.items()
            if size > 0 and name not in whole
        ]
        size = self.setup.micro_batch_size
        return f"micro_batch_size={size} needs {gib(self.costs.peak)} ({', '.join(parts)})"

    @property
    def would(self) -> str:
        """The ways in a line, or what is left if there are none."""
        device = "a device" if self.setup.device == "cuda" else "a worker's share"
        larger = f"{device} of at least {gib(self.needed, up=True)}"
        if not self.ways:
            return f"no setting makes it fit: take a smaller model, or {larger}"
        ways = "; ".join(map(str, self.ways))
        return f"would fit, the cheapest first: {ways}; or {larger}"

    @property
    def problem(self) -> str:
        """A line that says what is needed, what there is and what would fit."""
        assert self.usable is not None
        return f"{self.need}, and a worker may use {gib(self.usable)}; {self.would}"


def verdict(
    c: TrainConfig, s: Setup, usable: float | None, most_workers: int | None = None
) -> Verdict:
    """The verdict on a run of config `c`, whose memory `s` decides. `most_workers`: how many the
    machines have devices for; None: as many as wanted."""
    found = costs(s)
    if usable is None or found.peak <= usable:
        return Verdict(s, found, usable)
    return Verdict(s, found, usable, tuple(ways(c, s, usable, most_workers)))


def largest_micro_batch(c: TrainConfig, s: Setup, usable: float) -> int:
    """The largest micro batch of the run that fits in `usable` bytes, whatever that of `s` is.

    Raises:
        ConfigError: not even the smallest one fits; the message says what would.
    """
    sized = [dataclasses.replace(s, micro_batch_size=n) for n in c.micro_batches]
    fitting = [it.micro_batch_size for it in sized if costs(it).peak <= usable]
    if not fitting:
        raise ConfigError(verdict(c, sized[0], usable).problem)
    return max(fitting)


def needs_less(c: TrainConfig, s: Setup) -> str:
    """A line about a run that ran out of memory: what it needs by the cost model, and what needs
    clearly less."""
    found = verdict(c, s, (1 - SAVED) * costs(s).peak)
    ways = "; ".join(map(str, found.ways)) or "a smaller model, or devices with more memory"
    return f"by the cost model {found.need}; needs clearly less, the cheapest first: {ways}"


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
    alone = [_first(c, s, kind, usable) for kind in kinds(c, s, most_workers).values()]
    if not any(alone):
        alone = [_together(c, s, usable, most_workers)]
    return [way for way in alone if way is not None][:MOST_WAYS]


def kinds(c: TrainConfig, s: Setup, most_workers: int | None) -> dict[str, Iterator[Keys]]:
    """The kinds of changes that leave the training as it is, the cheapest first; in each, the
    mildest first."""
    return {
        "smaller": _smaller(c, s),
        "sharded": _sharded(s),
        "recomputed": _recomputed(s),
        "spread": _spread(c, s, most_workers),
        "moved": _moved(s),
    }


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
    """More workers, which share what ZeRO shards, as far as the batches divide. None on CPUs, where
    more workers share the memory of one machine."""
    for n in WORKERS if s.device == "cuda" else ():
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
    """Several changes at once, the mildest that add up; last, another training: shorter sequences,
    then fewer blocks."""
    keys: Keys = {}
    if min(c.micro_batches) < s.micro_batch_size:
        keys["micro_batch_size"] = min(c.micro_batches)
    for full in (False, True):
        if full and not s.model.is_recurrent:
            keys["activation_checkpointing"] = "full"
        c2, s2 = changed(c, s, keys)
        tried = [_sharded(s2), *([] if full else [_recomputed(s2)])]
        tried += [_spread(c2, s2, most_workers), _moved(s2)] if full else []
        for kind in tried:
            way = _first(c, s, ({**keys, **more} for more in kind), usable)
            if way is not None:
                return way
    last = (*_shorter(c), *_fewer(s))
    return _first(c, s, ({**keys, **more} for more in last), usable)


def _shorter(c: TrainConfig) -> Iterator[Keys]:
    """Sequences of half the length, of a quarter, ...; the batch stays as many tokens."""
    length = c.sequence_length
    while length % 2 == 0 and length // 2 >= SHORTEST:
        length //= 2
        yield {"seq_len": length}


def _fewer(s: Setup) -> Iterator[Keys]:
    """Fewer blocks."""
    for layers in range(s.model.n_layer - 1, 0, -1):
        yield {"model.n_layer": layers}
