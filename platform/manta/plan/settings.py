"""The config of a plan: that of the run, and what only the plan needs."""

import dataclasses

from manta.config import Natural, NonNegativeFloat, PositiveFloat, PositiveFraction, config
from manta.train.settings import PretrainConfig


@config
class PlanConfig(PretrainConfig):
    cluster: str | None = None
    """The cluster's file (clusters/*.yaml), for its GPUs, its size and its prices; null: this
    machine."""
    gpu: str | None = None
    """The GPU as CUDA names it ("A100-SXM4-80GB"), for a cluster file that does not say it."""
    memory_per_device: PositiveFloat | None = None
    """GiB of memory of one GPU, or for one worker on CPUs; null: what the machine has, or the file
    of prices says of the cluster's machine."""
    probe: Natural = 0
    """Steps to run on this machine, with the real model and engine, for a speed and a memory that
    are measured; 0: none."""
    mfu: PositiveFraction | None = None
    """MFU to reckon with, where neither a probe nor a calibration says how fast it is: the share of
    the device's peak in training."""
    failures_per_day: NonNegativeFloat = 0.0
    """Failures of the whole run in a day, from which it starts again at its last checkpoint."""
    failures_per_device_day: NonNegativeFloat = 0.0
    """The same for each device; added to failures_per_day."""
    price_per_hour: PositiveFloat | None = None
    """Price of an hour of all machines together; null: that of the cluster's machines in the file
    of prices."""
    prices: str | None = None
    """File of prices; null: clusters/prices.yaml."""
    spot: bool | None = None
    """Whether the prices are those of machines that may be taken back; null: as the cluster's file
    says."""
    law: str | None = None
    """Name of the study in HOME/scaling whose law predicts the loss; null: the only one there."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.probe and self.cluster is not None:
            found.append(
                f"probe={self.probe} runs on this machine and says nothing about a cluster's: omit "
                "it or cluster, or run it on a machine of the cluster"
            )
        if self.probe == 1 or self.probe == 2:
            found.append(f"probe={self.probe}: the first steps are slower; give at least 3")
        return found


def run_of(c: PlanConfig) -> PretrainConfig:
    """The config of the run that is planned, as the run itself gets it."""
    names = [f.name for f in dataclasses.fields(PretrainConfig)]
    made = PretrainConfig(**{name: getattr(c, name) for name in names})
    made = dataclasses.replace(made, alerts=made.alerts.without_webhook())
    return dataclasses.replace(made, home=made.home_folder, engine=made.engine.inlined())
