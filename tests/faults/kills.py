"""One run that is killed again and again, next to the same run left alone.

    python tests/faults/kills.py folder=FOLDER [minutes=60] [every=5] [spread=0.5] [seed=1]
                                 [alone=true] [key=value of jobs/pretrain.py ...]

For `minutes`, `every` minutes apart (more or less by the share `spread`, at random), SIGKILL goes
to a worker, or, one time in four, to the job with its whole Ray, which is then started again at
once, as a spot machine's start-up script would. Then the run may end undisturbed. `alone=true`
leaves out the other run, for figures that must not share the machine. Prints what happened, the
goodput, and whether both ended in the same weights; draws both loss curves over each other into
FOLDER/kills.png.
"""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform")]

from manta import layout, plot
from manta.train.checkpoints import checkpoint
from manta.train.records import ledger
from manta.train.records.logbook import read_metrics

SETTINGS = {"folder": "", "minutes": "60", "every": "5", "spread": "0.5", "seed": "1"}
SETTINGS |= {"alone": "false"}
LONGEST_HOURS = 3.0


class Kill(NamedTuple):
    kind: str
    tokens: int
    """Trained on until then."""


def environment() -> dict[str, str]:
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": "local"}


def start(
    folder: Path, name: str, keys: list[str], job: str = "pretrain.py"
) -> subprocess.Popen[bytes]:
    """Starts a job with a Ray of its own."""
    command = [sys.executable, str(ROOT / "jobs" / job), f"home={folder}", f"name={name}"]
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen([*command, *keys], stdout=log, stderr=log, env=environment())


def workers_of(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(job.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("RayTrainWorker" in part for part in process.cmdline()):
                    found.append(process)
    return found


def kill_all(job: subprocess.Popen[bytes]) -> None:
    """Kills the job and every process of its Ray."""
    everyone = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGKILL)
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()


def moments(minutes: float, every: float, spread: float, choose: random.Random) -> list[float]:
    """Seconds from the start, `every` minutes apart on average, more or less by `spread` of it."""
    at, found = 0.0, []
    while (at := at + choose.uniform(1 - spread, 1 + spread) * every * 60) < minutes * 60:
        found.append(at)
    return found


def train_with_kills(folder: Path, keys: list[str], when: list[float], seed: int) -> list[Kill]:
    choose, kills = random.Random(seed), []
    started, due = time.monotonic(), list(when)
    job = start(folder, "killed", keys)
    while time.monotonic() - started < LONGEST_HOURS * 3600:
        if job.poll() is not None:
            break
        if due and time.monotonic() - started >= due[0]:
            workers = workers_of(job)
            if workers:  # it is not just starting
                due.pop(0)
                kind = choose.choices(["worker", "job"], [3, 1])[0]
                newest = losses(folder, "killed")[-1:] or [{"step": 0, "tokens": 0}]
                kills.append(Kill(kind, newest[0]["tokens"]))
                seconds = time.monotonic() - started
                print(f"{seconds:6.0f} s, step {newest[0]['step']}: SIGKILL, {kind}", flush=True)
                if kind == "worker":
                    choose.choice(workers).kill()
                else:
                    kill_all(job)
                    job = start(folder, "killed", keys)
        time.sleep(0.5)
    if job.poll() != 0:
        sys.exit(f"the run ended with {job.poll()}; see {folder / 'killed.log'}")
    return kills


def losses(folder: Path, name: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(f"{folder}/runs/{name}/metrics.jsonl") if "loss" in r]


def weights(folder: Path, name: str) -> str:
    """The sha256 of a run's last weights."""
    path = checkpoint.find(f"{folder}/runs/{name}")[-1]
    return hashlib.sha256(Path(path, layout.WEIGHTS).read_bytes()).hexdigest()


def overlaid(
    runs: Mapping[str, Sequence[dict[str, Any]]],
    title: str,
    marks: Sequence[int] = (),
    marked: str = "",
) -> bytes:
    """Draws the training losses of two or three runs over each other, by name, against tokens.

    Args:
        marks: tokens at which the event that `marked` names hit the last run.
    """
    figure, axes = plot._figure(title, dpi=120)
    unit, name = plot._unit(
        max((r["tokens"] for records in runs.values() for r in records), default=0)
    )
    # Each line is thinner than the one before, so that both of two equal lines are visible.
    styles = [(plot.LIGHT_BLUE, 5.0), (plot.ORANGE, 1.0), (plot.BLUE, 0.5)]
    for (run, records), (color, width) in zip(runs.items(), styles, strict=False):
        train = [(r["tokens"], r["loss"]) for r in records if isinstance(r.get("loss"), float)]
        smoothed = plot._smooth([loss for _, loss in train])
        x = [tokens / unit for tokens, _ in train]
        axes.plot(x, smoothed, color=color, linewidth=width, label=f"{run} (smoothed)")
    for index, mark in enumerate(marks):
        label = marked if index == 0 else None
        axes.axvline(mark / unit, color="gray", linewidth=0.8, linestyle=":", label=label)
    axes.set(xlabel=f"{name}tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return plot._png(figure)


def main(arguments: list[str]) -> int:
    given = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in SETTINGS)
    settings = SETTINGS | given
    keys = [a for a in arguments if a.partition("=")[0] not in SETTINGS]
    folder = Path(settings["folder"]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    seed, every = int(settings["seed"]), float(settings["every"])
    spread = float(settings["spread"])
    when = moments(float(settings["minutes"]), every, spread, random.Random(seed))
    # Both read the same data, prepared before.
    prepare = [sys.executable, str(ROOT / "jobs/prepare.py"), f"home={folder}"]
    data = [key for key in keys if key.startswith("data.")]
    subprocess.run([*prepare, *data], env=environment(), check=True)
    other = None if settings["alone"] == "true" else start(folder, "whole", keys)
    kills = train_with_kills(folder, keys, when, seed)
    counts = Counter(kill.kind for kill in kills)
    print(f"killed {counts['worker']} workers and {counts['job']} whole jobs")
    print("\n".join(ledger.table(f"{folder}/runs/killed")))
    if other is None:
        return 0
    other.wait()
    print("\n".join(ledger.table(f"{folder}/runs/whole")))
    killed, whole = losses(folder, "killed"), losses(folder, "whole")
    same = [r["loss"] for r in killed] == [r["loss"] for r in whole]
    print(f"{len(whole)} steps; the same losses, all of them: {'yes' if same else 'no'}")
    equal = weights(folder, "killed") == weights(folder, "whole")
    print(f"the same final weights (sha256): {'yes' if equal else 'no'}")
    picture = folder / "kills.png"
    title = f"A run killed {len(kills)} times, over the same run left alone"
    runs = {"left alone": whole, "killed": killed}
    picture.write_bytes(overlaid(runs, title, [k.tokens for k in kills], "SIGKILL"))
    print(f"curves {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
