"""The optimizer's state as pieces of weights, which any number of workers can put together.

At each ZeRO stage a rank has the state of some range of each (flattened) weight, in tensors of
DeepSpeed's own layout. A fragment is such a range. A checkpoint stores fragments by the name of
their weight, so any number of workers at any stage can read what another number of workers saved at
another stage, without a conversion. The files are safetensors: reading them runs no code.
"""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from manta import foreign, layout, storage
from manta.config import Count, Natural
from manta.errors import CheckpointError
from manta.train.checkpoints import tensors
from manta.train.step.engine import Engine, Fragment, to_cpu

RANK_FILE = re.compile(r"rank-(\d{5,9})\.safetensors")
Piece = tuple[int, int, str]  # start, size, file
MOST_RANKS = 1 << 20  # a damaged index may name more
STEP = "step"  # the only state that is a number and not a tensor of values: AdamW counts its steps


@dataclasses.dataclass
class State:
    """A rank's share of an optimizer's state, on the CPU.

    `values` has a fragment's values by weight and key, `starts` the fragment's position in each
    weight, and `steps` the number of steps that each weight has taken, if the optimizer counts it.
    """

    values: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    starts: dict[str, int] = dataclasses.field(default_factory=dict)
    steps: dict[str, float] = dataclasses.field(default_factory=dict)


def copy_state(engine: Engine, copy: Callable[[str, Tensor], Tensor] = to_cpu) -> State:
    """This rank's share of the state; all ranks' shares together are the whole state, once.
    `copy(name, values)` copies values to the CPU."""
    found = State()
    states = engine.optimizer.state
    mine = engine.fragments()
    if not engine.zero_stage:  # all ranks have the whole state: each takes a part
        mine = mine[engine.rank :: engine.world_size]
    for holder, parts in _by_holder(mine):
        with engine.at_hand(parts[0], write=False):
            for part, (key, value) in itertools.product(parts, states[holder].items()):
                if key == STEP:
                    found.steps[part.name] = float(value)
                else:
                    values = copy(f"{part.name} {key}", part.of(value))
                    found.values.setdefault(part.name, {})[key] = values
                found.starts[part.name] = part.start
    return found


def write(state: State, file: Path) -> dict[str, Any]:
    """Writes a rank's share; returns its entry for `index_of`."""
    tensors = {f"{n}:{k}": v for n, by_key in state.values.items() for k, v in by_key.items()}
    save_file(tensors, file)
    sizes = {n: {k: v.numel() for k, v in by_key.items()} for n, by_key in state.values.items()}
    return {"file": file.name, "starts": state.starts, "sizes": sizes, "steps": state.steps}


def index_of(shares: list[dict[str, Any]]) -> dict[str, Any]:
    """The index that says in which file each weight's state is, from the entries of all ranks, in
    their order: {weight: {"step": S, "parts": {key: [[start, size, file, count], ...]}}}.

    A part is a run of `count` pieces of one size, end to end, in the files of as many consecutive
    ranks from `file` on. So the index is no longer for more ranks, however many share a weight. (A
    part without `count` is one piece.)
    """
    index: dict[str, Any] = {}
    for share in shares:
        for name, start in share["starts"].items():
            entry = index.setdefault(name, {"step": share["steps"].get(name), "parts": {}})
            for key, size in share["sizes"].get(name, {}).items():
                parts = entry["parts"].setdefault(key, [])
                if parts and _follows(parts[-1], start, size, share["file"]):
                    parts[-1][3] += 1
                else:
                    parts.append([start, size, share["file"], 1])
    return index


def _follows(part: list[Any], start: int, size: int, file: str) -> bool:
    """Whether a piece is the next one of this run."""
    first, each, _, count = part
    return (each, first + each * count) == (size, start) and file == _file_of(part, count)


def _file_of(part: Sequence[Any], index: int) -> str:
    """The file of a run's piece number `index`."""
    number = RANK_FILE.fullmatch(part[2])
    return layout.rank_file(int(number[1]) + index) if number and index else part[2]


