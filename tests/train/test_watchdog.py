"""Signals and hangs, in processes of their own; warnings."""

import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

from manta.train.faults.signals import Asked, warned
from manta.train.faults.watchdog import EXIT_CODE

PLATFORM = Path(__file__).resolve().parents[2] / "platform"

HANGS = """
import threading, time
from manta.train.faults import watchdog
watchdog.GRACE_SECONDS = 0.2
def a_function_that_hangs():
    threading.Event().wait(60)
dog = watchdog.Watchdog(0.5, lambda stacks: open("stacks.txt", "w").write(stacks))
for _ in range(8):
    time.sleep(0.1)
    dog.beat()
print("still here", flush=True)
a_function_that_hangs()
"""

SIGNALLED = """
import os, signal, threading, time
import torch.distributed as dist
from manta.train.faults.signals import Asked, Signals, sigterm
def in_a_thread():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with sigterm() as told:
        signals = Signals([told])
        print(signals.agree() == Asked.NOTHING, "ready", flush=True)
        for _ in range(100):
            time.sleep(0.05)
            if signals.agree() == Asked.MOVE:
                print("asked to move", flush=True)
                break
thread = threading.Thread(target=in_a_thread)
thread.start()
thread.join()
print("on", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""


def started(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(PLATFORM), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_process_that_hangs_leaves_its_stacks_and_ends(tmp_path: Path) -> None:
    process = started(HANGS, tmp_path)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE
    assert "still here" in out  # neither while it made progress nor while the watch was paused
    assert "a_function_that_hangs" in (tmp_path / "stacks.txt").read_text()


def test_sigterm_is_a_request_while_a_thread_trains_and_ends_the_process_after(
    tmp_path: Path,
) -> None:
    process = started(SIGNALLED, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "True ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=30) == -signal.SIGTERM
    assert rest == "asked to move\non\n"


def test_each_warning_asks_to_save_once() -> None:
    """The one that is there at the start asks for nothing; one that cannot be asked for comes
    later."""
    warnings: list[str | None] = ["before the start"]
    looks: queue.SimpleQueue[None] = queue.SimpleQueue()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def look() -> str | None:
        looks.put(None)
        if warnings[-1] == "away":
            raise ConnectionError
        return warnings[-1]

    def seen() -> None:
        for _ in range(looks.qsize() + 2):
            looks.get(timeout=30)

    with warned(look, lines.put, pause=0.01) as asked:
        seen()
        assert asked() is Asked.NOTHING
        for warning in ("the first", "the second"):
            warnings += ["away"]
            seen()
            warnings += [warning]
            assert lines.get(timeout=30).startswith(f"{warning}: saving")
            assert asked() is Asked.SAVE and asked() is Asked.NOTHING
            seen()
        assert asked() is Asked.NOTHING and lines.empty()
