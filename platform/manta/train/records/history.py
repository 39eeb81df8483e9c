"""What happened to a run and when: each start with its command, versions and machine, each failure,
each end. One JSON object a line, in history.jsonl.

The file is for people and for the report. Nothing that trains depends on it, so a disk that is full
or a file that is damaged never stops a run.
"""

import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from manta import layout, storage
from manta.config import NonNegativeFloat
from manta.security import has_secret
from manta.terminal import visible
from manta.train.records import lines

Happened = Literal[
    "command",  # a person's process began
    "started",  # the workers began to train
    "failed",  # workers failed, and were started again
    "hung",  # a worker made no progress
    "out of memory",  # and went on with smaller micro batches
    "memory",  # the most that the first worker took, until its work ended
    "moved",  # saved, as a worker's machine was leaving
    "stopped",  # saved, as somebody asked for it
    "ended",  # reached its end
]
LIBRARIES = ("manta", "torch", "ray", "deepspeed", "pyarrow")
HIDDEN = "(hidden: it has a secret)"
LONGEST = 1000  # characters of a text


@dataclasses.dataclass
class Event:
    """What is computed with of a line."""

    event: Happened
    time: NonNegativeFloat


def note(run: str, event: Happened, **facts: Any) -> None:
    """Adds a line about what has just happened to the run in this folder."""
    path = storage.join(run, layout.HISTORY)
    line = json.dumps({"event": event, "time": round(time.time(), 3), **_plain(facts)}) + "\n"
    with suppress(OSError):
        if storage.is_local(path):
            storage.make_folder(run)
            with Path(storage.filesystem(path)[1]).open("a") as f:
                f.write(line)
        else:  # an object store cannot append; these files have a few lines
            before = storage.read_bytes(path) if storage.exists(path) else b""
            storage.write_bytes(path, before + line.encode())


def _plain(value: Any) -> Any:
    """The value with texts of a length that a person reads."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return visible(value)[:LONGEST] if isinstance(value, str) else value


def read(run: str) -> tuple[list[dict[str, Any]], str | None]:
    """The events of a run, oldest first, and what is wrong with the file; None: nothing."""
    return lines.read(storage.join(run, layout.HISTORY), Event)


def command() -> dict[str, Any]:
    """This process's command, the versions of what computes, and its machine."""
    return {"command": _command(), "versions": versions(), "machine": machine()}


def _command() -> str:
    """The command as a person would type it again, without arguments that have a secret in them."""
    program, *arguments = sys.argv or [""]
    name = "/".join(Path(program).parts[-2:]) if program else "python"
    shown = [HIDDEN if _has_secret(a) else a for a in arguments]
    return f"python {shlex.join([name, *shown])}"


def _has_secret(argument: str) -> bool:
    key, _, value = argument.partition("=")
    return has_secret(argument) or has_secret(value) or key == "alerts.webhook"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """What the machine of this process is; its name and address are nobody's business."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }
