"""A run in Trackio: in files in the home, or in the space of TRACKIO_SPACE_ID."""

import os

from manta.monitor.trackers.process import About


class TrackioRun:
    """A run of Trackio, which knows it by its name."""

    def __init__(self, about: About):
        os.environ.setdefault("TRACKIO_DIR", about.place("trackio"))
        import trackio  # here, as it reads the variable when it is imported

        self.id, self.notice = about.id or about.run, None
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "manta"),
            name=self.id,
            resume="allow",
            config=about.settings(),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, record: dict[str, float]) -> None:
        self._run.log({k: v for k, v in record.items() if k != "step"}, step=int(record["step"]))

    def close(self) -> None:
        self._run.finish()


def begin(about: About) -> TrackioRun:
    """Begins the run, or goes on with it."""
    return TrackioRun(about)
