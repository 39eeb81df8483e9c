"""The objective of conversations: the trained tokens of each, which does not see the others."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from manta.data import conversations
from manta.data.conversations import Rule
from manta.text.conversations import Turn
from manta.text.templates import Template
from manta.train.objectives.next_token import Batch, NextToken, ahead


@dataclasses.dataclass(frozen=True)
class Answers(NextToken):
    rule: Rule

    def batch(self, ids: np.ndarray) -> Batch:
        trained = conversations.trained(self.rule, ids.astype(np.int64))
        return Batch(ids, trained, int(np.count_nonzero(trained)))

    def batches(self, ids: Iterator[np.ndarray], at_once: int) -> Iterator[Batch]:
        return ahead(super().batches(ids, at_once), at_once)

    def documents(self, tokens: Tensor) -> Tensor | None:
        return self.rule.documents(tokens)

    def prompt(self, text: str) -> list[int]:
        template = Template.of(self.tokenizer)
        return template.encode([Turn("user", text)], add_generation_prompt=True).ids.tolist()
