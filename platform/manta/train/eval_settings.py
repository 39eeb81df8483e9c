"""The configs of what a run measures and writes along its way: val loss, suites, samples."""

from manta.config import Count, Natural, NonNegativeFloat, config


@config
class EvalConfig:
    every: Count = 50
    """Steps between measurements of val loss and bits per byte; also at step 0 and at the end."""
    tokens: Count = 65536
    """Tokens of the val split to measure on, rounded up to whole sequences, which are spread evenly
    over the split and are the same each time; the whole split if it has fewer. Datasets of a mix
    share them equally."""
    patience: Count | None = None
    """Stop early when val loss has not improved for this many evaluations; null: never."""
    suites: tuple[str, ...] = ()
    """Suites (see jobs/evaluate.py) to run on each checkpoint once it is saved. A separate process
    with its own CPUs runs them, so training does not wait. Also saves a checkpoint every
    `eval.every` steps."""
    arguments: tuple[str, ...] = ()
    """More arguments for the evaluation of `suites`, as key=value: [limit=200, cpus=2]."""


@config
class SampleConfig:
    prompts: tuple[str, ...] = ("import os\n", "def read(path):\n", "The ")
    """Texts to complete at step 0, during training, and at the end."""
    every: Natural = 0
    """Steps between samples during training; 0: samples at step 0 and at the end only."""
    tokens: Count = 48
    """Tokens to complete each prompt with."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature; 0: always the likeliest token."""
    top_k: Count | None = 50
    """Sample among this many likeliest tokens; null: all."""
