"""The places of runs and their checkpoints: by name, by path, and all of them."""

import contextlib
from collections.abc import Iterator

from pyarrow import fs as pafs

from manta import layout, storage
from manta.config import name_of_run
from manta.errors import CheckpointError, ConfigError
from manta.terminal import line, named

MOST_PARTS = 3  # of a run's name, as in a/b/c, when `names_of_runs` looks for runs


def find(run: str) -> list[str]:
    """The run's committed checkpoints, oldest first."""
    return [path for path in _steps(run) if storage.exists(storage.join(path, layout.MANIFEST))]


def newest(run: str) -> str:
    """The run's newest committed checkpoint. Raises CheckpointError if it has none."""
    found = find(run)
    if not found:
        raise CheckpointError(
            f"{run}: the run has ended without a checkpoint that is seen here; on several nodes, "
            "home= must be a place that all of them share"
        )
    return found[-1]


def unfinished(run: str) -> list[str]:
    """The folders of saves that are not committed (yet, or ever), oldest first."""
    return [path for path in _steps(run) if not storage.exists(storage.join(path, layout.MANIFEST))]


def _steps(run: str) -> list[str]:
    folder = layout.checkpoints_folder(run)
    found = [
        storage.join(folder, item.base_name)
        for item in storage.list_files(folder, recursive=False)
        if item.type == pafs.FileType.Directory and layout.is_step(item.base_name)
    ]
    return sorted(found, key=layout.step_of)


def names_of_runs(home: str) -> list[str]:
    """The names of the runs that have a checkpoint, including names with parts, such as a/b."""
    return sorted(_runs_below(home, "", MOST_PARTS))


def _runs_below(home: str, name: str, depth: int) -> Iterator[str]:
    """The names of the runs that have a checkpoint in a folder of runs."""
    folder = layout.run_folder(home, name).rstrip("/")
    for item in storage.list_files(folder, recursive=False):
        part = f"{name}/{item.base_name}".lstrip("/")
        if item.type != pafs.FileType.Directory:
            continue
        if find(layout.run_folder(home, part)):
            yield part
        elif depth > 1:
            yield from _runs_below(home, part, depth - 1)


def check_place(home: str, name: str) -> None:
    """Checks that the run `name` is not made inside another run, nor around one.

    Raises:
        ConfigError: it would be, and is not there yet.
    """
    if _is_run(layout.run_folder(home, name)):
        return
    parts = name.split("/")
    for count in range(1, len(parts)):
        outer = "/".join(parts[:count])
        if _is_run(layout.run_folder(home, outer)):
            other = "-".join(parts)
            raise ConfigError(
                f"name={name}: {outer} is a run, and no run is made inside another; give another "
                f"name, such as {other}"
            )
    inner = next(_runs_below(home, name, MOST_PARTS - 1), None)
    if inner is not None:
        raise ConfigError(
            f"name={name}: {inner} is a run, and no run is made around another; give another name"
        )


def _is_run(folder: str) -> bool:
    return storage.exists(storage.join(folder, layout.RUN_CONFIG)) or bool(find(folder))


def candidates(name: str, home: str) -> list[str]:
    """The folders that `name` may mean: that of the run of this name, if it can be the name of one,
    or `name` as a path or address."""
    with contextlib.suppress(ValueError):
        return [layout.run_folder(home, name_of_run(name)), storage.absolute(name)]
    return [storage.absolute(name)]


def not_found(given: str, home: str) -> CheckpointError:
    """The error for `given` (as key=value) that leads to no checkpoint. It lists the runs that have
    one."""
    names = names_of_runs(home)
    runs = layout.runs_folder(home)
    there = f"runs with one: {named(names)}" if names else f"no run under {runs} has one yet"
    what = f"{line(given)}: no checkpoint there"
    return CheckpointError(f"{what}; give a run's name or a folder ({there})")
