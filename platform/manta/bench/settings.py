"""What to measure, and how long."""

from typing import Literal

from manta.config import Count, PositiveFloat, config
from manta.train.settings import PretrainConfig

ON_RAY = ("overhead", "data", "tokenize")


@config
class BenchConfig(PretrainConfig):
    what: Literal[
        "model",
        "overhead",
        "data",
        "tokenize",
        "checkpoint",
        "evaluate",
        "generate",
        "memory",
        "gpu",
    ] = "model"
    """What to measure. model: the training step by its parts; overhead: the platform against a bare
    PyTorch loop; data: the stream against a bare pyarrow read of the same shards; tokenize:
    preparation against tiktoken; checkpoint: a save against a bare write; evaluate: lm-eval's
    requests in batches against one by one; generate: sampling with and without the KV cache, and
    of many prompts at once; memory: what each ZeRO stage holds on two workers, against the cost
    model. num_workers counts for model and overhead. gpus_per_worker=1 and dtype count for evaluate
    and generate, too, where dtype=auto is as in their jobs: fp32 for evaluate; for generate bf16 on
    a GPU that computes in it, else fp32. gpu: all that a GPU is to show, part by part, with
    settings of its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """gpu: where its parts run; cpu is for trying out the command itself."""
    size: Literal["full", "tiny"] = "full"
    """gpu: full has GPT-2 of 124M, 350M and 1.5B parameters; tiny one of a few thousand."""
    seconds: PositiveFloat = 600.0
    """gpu: the most that all of it takes; what there is no time for is skipped, which is said."""
    parts: str | None = None
    """gpu: the parts to run, in this order, with commas between their names; null: all."""
    patience: PositiveFloat = 1.0
    """gpu: factor of the time-outs of its parts, for a slower machine."""
    json: str | None = None
    """Where to write the figures as JSON; null: nowhere."""
    rounds: Count = 8
    """Times that A and B are measured in turn; one more round warms up."""
    profile: bool = False
    """model: write a trace of one step, which ui.perfetto.dev opens."""
    new_tokens: Count = 512
    """generate: tokens to add to each prompt."""
    steps_per_round: Count = 10
    """model: steps in a round; overhead: steps of A, then of B."""
    tokens: Count = 1 << 27
    """data: tokens of the dataset that is made to be read, and read in a round."""
    text_bytes: Count = 256 << 20
    """tokenize: bytes of text that are prepared in a round; repeated from data.source, with a
    number in front of each document."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.profile and self.what != "model":
            found.append(f"profile=true is for what=model, not {self.what}: omit it")
        own = {
            "device": "auto",
            "size": "full",
            "seconds": 600.0,
            "parts": None,
            "patience": 1.0,
        }
        for key, default in own.items():
            if self.what != "gpu" and getattr(self, key) != default:
                found.append(
                    f"{key}={getattr(self, key)} is for what=gpu, not {self.what}: omit it"
                )
        return found
