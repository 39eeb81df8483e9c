"""The configs of alerts and trackers."""

import dataclasses
import os
from typing import Literal
from urllib.parse import urlsplit

from manta.config import Fraction, PositiveFloat, config

WEBHOOK = "MANTA_ALERTS_WEBHOOK"
Tracker = Literal["wandb", "mlflow", "trackio"]


@config
class AlertsConfig:
    """When a run calls for help, and where."""

    webhook: str | None = None
    """Address (https://...) that gets a message when something is wrong with the run, and another
    when it is over. Whoever has the address can write there, so no file of the run keeps it: give
    it again when the run resumes. null: $MANTA_ALERTS_WEBHOOK, or nowhere."""
    kind: Literal["auto", "slack", "discord", "json"] = "auto"
    """Form of the messages. auto: slack for hooks.slack.com, discord for discord.com, else json."""
    no_step_minutes: PositiveFloat = 10.0
    """An alert if no step comes for this many minutes, beyond the longest recent pause between two
    lines of the log."""
    speed: Fraction = 0.8
    """An alert if the run is slower than this share of the tokens per second of its plan, or of its
    own median."""
    data_wait: Fraction = 0.2
    """An alert if a larger share of the steps' time than this is spent waiting for data."""
    checkpoint_intervals: PositiveFloat = 2.0
    """An alert if the newest checkpoint is older than this many times the usual time between
    two."""
    goodput: Fraction = 0.5
    """An alert if a smaller share of the last 15 minutes than this went into steps."""
    disk: Fraction = 0.1
    """An alert if a smaller share than this of the home's disk (or of Ray's, if the home is an
    object store) is free."""

    def problems(self) -> list[str]:
        found = []
        if self.address is not None and not _is_address(self.address):
            name = "alerts.webhook" if self.webhook else WEBHOOK
            found.append(f"{name}: not an address; https://HOST/... is expected")
        if self.address is None and self.kind != "auto":
            found.append(f"alerts.kind={self.kind} is for alerts.webhook: omit it, or set that")
        return found

    @property
    def address(self) -> str | None:
        """The address that gets messages; None: nobody gets them."""
        return self.webhook or os.environ.get(WEBHOOK) or None

    def without_webhook(self) -> "AlertsConfig":
        """The same, to be written down and sent to workers."""
        return dataclasses.replace(self, webhook=None, kind="auto")

    @property
    def form(self) -> Literal["slack", "discord", "json"]:
        """The form of the messages."""
        if self.kind != "auto":
            return self.kind
        host = urlsplit(self.address or "").hostname or ""
        names: tuple[Literal["slack", "discord"], ...] = ("slack", "discord")
        return next((n for n in names if f".{host}".endswith(f".{n}.com")), "json")


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
