"""What to measure, and how long."""

from typing import Literal

from manta.config import Count, config
from manta.train.settings import PretrainConfig

ON_RAY = ("overhead", "data", "tokenize")


@config
class BenchConfig(PretrainConfig):
    what: Literal[
        "model", "overhead", "data", "tokenize", "checkpoint", "evaluate", "generate", "memory"
    ] = "model"
    """What to measure. model: the training step by its parts; overhead: the platform against a bare
    PyTorch loop; data: the stream against a bare pyarrow read of the same shards; tokenize:
    preparation against tiktoken; checkpoint: a save against a bare write; evaluate: lm-eval's
    requests in batches against one by one; generate: sampling with and without the KV cache;
    memory: what each ZeRO stage holds on two workers, against the cost model. num_workers counts
    for model and overhead."""
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
        return found
