"""What computes: a model that scores batches of rows, and completes prompts."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from manta.evaluate.rows import Row
from manta.model.generate import generate
from manta.model.gpt import GPT
from manta.text.tokenizer import Tokenizer

Pool = Callable[[str, Sequence[Any]], Iterator[Any]]
"""`pool("score", batches)`: what a worker's method returns for each item, in their order."""


@dataclasses.dataclass(frozen=True)
class Scored:
    pair: int
    """Whose score it is: its place among what was asked."""
    log_likelihood: float
    """nats"""
    is_greedy: bool
    """Whether each token was the likeliest."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    text: str
    max_tokens: int
    temperature: float
    stops: tuple[str, ...]


class Worker:
    """A model on its device. Log-likelihoods are in fp32, or under bf16 autocast; completions in
    fp32."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, dtype: str = "fp32"):
        self.model = model.eval()
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._place = model.embedding.weight.device

    @torch.no_grad()
    def score(self, batch: list[Row]) -> list[Scored]:
        """The answers of the rows, in their order. Padding is at the end of a row, where nothing
        sees it."""
        longest = max(len(row.tokens) for row in batch)
        tokens = self._padded([row.tokens for row in batch], longest, 0)
        branches = None
        if batch[0].branches is not None:
            own = [row.branches or () for row in batch]
            branches = self._padded(own, longest, 1 + max(max(b) for b in own))
        wanted = torch.zeros(tokens.shape, dtype=torch.bool)
        for index, row in enumerate(batch):
            for answer in row.answers:
                wanted[index, list(answer.places)] = True
        with torch.autocast(self._place.type, torch.bfloat16, enabled=self._dtype == "bf16"):
            logits = self.model(tokens, branches=branches, at=wanted.to(self._place))
        log_probabilities = logits.float().log_softmax(dim=-1)
        likeliest = log_probabilities.argmax(dim=-1)
        # Where in the logits each wanted place is.
        number = torch.zeros(tokens.shape, dtype=torch.long)
        number[wanted] = torch.arange(int(wanted.sum()))
        found = []
        for index, row in enumerate(batch):
            for answer in row.answers:
                lines = number[index, list(answer.places)].to(self._place)
                targets = torch.tensor(answer.tokens, device=self._place)
                score = log_probabilities[lines, targets].sum().item()
                is_greedy = bool((likeliest[lines] == targets).all())
                found.append(Scored(answer.pair, score, is_greedy))
        return found

    def _padded(self, rows: list[tuple[int, ...]], length: int, filler: int) -> Tensor:
        padded = torch.full((len(rows), length), filler)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = torch.tensor(row)
        return padded.to(self._place)

    def complete(self, prompt: Prompt) -> str:
        """A completion, ending before the first of its stop strings."""
        text = ""
        tokens: list[int] = []
        for token in generate(
            self.model,
            self._tokenizer.encode(prompt.text) or [self._tokenizer.eot],
            prompt.max_tokens,
            temperature=prompt.temperature,
            stop=self._tokenizer.eot,
        ):
            tokens.append(token)
            text = self._tokenizer.decode(tokens)
            if any(stop in text for stop in prompt.stops):
                break
        ends = [text.index(stop) for stop in prompt.stops if stop in text]
        return text[: min(ends)] if ends else text


def pool_of(worker: Worker) -> Pool:
    """One worker, in this process."""
    return lambda method, items: map(getattr(worker, method), items)
