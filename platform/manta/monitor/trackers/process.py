"""The process of one tracker: reads lines of JSON from standard input, first about the run, then
lists of records, and tracks them. What it has to say are lines of JSON on standard output."""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}


@dataclasses.dataclass(frozen=True)
class About:
    """The run to track."""

    run: str
    folder: str
    """A local folder for all trackers' files."""
    config: dict[str, Any]
    id: str | None
    """The run's id in the tracker, if it has been tracked before."""

    def place(self, tracker: str) -> str:
        """The folder for the files of one tracker, which is made."""
        found = Path(self.folder, tracker)
        found.mkdir(parents=True, exist_ok=True)
        return str(found)

    def settings(self) -> dict[str, Any]:
        """The config with one key for each value, as in model.n_layer."""
        return dict(_leaves(self.config))


class Tracked(Protocol):
    """A run in a tracker."""

    id: str
    notice: str | None
    """What a person should know of where it goes, in one line."""

    def log(self, record: dict[str, float]) -> None: ...
    def close(self) -> None: ...


def main(name: str) -> int:
    """Tracks a run with the tracker of this name; returns the exit code."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes where its errors go: nowhere

    def say(**reply: str) -> None:
        with contextlib.suppress(OSError):
            replies.write(json.dumps(reply) + "\n")
            replies.flush()

    about = About(**json.loads(sys.stdin.readline()))
    try:
        begin: Callable[[About], Tracked] = importlib.import_module(
            f"manta.monitor.trackers.{name}_run"
        ).begin
        run = begin(about)
        say(id=run.id, **({"notice": run.notice} if run.notice else {}))
        for text in sys.stdin:
            for record in json.loads(text):
                run.log(record)
        run.close()
    except ImportError as e:
        say(problem=f"{e}; pip install 'manta[{name}]' (or {PACKAGES[name]})")
    except Exception as e:  # whatever a library or a server may raise
        say(problem=f"{type(e).__name__}: {e}")
    return 0


def _leaves(tree: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found += _leaves(value, f"{before}{key}.")
        else:
            found.append((f"{before}{key}", value))
    return found


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # threads of libraries may wait for a network that is not there
