"""A worker: a model that scores batches of rows and completes prompts."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manta.data import conversations, preferences
from manta.evaluate.rows import Row
from manta.model.generate import Sampling, generate
from manta.model.gpt import LanguageModel
from manta.model.inference import inference, send
from manta.text.tokenizer import Tokenizer
from manta.train.objectives.preference import batch_of

Pool = Callable[[str, Iterable[Any]], Iterator[Any]]
"""`pool("score", batches)` gives what a worker's method returns for each item, in their order."""


@dataclasses.dataclass(frozen=True)
class Scored:
    pair: int
    """Index of the pair among all pairs of the request."""
    log_likelihood: float
    """Log-likelihood of the continuation, in nats."""
    is_greedy: bool
    """Whether each token was the likeliest one."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    tokens: tuple[int, ...]
    """The ids of the prompt, at least one."""
    max_tokens: int
    stops: tuple[str, ...]
    """Strings before which the completion ends; none is empty."""
    sampling: Sampling
    seed: int


class Worker:
    """A model on its device; it scores and completes in fp32, or in bf16 by autocast."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, dtype: str = "fp32"):
        self.model = model.eval()
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._place = model.embedding.weight.device
        self._rule: conversations.Rule | None = None

    def score(self, batch: list[Row]) -> list[Scored]:
        """The scores of the rows' answers, in their order. Padding is at the end of a row, where no
        token attends to it."""
        longest = max(len(row.tokens) for row in batch)
        tokens = self._padded([row.tokens for row in batch], longest, 0)
        branches = None
        if batch[0].branches is not None:
            own = [row.branches or () for row in batch]
            branches = self._padded(own, longest, 1 + max(max(b) for b in own))
        answers = [(index, answer) for index, row in enumerate(batch) for answer in row.answers]
        wanted = torch.zeros(tokens.shape, dtype=torch.bool)
        for index, answer in answers:
            wanted[index, list(answer.places)] = True
        # The logits have lines for the wanted places only: `number` is the line of a place.
        number = torch.zeros(tokens.shape, dtype=torch.long)
        number[wanted] = torch.arange(int(wanted.sum()))
        lines = torch.cat([number[index, list(answer.places)] for index, answer in answers])
        targets = torch.tensor([token for _, answer in answers for token in answer.tokens])
        lines, targets = send(lines, self._place), send(targets, self._place)
        with inference(self._place, self._dtype):
            logits = self.model(tokens, branches=branches, at=send(wanted, self._place))
            log_probabilities = logits.float().log_softmax(dim=-1)
            scores = log_probabilities[lines, targets].cpu()
            hits = (log_probabilities.argmax(dim=-1)[lines] == targets).cpu()
        lengths = [len(answer.tokens) for _, answer in answers]
        return [
            Scored(answer.pair, score.double().sum().item(), bool(hit.all()))
            for (_, answer), score, hit in zip(
                answers, scores.split(lengths), hits.split(lengths), strict=True
            )
        ]

    def _padded(self, rows: list[tuple[int, ...]], length: int, filler: int) -> Tensor:
        padded = torch.full((len(rows), length), filler)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = torch.tensor(row)
        return send(padded, self._place)

    def answers(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """The log-probabilities of the answers in rows of pairs (B, T + 1), in nats, float64, after
        their keys (`data.preferences`) and before the number of rows."""
        rule = self._rule or conversations.rule(self._tokenizer, "last")
        self._rule = rule
        ids = rows.astype(np.int64)
        found = preferences.answers_in(rule, ids)
        batch = batch_of(found, ids, np.zeros(len(found.keys)))
        tokens, targets = batch.to(self._place)
        with inference(self._place, self._dtype):
            documents = rule.documents(tokens)
            nats = self.model(tokens, targets.ids, documents=documents, reduction="none")
        return found.keys, targets.logp(nats).cpu().numpy(), len(rows)

    def complete(self, prompt: Prompt) -> str:
        """A completion that ends before the first of its stop strings."""
        text = ""
        tokens: list[int] = []
        with inference(self._place, self._dtype):
            for token in generate(
                self.model,
                list(prompt.tokens),
                prompt.max_tokens,
                sampling=prompt.sampling,
                stop=self._tokenizer.ends,
                seed=prompt.seed,
            ):
                tokens.append(token)
                text = self._tokenizer.decode(tokens)
                if any(stop in text for stop in prompt.stops):
                    break
        ends = [text.index(stop) for stop in prompt.stops if stop in text]
        return text[: min(ends)] if ends else text


def pool_of(worker: Worker) -> Pool:
    """A pool of one worker, in this process."""
    return lambda method, items: map(getattr(worker, method), items)
