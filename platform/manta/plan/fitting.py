"""Whether a run fits into a device's memory by the cost model, and what would fit."""

import dataclasses
from collections.abc import Iterator

from manta.model.memory import Costs, Setup, costs
from manta.model.recomputation import Recompute
from manta.train.settings import TrainConfig

MOST_WAYS = 4
WORKERS = (2, 4, 8, 16, 32, 64, 128, 256)
MODES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclasses.dataclass(frozen=True)
class Way:
    """A change of a run's config that makes it fit."""

    keys: dict[str, object]
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


def ways(c: TrainConfig, s: Setup, usable: float, most_workers: int | None) -> list[Way]:
    """The changes that make a run fit, of each kind the mildest, at most MOST_WAYS; the cheapest
    first. Where no single change does, changes that add up."""
    kinds = (_smaller(c, s), _sharded(s), _recomputed(s), _spread(c, s, most_workers), _moved(s))
    alone = [next(_fitting(kind, usable), None) for kind in kinds]
    found = [way for way in alone if way is not None]
    return (found or list(_together(c, s, usable, most_workers)))[:MOST_WAYS]


Changed = tuple[dict[str, object], Setup]


def _fitting(tried: Iterator[Changed], usable: float) -> Iterator[Way]:
    for keys, setup in tried:
        if (peak := costs(setup).peak) <= usable:
            yield Way(keys, peak)


def _smaller(c: TrainConfig, s: Setup) -> Iterator[Changed]:
    """Smaller micro batches: the same training, a little slower."""
    for n in reversed(c.micro_batches):
        if n < s.micro_batch_size:
            yield {"micro_batch_size": n}, dataclasses.replace(s, micro_batch_size=n)


def _sharded(s: Setup) -> Iterator[Changed]:
    """More of ZeRO, on the same workers."""
    if s.num_workers == 1:
        return
    for stage in range(s.zero_stage + 1, _top(s) + 1):
        yield {"zero_stage": stage}, dataclasses.replace(s, zero_stage=stage)


def _top(s: Setup) -> int:
    return 2 if s.optimizer_kind == "muon" else 3


def _recomputed(s: Setup) -> Iterator[Changed]:
    """Activations that are computed again: up to a third more work."""
    if s.model.is_recurrent:
        return
    for mode in MODES[MODES.index(s.activation_checkpointing) + 1 :]:
        changed = dataclasses.replace(s, activation_checkpointing=mode)
        yield {"activation_checkpointing": mode}, changed


def _spread(c: TrainConfig, s: Setup, most_workers: int | None) -> Iterator[Changed]:
    """More workers, which share what ZeRO shards, as the batch divides."""
    for n in WORKERS:
        if n <= s.num_workers or (most_workers is not None and n > most_workers):
            continue
        share = c.tokens_per_batch // c.sequence_length // n
        sizes = [size // (c.sequence_length * n) for _, size in c.batch_sizes]
        if any(size % (c.sequence_length * n) for _, size in c.batch_sizes) or not share:
            continue
        size = max(k for k in range(1, s.micro_batch_size + 1) if not any(z % k for z in sizes))
        keys: dict[str, object] = {"num_workers": n}
        if size != s.micro_batch_size:
            keys["micro_batch_size"] = size
        for stage in range(s.zero_stage, _top(s) + 1):
            more = {"zero_stage": stage} if stage != s.zero_stage else {}
            changed = dataclasses.replace(s, num_workers=n, zero_stage=stage, micro_batch_size=size)
            yield {**keys, **more}, changed


def _moved(s: Setup) -> Iterator[Changed]:
    """The optimizer, then the weights too, in the host's memory: much slower."""
    if s.device != "cuda" or s.optimizer_kind == "muon":
        return
    if not s.offload_optimizer:
        stage = s.zero_stage or 1
        keys: dict[str, object] = {"engine.offload_optimizer": "cpu"}
        keys |= {} if s.zero_stage else {"zero_stage": 1}
        yield keys, dataclasses.replace(s, zero_stage=stage, offload_optimizer=True)
    if not s.offload_parameters:
        changed = dataclasses.replace(
            s, zero_stage=3, offload_optimizer=True, offload_parameters=True
        )
        more: dict[str, object] = {
            "engine.offload_optimizer": "cpu", "engine.offload_parameters": "cpu", "zero_stage": 3,
        }  # fmt: skip
        yield more, changed


def _together(c: TrainConfig, s: Setup, usable: float, most_workers: int | None) -> Iterator[Way]:
    """Several changes at once, from the mildest on; last, fewer blocks."""
    keys: dict[str, object] = {}
    least = min(c.micro_batches)
    if least < s.micro_batch_size:
        keys["micro_batch_size"], s = least, dataclasses.replace(s, micro_batch_size=least)
    for kind in (_sharded(s), _recomputed(s)):
        for more, changed in kind:
            if (peak := costs(changed).peak) <= usable:
                yield Way({**keys, **more}, peak)
                return
    for more, changed in _recomputed(s):
        if more == {"activation_checkpointing": "full"}:
            keys, s = {**keys, **more}, changed
    for kind in (_sharded(s), _spread(c, s, most_workers), _moved(s)):
        for way in _fitting(kind, usable):
            yield Way({**keys, **way.keys}, way.peak)
            return
    for layers in range(s.model.n_layer - 1, 0, -1):
        model = dataclasses.replace(s.model, n_layer=layers)
        if (peak := costs(dataclasses.replace(s, model=model)).peak) <= usable:
            yield Way({**keys, "model.n_layer": layers}, peak)
            return
