"""A person's view of a run's checkpoints: list, verify, compare, prune."""

import dataclasses
import time
from typing import Any, Literal

import torch

from manta import config as configs
from manta import layout, ownership, storage
from manta.config import config
from manta.errors import CheckpointError, ConfigError
from manta.storage import HomeConfig
from manta.terminal import line, named
from manta.train.checkpoints import checkpoint, fragments
from manta.train.checkpoints.checkpoint import CheckpointConfig


@config
class CheckpointsConfig(HomeConfig):
    run: str = "quickstart"
    """A run's name or folder."""
    action: Literal["list", "verify", "compare", "prune"] = "list"
    """What to do. list: shows each checkpoint with its size; verify: reads every file and checks
    its sha256; compare: shows how two checkpoints differ; prune: deletes those that
    `checkpoint.keep`, `keep_every` and `keep_best` do not keep."""
    steps: tuple[int, ...] = ()
    """Steps whose checkpoints are meant; for compare, one (the other is the newest) or two. (): all
    steps."""
    other: str | None = None
    """compare: a run's name or folder whose checkpoints come second; null: the same run."""
    checkpoint: CheckpointConfig = CheckpointConfig()

    def problems(self) -> list[str]:
        found = []
        if self.other is not None and self.action != "compare":
            found.append(f"other={self.other} is for action=compare: omit it or set action=compare")
        if self.action == "compare" and len(self.steps) not in (1, 2):
            found.append(f"action=compare takes one or two steps, not {len(self.steps)}: steps=[5]")
        if self.action == "prune" and self.steps:
            found.append(f"steps={list(self.steps)}: action=prune goes by checkpoint.keep; omit it")
        return found


def report(c: CheckpointsConfig) -> list[str]:
    """Does what `c` asks for, and returns the lines to print.

    Raises:
        CheckpointError: the run has no checkpoint; or, for verify and compare, a checkpoint is
            damaged (verify reads all of them first).
        ConfigError: a step has no checkpoint.
    """
    run = _run(c, c.run)
    paths = _paths(run, c.steps if c.action in ("list", "verify") else ())
    if c.action == "list":
        return _list(paths)
    if c.action == "verify":
        return _verify(paths)
    if c.action == "prune":
        gone = checkpoint.prune(run, c.checkpoint)
        left = checkpoint.find(run)
        kept = [str(layout.step_of(path)) for path in left]
        links = [f"left {path}: a symbolic link" for path in left if ownership.is_link(path)]
        return [*(f"deleted {path}" for path in gone), *links, f"kept: steps {', '.join(kept)}"]
    others = _paths(_run(c, c.other or c.run), c.steps[1:])
    return compare(_paths(run, c.steps[:1])[0], others[-1])


def _run(c: CheckpointsConfig, name: str) -> str:
    home = c.home_folder
    for folder in checkpoint.candidates(name, home):
        if checkpoint.find(folder):
            return folder
    raise checkpoint.not_found(f"run={name}", home)


def _paths(run: str, steps: tuple[int, ...]) -> list[str]:
    paths = {layout.step_of(path): path for path in checkpoint.find(run)}
    missing = [step for step in steps if step not in paths]
    if missing:
        there = named([str(step) for step in paths])
        given = named([str(step) for step in missing])
        raise ConfigError(f"steps=[{given}]: {run} has no such checkpoint; it has {there}")
    return [paths[step] for step in steps] or list(paths.values())


def _list(paths: list[str]) -> list[str]:
    lines = ["    step     val loss   workers  ZeRO        MB  saved"]
    for path in paths:
        try:
            state = checkpoint.load_state(path)
        except Exception as e:
            lines.append(f"{layout.step_of(path):>8}  {line(str(e))}")
            continue
        files = [item for item in storage.list_files(path) if item.is_file]
        size = sum(item.size for item in files) / 1e6
        saved = storage.info(storage.join(path, layout.MANIFEST)).mtime
        loss = "-" if state.val_loss is None else f"{state.val_loss:.4f}"
        lines.append(
            f"{state.step:>8}  {loss:>11}  {state.world_size:>8}  {state.zero_stage:>4}  "
            f"{size:>8,.1f}  {saved:%Y-%m-%d %H:%M:%S}"
        )
    return lines


def _verify(paths: list[str]) -> list[str]:
    lines, damaged = [], 0
    for path in paths:
        started = time.perf_counter()
        try:
            checkpoint.verify(path)
            lines.append(f"whole    {path} ({time.perf_counter() - started:.1f} s)")
        except CheckpointError as e:
            damaged += 1
            lines.append(f"damaged  {e}")
    if damaged:
        raise CheckpointError(
            named([text for text in lines if text.startswith("damaged")], between="; ")
            + "; a run that resumes sets these aside and takes the newest whole one"
        )
    return lines


def compare(a: str, b: str) -> list[str]:
    """Lines that say how two checkpoints differ: weights, optimizer's state (an imported one has
    none), training state and model."""
    lines = [f"a  {a}", f"b  {b}"]
    for path in (a, b):
        checkpoint.verify(path)
    lines += _differences("weights", _weights(a), _weights(b))
    lines += _differences("optimizer", _optimizer(a), _optimizer(b))
    was, is_now = (dataclasses.asdict(checkpoint.load_state(path)) for path in (a, b))
    for key in was:
        if was[key] != is_now[key] and key not in ("spikes", "data"):
            lines.append(f"state      {key}: {was[key]} and {is_now[key]}")
    models = [configs.to_dict(checkpoint.load_model_config(path)) for path in (a, b)]
    for key in models[0]:
        if models[0][key] != models[1][key]:
            lines.append(f"model      {key}: {models[0][key]} and {models[1][key]}")
    return lines


def _weights(path: str) -> dict[str, torch.Tensor]:
    adapter = checkpoint.load_adapter(path)
    return checkpoint.own_weights(path) | (adapter.weights if adapter else {})


def _optimizer(path: str) -> dict[str, torch.Tensor] | None:
    """The whole state of the optimizer; None if the checkpoint has none, as an imported one."""
    if layout.OPTIMIZER_INDEX not in checkpoint.files_of(path):
        return None
    index = fragments.read_index(path)
    names = [f"{layout.OPTIMIZER}/{file}" for file in fragments.files_in(index)]
    with checkpoint.local(path, names) as folder:
        return fragments.whole_state(index, folder / layout.OPTIMIZER)


def _differences(what: str, a: dict[str, Any] | None, b: dict[str, Any] | None) -> list[str]:
    if a is None or b is None:
        where = "neither has" if a is b else f"only {'b' if a is None else 'a'} has"
        return [f"{what:<9}  {where} one: an imported checkpoint is without"]
    only = sorted(a.keys() ^ b.keys())
    if only:
        return [f"{what:<9}  {len(only)} are in only one of them: {named(only, most=3)}"]
    shapes = [name for name in a if a[name].shape != b[name].shape]
    if shapes:
        return [f"{what:<9}  {len(shapes)} have different shapes: {named(shapes, most=3)}"]
    unequal = [name for name in a if not torch.equal(a[name], b[name])]
    if not unequal:
        return [f"{what:<9}  identical, bit for bit ({len(a)} tensors)"]
    distances = {n: ((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-30)).item() for n in unequal}
    worst = max(distances, key=lambda n: distances[n])
    return [
        f"{what:<9}  {len(unequal)} of {len(a)} tensors differ; {worst} most, by "
        f"{distances[worst]:.2e} of its norm"
    ]
