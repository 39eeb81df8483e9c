"""What watches a run, in the process that starts its workers: it hears what rank 0 says, publishes
figures as metrics, sends alerts and feeds trackers. It lives while workers do not."""

import contextlib
import dataclasses
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from manta import foreign, layout, storage
from manta.errors import DataError
from manta.foreign import Finite
from manta.messages import Logged, Saved, WentBack
from manta.monitor import figures
from manta.monitor.alerts import Alert, Alerts
from manta.monitor.conditions import CONDITIONS
from manta.monitor.figures import Figures
from manta.monitor.metrics import Metrics
from manta.monitor.settings import AlertsConfig, Tracker
from manta.monitor.trackers.tracker import Trackers
from manta.monitor.webhook import Webhook
from manta.terminal import line

TICK = 5.0  # seconds between two looks at the figures
CLOSING_SECONDS = 30.0  # for all that was logged to arrive in trackers, at a run's end
LEFT = (1, 4)  # Ray's DeathReason of a node that was stopped, or that the autoscaler took as idle


Close = Callable[[float], None]


@dataclasses.dataclass(frozen=True)
class Watched:
    """A run to watch."""

    name: str
    home: str
    alerts: AlertsConfig
    track: tuple[Tracker, ...]
    config: Mapping[str, Any]
    """The run's config, for trackers."""
    interval: Callable[[float, float], float | None]
    """Seconds between checkpoints, from seconds per step and tokens per second; None: not known."""

    @property
    def folder(self) -> str:
        return layout.run_folder(self.home, self.name)


class Watch:
    """Watches a run until it is closed."""

    def __init__(self, run: Watched, say: Callable[[str], None]):
        self._run, self._say, self._lock = run, say, threading.Lock()
        self._figures = Figures(time.monotonic(), run.interval, planned(run.folder, say))
        self._metrics, self._disks = Metrics(run.name), _disks(run.home)
        address = run.alerts.address
        self._webhook = Webhook(address, run.alerts.form, say) if address else None
        self._alerts = Alerts(run.alerts, run.name, socket.gethostname(), self._tell)
        self._trackers = Trackers(run.track, run.name, run.home, run.config, say)
        self._nodes, self._end = _Nodes(), threading.Event()
        for condition in CONDITIONS:
            limit = {"alert_threshold": condition.threshold(run.alerts)}
            self._metrics.publish(limit, alert=condition.name)
        self._thread = threading.Thread(target=self._look_on, name="manta-watch", daemon=True)
        self._thread.start()

    def hear(self, message: Logged | Saved | WentBack) -> None:
        """Takes in what a worker says of the run."""
        with self._lock:
            self._figures.hear(message, time.monotonic())
        if isinstance(message, Logged):
            self._metrics.publish(message.records[-1])
            for cause, seconds in message.seconds.items():
                self._metrics.publish({"time_seconds": seconds}, cause=cause)
            self._trackers.log(message.records)

    def end(self, error: BaseException | None = None) -> list["Close"]:
        """Ends the watch. An `error` that ended the run is an alert as well. Returns what still has
        to be closed, with the time (time.monotonic()) until which to wait for it."""
        self._end.set()
        self._thread.join(TICK)
        self._metrics.publish({"running": 0})
        if isinstance(error, Exception):
            what = f"the run has ended with an error: {line(str(error))[:500]}"
            remedy = "see the job's last lines; the same command resumes the run"
            host = socket.gethostname()
            self._tell(Alert(self._run.name, host, "failed", what, time.time(), remedy))
        self._trackers.end()
        return [self._trackers.close, *([self._webhook.close] if self._webhook else [])]

    def _look_on(self) -> None:
        while True:
            self._look()
            if self._end.wait(TICK):
                return

    def _look(self) -> None:
        with self._lock:
            found = self._figures.at(time.monotonic())
        found["nodes_lost"] = float(self._nodes.lost())
        if (share := self._disks()) is not None:
            found["disk_free_share"] = share
        self._metrics.publish({**found, "running": 1})
        for name, is_on in self._alerts.look(found, time.time()).items():
            self._metrics.publish({"alert": int(is_on)}, alert=name)

    def _tell(self, alert: Alert) -> None:
        state = "over" if alert.is_over else "alert"
        self._say(f"{state}: {alert.name if alert.is_over else alert.what}")
        if self._webhook is not None:
            self._webhook.send(alert)


@contextlib.contextmanager
def watching(
    run: Watched, say: Callable[[str], None], later: list[Close] | None = None
) -> Iterator[Watch]:
    """A context in which a run is watched. Its end waits until trackers and the webhook have all,
    for at most CLOSING_SECONDS; with `later`, that is left to the caller."""
    watch, error = Watch(run, say), None
    try:
        yield watch
    except BaseException as e:
        error = e
        raise
    finally:
        closes = watch.end(error)
        if later is not None:
            later += closes
        until = time.monotonic() + CLOSING_SECONDS
        for close in [] if later is not None else closes:
            close(until)


@dataclasses.dataclass
class _Plan:
    tokens_per_second: Finite | None = None


def planned(folder: str, say: Callable[[str], None]) -> float | None:
    """Tokens per second by the plan of the run in this folder; None if it has no plan."""
    path = storage.join(folder, layout.PLAN)
    with contextlib.suppress(OSError):
        if storage.exists(path):
            try:
                found = foreign.read_json(path, _Plan, DataError, "the run goes on without it")
                speed = found.tokens_per_second
                return speed if speed is not None and speed > 0 else None
            except DataError as e:
                say(str(e))
    return None


class _Nodes:
    """Counts the nodes of the cluster that are missing since the watch began."""

    def __init__(self) -> None:
        self._most = self._lost = 0
        self._dead_before: set[str] | None = None

    def lost(self) -> int:
        import ray

        if not ray.is_initialized():
            return 0
        try:
            nodes = ray.nodes()
        except Exception:  # the head is being restarted: nothing is known for the moment
            return self._lost
        dead = {node["NodeID"]: node.get("DeathReason") for node in nodes if not node["Alive"]}
        if self._dead_before is None:
            self._dead_before = set(dead)
        alive = len(nodes) - len(dead)
        left = sum(why in LEFT for node, why in dead.items() if node not in self._dead_before)
        self._most = max(self._most, alive)
        self._lost = figures.lost(self._most, alive, left)
        return self._lost


def ray_folder() -> str:
    """The folder in which the Ray of this machine keeps its sessions."""
    from ray._common.utils import get_default_ray_temp_dir

    return str(get_default_ray_temp_dir())


def _disks(home: str) -> Callable[[], float | None]:
    """A function that returns the free share of the disk with the home; of Ray's, if the home is
    an object store."""
    path = Path(storage.filesystem(home)[1] if storage.is_local(home) else ray_folder())

    def share() -> float | None:
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists()))
            return figures.shares_free([(usage.free, usage.total)])
        return None

    return share
