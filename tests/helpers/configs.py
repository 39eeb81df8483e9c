"""Configs and files that tests of configs share."""

import dataclasses
from pathlib import Path

import pytest

from manta.bench.settings import BenchConfig
from manta.config import Count, config, load
from manta.data.inspect import InspectConfig
from manta.errors import ConfigError
from manta.evaluate.compare import CompareConfig
from manta.evaluate.inference_settings import GenerateConfig
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.surprise import SurpriseConfig
from manta.export.convert import ExportConfig, ImportConfig
from manta.judge.settings import JudgeConfig
from manta.sweep.settings import SweepConfig
from manta.train.checkpoints.listing import CheckpointsConfig
from manta.train.settings import PretrainConfig

# The configs of the jobs (jobs/prepare.py takes PretrainConfig).
OF_JOBS = (
    BenchConfig, CheckpointsConfig, CompareConfig, EvaluateConfig, ExportConfig, GenerateConfig,
    ImportConfig, InspectConfig, JudgeConfig, PretrainConfig, SurpriseConfig, SweepConfig,
)  # fmt: skip


def refusal(*arguments: str) -> str:
    """The message with which `load` refuses these arguments."""
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, arguments)
    return str(caught.value)


def write(folder: Path, text: str | bytes, name: str = "config.yaml") -> str:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


@config
class Inner:
    by_number: dict[Count, dict[str, int]] = dataclasses.field(
        default_factory=lambda: {8000: {"a": 1}}
    )
    """A dict in a group, of dicts, with a default."""
    n: int = 0
    """A number."""


@config
class Outer:
    named: dict[str, int] = dataclasses.field(default_factory=dict)
    """A dict, empty at first."""
    inner: Inner = Inner()


def never(config: PretrainConfig) -> None:
    pytest.fail("the job ran")
