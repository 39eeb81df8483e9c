"""The alerts of a run that are on: each is told once, and once more when it is over."""

import dataclasses
from collections.abc import Callable, Mapping

from manta.monitor.conditions import CONDITIONS, Condition
from manta.monitor.settings import AlertsConfig

OVER_SECONDS = 60.0  # for which a condition must not hold before its alert is over


@dataclasses.dataclass(frozen=True)
class Alert:
    """What a person is told."""

    run: str
    host: str
    name: str
    what: str
    since: float
    """The time (time.time()) when it began."""
    remedy: str
    is_over: bool = False


class Alerts:
    """Looks at a run's figures again and again, and tells of alerts that begin or end."""

    def __init__(self, c: AlertsConfig, run: str, host: str, tell: Callable[[Alert], None]):
        self._c, self._run, self._host, self._tell = c, run, host, tell
        self._on: dict[str, Alert] = {}
        self._held: dict[str, float] = {}

    def look(self, figures: Mapping[str, float], now: float) -> dict[str, bool]:
        """Whether each alert is on, by its name, with the figures of the time `now`. A figure that
        is not known leaves its alert as it is."""
        for condition in CONDITIONS:
            holds, name = condition.holds(figures, self._c), condition.name
            if holds:
                self._held[name] = now
                if name not in self._on:
                    self._on[name] = self._begun(condition, figures, now)
                    self._tell(self._on[name])
            elif holds is False and name in self._on and now - self._held[name] >= OVER_SECONDS:
                self._tell(dataclasses.replace(self._on.pop(name), is_over=True))
        return {condition.name: condition.name in self._on for condition in CONDITIONS}

    def _begun(self, condition: Condition, figures: Mapping[str, float], now: float) -> Alert:
        what = condition.what(figures[condition.figure])
        return Alert(self._run, self._host, condition.name, what, now, condition.remedy)