def pieces(part: Sequence[Any], low: int = 0, high: int | None = None) -> Iterator[Piece]:
    """The pieces of a run that have values from `low` up to `high` (None: up to its end)."""
    start, size, _, *more = part
    count = more[0] if more else 1
    last = count if high is None else min(count, -(-(high - start) // size))
    for index in range(max(0, (low - start) // size), last):
        yield start + index * size, size, _file_of(part, index)


@dataclasses.dataclass
class _Entry:
    """What the index says of one weight; see `index_of`."""

    step: float | None
    parts: dict[str, list[tuple[Natural, Count, str, Count] | tuple[Natural, Count, str]]]


def read_index(path: str) -> dict[str, Any]:
    """The index of the checkpoint at `path`.

    Raises:
        CheckpointError: it is missing or damaged, or names a file that is not a rank's.
    """
    file = storage.join(path, layout.OPTIMIZER_INDEX)
    found = foreign.read_json(file, dict[str, _Entry], CheckpointError)
    index = {name: {"step": entry.step, "parts": entry.parts} for name, entry in found.items()}
    for _, (_, _, name, *count) in _runs(index):
        is_run = count not in ([], [1])
        is_a_name = RANK_FILE.fullmatch(name) if is_run else foreign.is_plain_name(name)
        if "/" in name or not is_a_name or (is_run and count[0] > MOST_RANKS):
            raise CheckpointError(f"{file}: {foreign.line(name)!r} is no file of a rank")
    return index


def check_index(path: str) -> None:
    """Checks that the files of the checkpoint's ranks have each part that its index names.

    Raises:
        CheckpointError: a file or a part is missing, twice there, or has another size.
    """
    index = read_index(path)
    folder = storage.join(path, layout.OPTIMIZER)

    @functools.cache
    def header(file: str) -> dict[str, tensors.Entry]:
        return tensors.header(storage.join(folder, file))

    for name, entry in index.items():
        for key, parts in entry["parts"].items():
            what = f"{foreign.line(name)}'s {foreign.line(key)}"
            end = 0
            for start, size, file in itertools.chain(*map(pieces, sorted(parts))):
                found = header(file).get(f"{name}:{key}")
                if start != end or found is None or found.shape != (size,):
                    raise CheckpointError(
                        f"{storage.join(folder, file)}: does not have the values {start} to "
                        f"{start + size} of {what}, of which the files before it have {end}: the "
                        "checkpoint is damaged"
                    )
                end += size
            if not parts:
                raise CheckpointError(
                    f"{path}: {layout.OPTIMIZER_INDEX} has no part of {what}: the checkpoint is "
                    "damaged"
                )


def files_for(engine: Engine, index: dict[str, Any]) -> set[str]:
    """The files that contain this rank's fragments."""
    return {
        file
        for fragment in engine.fragments()
        for parts in index.get(fragment.name, {"parts": {}})["parts"].values()
        for (_, _, file), *_ in _overlaps(fragment, parts)
    }


def load_state(engine: Engine, index: dict[str, Any], folder: Path) -> None:
    """Reads this rank's fragments from the files in `folder`, whichever ranks wrote them.

    Raises:
        CheckpointError: part of a weight's state is missing.
    """
    states = engine.optimizer.state
    with contextlib.ExitStack() as stack:

        @functools.cache
        def opened(file: str) -> Any:
            return stack.enter_context(safe_open(folder / file, framework="pt"))

        for holder, parts in _by_holder(engine.fragments()):
            with engine.at_hand(parts[0], write=True):
                states[holder] = state = {}
                for part in parts:
                    entry = index.get(part.name, {"step": None, "parts": {}})
                    if entry["step"] is not None:
                        state[STEP] = torch.tensor(
                            entry["step"], dtype=torch.float32, device=holder.device
                        )
                    for key, saved in entry["parts"].items():
                        if key not in state:
                            state[key] = torch.zeros_like(holder.detach())
                        target, read = part.of(state[key]), 0
                        for (start, size, file), low, high in _overlaps(part, saved):
                            values = opened(file).get_slice(f"{part.name}:{key}")
                            if values.get_shape() != [size]:
                                break
                            values = values[low - start : high - start]
                            target[low - part.start : high - part.start] = values
                            read += high - low
                        if read != part.size:
                            raise CheckpointError(
                                f"{folder}: holds {read} of {part.size} values of {part.name}'s "
                                f"{key}: the checkpoint is damaged"
                            )


def whole_state(index: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The whole state of each weight, flat, by "WEIGHT:KEY", whichever ranks saved it."""
    loaded = {file: tensors.load(folder / file) for file in files_in(index)}
    return {
        f"{name}:{key}": torch.cat(
            [
                loaded[file][f"{name}:{key}"]
                for _, _, file in itertools.chain(*map(pieces, sorted(parts)))
            ]
        )
        for name, entry in index.items()
        for key, parts in entry["parts"].items()
    }


def files_in(index: dict[str, Any]) -> set[str]:
    return {file for _, run in _runs(index) for _, _, file in pieces(run)}


def _runs(index: dict[str, Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Each run of an index, with the name of its weight."""
    for name, entry in index.items():
        for parts in entry["parts"].values():
            for part in parts:
                yield name, part


def _overlaps(part: Fragment, saved: list[Sequence[Any]]) -> Iterator[tuple[Piece, int, int]]:
    """Each saved piece that overlaps this fragment, with start and end of the overlap."""
    end = part.start + part.size
    for piece in itertools.chain(*(pieces(run, part.start, end) for run in saved)):
        low, high = max(piece[0], part.start), min(piece[0] + piece[1], end)
        if low < high:
            yield piece, low, high


def _by_holder(parts: list[Fragment]) -> list[tuple[Tensor, list[Fragment]]]:
    found: dict[int, tuple[Tensor, list[Fragment]]] = {}
    for part in parts:
        found.setdefault(id(part.holder), (part.holder, []))[1].append(part)
    return list(found.values())
