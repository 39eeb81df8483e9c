"""What to measure, and how long."""

from typing import Literal

from manta.config import Count, config
from manta.train.pretrain import PretrainConfig


@config
class BenchConfig(PretrainConfig):
    what: Literal["overhead", "data", "tokenize"] = "overhead"
    """What to measure. overhead: the platform against a bare PyTorch loop; data: the stream against
    a bare pyarrow read of the same shards; tokenize: preparation against tiktoken."""
    json: str | None = None
    """Where to write the figures as JSON; null: nowhere."""
    rounds: Count = 8
    """Times that A and B are measured in turn; one more round warms up."""
    steps_per_round: Count = 10
    """overhead: steps of A, then of B, in a round."""
    tokens: Count = 1 << 27
    """data: tokens of the dataset that is made to be read, and read in a round."""
    text_bytes: Count = 256 << 20
    """tokenize: bytes of text that are prepared in a round; repeated from data.source, with a
    number in front of each document."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.num_workers != 1:
            found.append(f"num_workers: what={self.what} measures one worker; omit it")
        return found
