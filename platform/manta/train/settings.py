"""What the training loop needs to know, wherever it runs."""

import dataclasses
import math
from typing import Any, Literal

from manta.config import Count, Natural, NonNegativeFloat, Seed, config
from manta.data.order import Stage, batches_for, make_stages, sequences_before, stage_of
from manta.model.gpt import ModelConfig
from manta.train.optimizer import OptimizerConfig
from manta.train.schedule import ScheduleConfig

MAX_DEFAULT_MICRO_BATCH = 16


@config
class EvalConfig:
    every: Count = 50
    """Steps between measurements of val loss and bits per byte; also at step 0 and at the end."""
    tokens: Count = 65536
    """Tokens of the val split to measure on, the same each time."""
    patience: Count | None = None
    """Stop early when val loss has not improved for so many evaluations; null: never."""


@config
class SampleConfig:
    prompts: tuple[str, ...] = ("import os\n", "def read(path):\n", "The ")
    """Texts to complete at step 0, along the way, and at the end."""
    every: Natural = 0
    """Steps between samples along the way; 0: at step 0 and at the end only."""
    tokens: Count = 48
    """Tokens to complete each prompt with."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature; 0: always the likeliest token."""
    top_k: Count | None = 50
    """Sample among so many likeliest tokens; null: all."""


@config
class CheckpointConfig:
    every: Count = 100
    """Steps between checkpoints; one is also saved at the end."""
    keep: Count = 2
    """Newest checkpoints to keep."""


@config
class TrainConfig:
    seed: Seed = 1337
    """Of the weights, the order of the data, dropout and samples."""
    total_tokens: Count = 1_024_000
    """Length of the run, in tokens; rounded up to whole batches."""
    tokens_per_batch: Count = 2048
    """Tokens of one optimizer step, over all workers."""
    batch_ramp: dict[Count, Count] = dataclasses.field(default_factory=dict)
    """Smaller batches at the start: {tokens_per_batch: until so many tokens have been trained on};
    after the last of them, batches of `tokens_per_batch`."""
    seq_len: Count | None = None
    """Tokens in a training sequence; null: the model's context_length."""
    micro_batch_size: Count | None = None
    """Sequences that a worker computes at once; gradient accumulation follows from it. null: the
    largest number up to 16 that divides its share of the batch."""
    num_workers: Count = 1
    """Data-parallel workers; the batch is split over them."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: what is sharded over the workers. 0: nothing; 1: optimizer state; 2: and
    gradients; 3: and weights."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the matrix products (weights stay fp32). auto: bf16 where a probe finds it fast."""
    document_mask: bool = False
    """Attention does not cross the documents of a sequence, and positions restart with each."""
    log_every: Count = 10
    """Steps between lines; metrics.jsonl has every step."""
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def problems(self) -> list[str]:
        found = []
        context = self.model.context_length
        if self.sequence_length > context:
            found.append(
                f"seq_len={self.seq_len} is beyond the model's context: use at most {context}, or "
                f"set model.context_length={self.seq_len}"
            )
        unit = self.sequence_length * self.num_workers * (self.micro_batch_size or 1)
        sizes = [("tokens_per_batch", self.tokens_per_batch)]
        sizes += [("batch_ramp", size) for size in self.batch_ramp]
        for key, size in sizes:
            if size % unit:
                below = size // unit * unit
                parts = f"seq_len {self.sequence_length} x num_workers {self.num_workers}" + (
                    f" x micro_batch_size {self.micro_batch_size}" if self.micro_batch_size else ""
                )
                found.append(
                    f"{key}={size} does not divide by {parts} = {unit}; "
                    f"nearest that do: {f'{below} and ' if below else ''}{below + unit}"
                )
        untils = list(self.batch_ramp.values())
        if len(set(untils)) < len(untils):
            found.append(f"batch_ramp={self.batch_ramp}: two sizes end at the same token count")
        return found

    @property
    def sequence_length(self) -> int:
        return self.seq_len or self.model.context_length

    @property
    def stages(self) -> tuple[Stage, ...]:
        return make_stages(self.batch_ramp, self.sequence_length, self.tokens_per_batch)

    @property
    def micro_batch(self) -> int:
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        shares = [stage.sequences_per_batch // self.num_workers for stage in self.stages]
        share = math.gcd(*shares)
        return max(n for n in range(1, MAX_DEFAULT_MICRO_BATCH + 1) if share % n == 0)

    def grad_accum_steps(self, step: int) -> int:
        """Micro batches of each worker in step `step` (0 is the first)."""
        sequences = stage_of(self.stages, step).sequences_per_batch
        return sequences // self.num_workers // self.micro_batch

    def tokens_before(self, step: int) -> int:
        """Tokens of the steps before this one."""
        return sequences_before(self.stages, step) * self.sequence_length

    @property
    def total_steps(self) -> int:
        return batches_for(self.stages, self.total_tokens, self.sequence_length)

    def derived(self) -> dict[str, Any]:
        """Values that follow from the keys, shown by --dry-run."""
        return {
            "steps": self.total_steps,
            "sequence length": self.sequence_length,
            "sequences per batch": self.tokens_per_batch // self.sequence_length,
            "micro batch size": self.micro_batch,
            "gradient accumulation steps": self.grad_accum_steps(self.total_steps),
        }
