"""A run in MLflow: on the server of MLFLOW_TRACKING_URI, or in files in the home."""

import os
import re
import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from manta.monitor.trackers.process import About

LONGEST_VALUE = 500  # characters of a value of the config


class MlflowRun:
    """A run of MLflow."""

    def __init__(self, about: About):
        uri, self.notice = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = Path(about.place("mlflow")).as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        self.id = self._known(about.id) or self._new(about)

    def _known(self, number: str | None) -> str | None:
        """The id, if the tracker has a run of that id that can go on."""
        try:
            if number is not None:
                self._client.update_run(number, status="RUNNING")
        except MlflowException:
            return None
        return number

    def _new(self, about: About) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "manta")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run = self._client.create_run(experiment, run_name=about.run).info.run_id
        params = [Param(k, str(v)[:LONGEST_VALUE]) for k, v in about.settings().items()]
        for first in range(0, len(params), 100):  # a server takes no more at once
            self._client.log_batch(run, params=params[first : first + 100])
        return run

    def log(self, record: dict[str, float]) -> None:
        now, step = int(1000 * time.time()), int(record["step"])
        named = {re.sub(r"[^a-zA-Z0-9_. :/-]", "_", key): value for key, value in record.items()}
        metrics = [Metric(k, float(v), now, step) for k, v in named.items() if k != "step"]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.id)


def begin(about: About) -> MlflowRun:
    """Begins the run, or goes on with it."""
    return MlflowRun(about)
