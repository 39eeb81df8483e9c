"""Faults inside a worker: each happens once, at its step, on its rank.

Nothing in Manta knows of this: a fault replaces functions in the worker's process, which then runs
the real worker.
"""

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

SEED = int(os.environ.get("MANTA_FAULTS_SEED", "1"))
# A run has 24 steps and a checkpoint every 5. A spike needs 16 steps before it.
STEP = random.Random(SEED).choice([17, 18, 19])
CLOCK_JUMP = 86400.0


def once(folder: Path, name: str) -> bool:
    """Whether this is the first time, in any process; the time of the file is when it happened."""
    try:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def faulty(arguments: dict[str, Any], say: Callable[[str], None], *, fault: str, at: Path) -> None:
    """Runs in place of Manta's worker: installs the fault, then runs the real one."""
    from manta.train import worker

    kind, _, rank = fault.partition(":")
    FAULTS[kind](int(rank or 0), at)
    worker.worker(arguments, say)


def after_step(
    act: Callable[[Any], None], *, again: bool = False, always: bool = False
) -> Callable[[int, Path], None]:
    """A fault right after STEP has been logged: with `again` also in the first step after the
    restart, with `always` each time that STEP is trained on."""

    def install(rank: int, at: Path) -> None:
        from manta.train.meter import Meter

        def log(meter: Any) -> None:
            real(meter)
            run = meter.run
            if torch.distributed.get_rank() != rank:
                return
            if run.state.step == STEP and (once(at, "fault") or always):
                act(run)
            is_back = run.state.step == STEP // 5 * 5 + 1 and (at / "fault").exists()
            if again and is_back and once(at, "again"):
                act(run)

        real, Meter.log = Meter.log, log  # type: ignore[method-assign]

    return install


def send(number: int) -> Callable[[Any], None]:
    def act(run: Any) -> None:
        time.sleep(0.5)  # the driver counts the step, so rank 0's message needs time to arrive
        os.kill(os.getpid(), number)

    return act


def hang(run: Any) -> None:
    time.sleep(10_000)


def fail(run: Any) -> None:
    raise RuntimeError("something in a library broke")


def run_out_of_memory(run: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (simulated)")


def jump(run: Any) -> None:
    real = time.time
    time.time = lambda: real() + CLOCK_JUMP


def kill_another(title: str) -> Callable[[Any], None]:
    """Sends SIGKILL to the processes of this node's Ray with such a title; this worker dies with
    them."""

    def act(run: Any) -> None:
        raylet = psutil.Process().parent()
        found = [p for p in raylet.children() if any(title in part for part in p.cmdline())]
        assert found, f"no process of Ray's is a {title}"
        for process in found:
            process.kill()
        time.sleep(60)

    return act


def while_saving(act: Callable[[Any], None]) -> Callable[[int, Path], None]:
    """A fault after a rank's optimizer file and before the rest of the third checkpoint."""

    def install(rank: int, at: Path) -> None:
        from manta.train.checkpoints import fragments

        def write(state: Any, file: Path) -> Any:
            entry = real(state, file)
            here = torch.distributed.get_rank() == rank and "step-00000015" in str(file)
            if here and once(at, "fault"):
                act(None)
            return entry

        real, fragments.write = fragments.write, write

    return install


def storage_fails(seconds: float) -> Callable[[int, Path], None]:
    """Makes the storage answer errors for this many seconds, from the second checkpoint on."""

    def install(rank: int, at: Path) -> None:
        from manta import storage

        def sha256(path: str) -> str:
            if "step-00000005" not in path:
                once(at, "fault")
                if time.time() - (at / "fault").stat().st_mtime < seconds:
                    raise OSError(errno.EIO, "Input/output error (simulated)")
            return real(path)

        real, storage.sha256 = storage.sha256, sha256

    return install


def bad_gradients(steps: range) -> Callable[[int, Path], None]:
    """Makes the loss NaN on one rank whenever one of these steps is trained on."""

    def install(rank: int, at: Path) -> None:
        from manta.train import loop
        from manta.train.step.engine import Engine

        def backward(used: Any, loss: Any, *arguments: Any, **keys: Any) -> Any:
            step = current["run"].state.step + 1
            if step in steps and torch.distributed.get_rank() == rank:
                once(at, "fault")
                loss = loss * float("nan")
            return real(used, loss, *arguments, **keys)

        current = _watch_run(loop)
        real, Engine.backward = Engine.backward, backward

    return install


def spike(rank: int, at: Path) -> None:
    """Makes the update of STEP far too large, whatever its tokens, which breaks the model."""
    from manta.train import loop
    from manta.train.step.engine import Engine

    def backward(used: Any, loss: Any, *arguments: Any, **keys: Any) -> Any:
        if current["run"].state.step + 1 == STEP:
            once(at, "fault")
            for group in used.optimizer.param_groups:
                group["lr"] *= 1e5
        return real(used, loss, *arguments, **keys)

    current = _watch_run(loop)
    real, Engine.backward = Engine.backward, backward


def _watch_run(loop: Any) -> dict[str, Any]:
    """Returns a dict that gets the run being trained as "run"."""
    current: dict[str, Any] = {}

    def meter(run: Any) -> Any:
        current["run"] = run
        return real(run)

    real, loop.Meter = loop.Meter, meter
    return current


def nothing(rank: int, at: Path) -> None:
    pass


FAULTS: dict[str, Callable[[int, Path], None]] = {
    "none": nothing,
    "kill": after_step(send(signal.SIGKILL)),
    "term": after_step(send(signal.SIGTERM)),
    "hang": after_step(hang),
    "fail": after_step(fail),
    "memory": after_step(run_out_of_memory),
    "clock": after_step(jump),
    "kill-twice": after_step(send(signal.SIGKILL), again=True),
    "kill-always": after_step(send(signal.SIGKILL), always=True),
    "controller": after_step(kill_another("TrainController")),
    "kill-in-save": while_saving(send(signal.SIGKILL)),
    "term-in-save": while_saving(send(signal.SIGTERM)),
    "hang-in-save": while_saving(hang),
    "storage": storage_fails(4),
    "storage-long": storage_fails(40),
    "nan": bad_gradients(range(STEP, STEP + 1)),
    "nans": bad_gradients(range(STEP, STEP + 6)),
    "spike": spike,
}
