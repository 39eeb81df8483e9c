"""What stops a run without loss: signals to the process that a person started, and the time that
Ray gives a submitted job before it kills it.

`ray job stop` sends SIGTERM, waits for RAY_JOB_STOP_WAIT_TIME_S (three seconds where nobody has set
it), and sends SIGKILL. The variable is read by the job's supervisor, an actor of Ray's, at that
moment. So a job can set it there, however Ray was started.
"""

import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from manta.train.faults.signals import Asked

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS_BETWEEN_REQUESTS = 5.0

STOP_SECONDS = 600  # a limit, not a delay: a run that has saved ends at once
WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
ANSWER_SECONDS = 10.0


@dataclasses.dataclass
class Told:
    """Whether this process was told to stop. `by`: the first signal that did so, or None."""

    by: signal.Signals | None = None
    _event: threading.Event = dataclasses.field(default_factory=threading.Event)

    def hear(self, number: int, _frame: Any = None) -> None:
        """Takes in a signal. A second Ctrl-C comes from a person who does not want to wait: it
        raises KeyboardInterrupt."""
        if self.by is None:
            self.by = signal.Signals(number)
            self._event.set()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def wait(self) -> None:
        self._event.wait()

    def wake(self) -> None:
        """Ends `wait` though there was no signal."""
        self._event.set()


@contextlib.contextmanager
def told_to_stop(requests: Any, say: Callable[[str], None]) -> Iterator[Told]:
    """Makes each signal in STOPPING ask the workers to save and end, as long as the context
    lasts."""
    told, over = Told(), threading.Event()

    def pass_on() -> None:
        told.wait()
        if told.by is None:
            return
        again = " (Ctrl-C again: stop at once)" if told.by is signal.SIGINT else ""
        say(f"{told.by.name}: saving, then stopping{again}")
        requests.put(Asked.STOP)
        while not over.wait(SECONDS_BETWEEN_REQUESTS):  # the worker that received it may have died
            requests.put(Asked.STOP)

    if threading.current_thread() is not threading.main_thread():
        yield told  # a thread of a sweep's trial cannot handle signals
        return
    thread = threading.Thread(target=pass_on, name="manta-stopping", daemon=True)
    thread.start()
    before = {number: signal.signal(number, told.hear) for number in STOPPING}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        over.set()
        told.wake()
        thread.join()


def ask_for_time(every: int | None) -> str | None:
    """Has `ray job stop` wait until the run in this process is saved. A time that the job's own
    runtime_env sets is left as it is.

    Args:
        every: steps between checkpoints; None if checkpoints are saved by something else.

    Returns:
        A line about how long that may take, and what it costs if that is too short; None if this
        process is not a submitted job.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    name = job.get("metadata", {}).get("job_submission_id")
    if name is None:
        return None
    own = ((job.get("runtime_env") or {}).get("env_vars") or {}).get(WAIT, "")
    if own.isdecimal():  # (Ray's supervisor fails at anything else)
        return _line(int(own), every, f"{WAIT} in its runtime_env")
    try:
        return _line(_extend(name), every)
    except Exception as e:  # another version of Ray, or the job has a Ray of its own
        why = " ".join(str(e).split())[:160] or type(e).__name__
        set_there = os.environ.get(WAIT, "3")  # (this environment is the supervisor's)
        seconds = int(set_there) if set_there.isdecimal() else 0
        return _line(seconds, every, f"Ray was asked for more: {why}; set {WAIT} at `ray start`")


def _line(seconds: int, every: int | None, why: str = "") -> str:
    line = f"`ray job stop` gives this run {seconds} s to save"
    if seconds >= STOP_SECONDS:
        return line
    lost = f"up to {every} steps" if every else "the steps since the last checkpoint"
    return f"{line} ({why}): if that is too short, {lost} will be trained again"


def _extend(submission: str) -> int:
    """Sets the time in the supervisor of this submitted job, unless it is longer already. Returns
    the time in seconds."""
    import ray
    from ray.dashboard.modules.job.common import (
        JOB_ACTOR_NAME_TEMPLATE,
        SUPERVISOR_ACTOR_RAY_NAMESPACE,
    )

    def extend(_supervisor: Any, variable: str, least: int) -> int:
        import os  # this function is sent to a process that does not have this module

        was = os.environ.get(variable, "")
        seconds = max(int(was) if was.isdecimal() else 0, least)
        os.environ[variable] = str(seconds)
        return seconds

    supervisor = ray.get_actor(
        JOB_ACTOR_NAME_TEMPLATE.format(job_id=submission), SUPERVISOR_ACTOR_RAY_NAMESPACE
    )
    asked: Any = supervisor.__ray_call__.remote(extend, WAIT, STOP_SECONDS)
    seconds: int = ray.get(asked, timeout=ANSWER_SECONDS)
    return seconds
