"""A run in Weights & Biases: sent where there is a key and a network, kept offline where not."""

import netrc
import os
import uuid
from urllib.parse import urlsplit

import wandb

from manta.monitor.trackers.process import About

INIT_SECONDS = 30


class WandbRun:
    """A run of W&B. Its steps are the records' own, as a resumed run comes to some again."""

    def __init__(self, about: About):
        self.id = about.id or uuid.uuid4().hex[:12]
        self.notice: str | None = None
        place = about.place("wandb")
        offline = f"kept offline in {place}/wandb: `wandb sync` sends it"
        mode = os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not _has_key():
            mode, self.notice = "offline", f"no key of W&B (`wandb login` makes one), so {offline}"
        try:
            self._run = self._begin(about, place, mode)
        except wandb.errors.CommError as e:
            why = " ".join(str(e).split())
            self.notice = f"W&B cannot be reached ({why}), so {offline}"
            wandb.teardown()  # what the first try left has the run's id
            self._run = self._begin(about, place, "offline")
        self._run.define_metric("*", step_metric="step")

    def _begin(self, about: About, place: str, mode: str) -> wandb.Run:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "manta"),
            id=self.id,
            name=about.run,
            resume="allow",
            dir=place,
            config=about.settings(),
            settings=wandb.Settings(
                mode=mode,
                init_timeout=INIT_SECONDS,
                console="off",
                disable_git=True,
                disable_code=True,
                x_save_requirements=False,
            ),
        )

    def log(self, record: dict[str, float]) -> None:
        self._run.log(record)

    def close(self) -> None:
        self._run.finish()


def begin(about: About) -> WandbRun:
    """Begins the run, or goes on with it."""
    return WandbRun(about)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
