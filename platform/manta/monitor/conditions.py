"""The conditions under which a run calls for help. Each is defined once: the webhook's alerts and
Prometheus' rules are both made of it."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from manta.monitor.metrics import exported
from manta.monitor.settings import AlertsConfig


@dataclasses.dataclass(frozen=True)
class Condition:
    """One figure of a run that is above or below a threshold."""

    name: str
    figure: str
    """A declared metric."""
    side: Literal["above", "below"]
    setting: str | None
    """The key of `alerts` that has the threshold; None: it is 0."""
    unit: float
    """How many of the figure's units the setting's unit has."""
    says: str
    """What is wrong. {} stands for the figure's value."""
    value: Literal["number", "share", "duration"]
    """How the figure is written for a person."""
    remedy: str

    def threshold(self, c: AlertsConfig) -> float:
        return self.unit * getattr(c, self.setting) if self.setting else 0.0

    def holds(self, figures: Mapping[str, float], c: AlertsConfig) -> bool | None:
        """Whether the condition holds; None if its figure is not known."""
        found = figures.get(self.figure)
        if found is None:
            return None
        limit = self.threshold(c)
        return found > limit if self.side == "above" else found < limit

    @property
    def expression(self) -> str:
        """The same for Prometheus: the figure against the threshold that the run publishes."""
        figure, limit, running = map(exported, (self.figure, "alert_threshold", "running"))
        sign = ">" if self.side == "above" else "<"
        return (
            f"max by (run, job) ({figure}) {sign} on (run, job) "
            f'max by (run, job) ({limit}{{alert="{self.name}"}}) '
            f"and on (run, job) max by (run, job) ({running}) == 1"
        )

    def what(self, value: float) -> str:
        """What is wrong, for a person."""
        match self.value:
            case "share":
                return self.says.format(f"{value:.0%}")
            case "duration":
                return self.says.format(duration(value))
        return self.says.format(f"{value:.3g}")

    @property
    def template(self) -> str:
        """What is wrong, in Prometheus' templates."""
        form = {"share": "humanizePercentage", "duration": "humanizeDuration"}
        return self.says.format(f"{{{{ $value | {form.get(self.value, 'humanize')} }}}}")


def duration(seconds: float) -> str:
    """Seconds as Prometheus' humanizeDuration writes them: 16s, 11m 0s, 2h 0m 5s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    first = next((i for i, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count}{unit}" for count, unit in parts[first:])


CONDITIONS = (
    Condition(
        "no step", "seconds_without_step", "above", "no_step_minutes", 60.0,
        "no step for {} more than usual", "duration",
        "see the job's last lines, and the stacks of hanging workers in the run's folder; "
        "workers that hang are started again after hang_seconds",
    ),
    Condition(
        "loss", "loss_faults", "above", None, 1.0,
        "{} steps in 10 minutes had a loss or gradient that is not finite, or were rolled back",
        "number", "lower optimizer.lr or optimizer.grad_clip, or look at the tokens of these steps "
        "(jobs/inspect.py)",
    ),
    Condition(
        "slower than planned", "speed_of_plan", "below", "speed", 1.0,
        "the run trains at {} of the tokens per second of its plan", "share",
        "see what else runs on its machines, and whether a GPU is hot or a worker waits",
    ),
    Condition(
        "slower than before", "speed_of_median", "below", "speed", 1.0,
        "the run trains at {} of its own median of tokens per second", "share",
        "see what else runs on its machines, and whether a GPU is hot or a worker waits",
    ),
    Condition(
        "data wait", "data_wait_share", "above", "data_wait", 1.0,
        "{} of the steps' time is spent waiting for data", "share",
        "give the job more CPUs, or put the dataset on a faster disk",
    ),
    Condition(
        "checkpoint", "checkpoint_intervals", "above", "checkpoint_intervals", 1.0,
        "the newest checkpoint is {} times as old as usual between two", "number",
        "see the job's lines that begin with `step ... was not saved`; free space in the home",
    ),
    Condition(
        "goodput", "recent_goodput", "below", "goodput", 1.0,
        "only {} of the last 15 minutes went into steps", "share",
        "see what the time went to: the board's panel, goodput.json, or jobs/report.py",
    ),
    Condition(
        "node lost", "nodes_lost", "above", None, 1.0,
        "{} nodes of the cluster have died", "number",
        "replace the node, or set num_workers=[fewest, most], so that the run goes on with fewer",
    ),
    Condition(
        "disk", "disk_free_share", "below", "disk", 1.0,
        "only {} of the disk is free", "share",
        "free some space, lower checkpoint.keep, or prune with jobs/checkpoints.py",
    ),
)  # fmt: skip
