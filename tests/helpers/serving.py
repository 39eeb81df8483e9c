"""Requests to a batch that a test steps itself, and what each of them gets alone."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helpers.models import small_model
from manta.model.memory import cache_bytes
from manta.model.sampling import draws, pick
from manta.serve.engine.batch import Batch
from manta.serve.engine.request import Ended, Event, Failed, Piece, Request, Started
from manta.serve.engine.row import Handle, Row
from manta.text import tokenizer as tokenizers
from manta.text.streaming import ids_before
from manta.text.tokenizer import Tokenizer

CONTEXT = 32
VOCAB = 280  # of the models; the tokenizer has fewer


@functools.cache
def made_tokenizer() -> Tokenizer:
    return tokenizers.train(["the cat and the dog\n", "naïve 🐟\n"] * 20, 270)


@functools.cache
def serving_model(name: str) -> Any:
    return small_model(name, context_length=CONTEXT, vocab_size=VOCAB)


class Asked:
    """A request in a batch, and what it was told."""

    def __init__(self, batch: Batch, request: Request):
        self.request, self.events = request, list[Event]()
        self.handle = Handle()
        row = Row(request, self.events.append, self.handle, made_tokenizer(), batch.context_length)
        batch.add(row)

    @property
    def started(self) -> Started:
        (found,) = (event for event in self.events if isinstance(event, Started))
        return found

    @property
    def ended(self) -> Ended:
        found = self.events[-1]
        assert isinstance(found, Ended), self.events
        return found

    @property
    def failed(self) -> Failed:
        found = self.events[-1]
        assert isinstance(found, Failed), self.events
        return found

    @property
    def is_over(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Ended | Failed)

    @property
    def pieces(self) -> list[Piece]:
        return [event for event in self.events if isinstance(event, Piece)]


def batch_of(
    model: Any, *, tokens: int = 4096, limit: int | None = None, most: int = 4, chunk: int = 4
) -> Batch:
    """A batch whose caches have room for so many tokens, or for 64 states, or `limit` bytes."""
    if limit is None:
        limit = cache_bytes(model.config, tokens, "fp32") * (64 if model.window is None else 1)
    size = made_tokenizer().vocab_size
    return Batch(model, "fp32", size, limit=limit, most_running=most, chunk=chunk)


def run(batch: Batch, most_steps: int = 2000) -> None:
    """Steps until nobody waits."""
    with torch.inference_mode():
        for _ in range(most_steps):
            if batch.is_idle:
                return
            step(batch)
    raise AssertionError(f"not done after {most_steps} steps: {batch.counts()}")


def step(batch: Batch) -> None:
    """A step, after which the counted bytes are those of the tensors, and within the limit."""
    with torch.inference_mode():
        batch.step()
    texts = batch.prefixes
    caches = [texts.look(text) for text in texts.texts]
    assert texts.nbytes == sum(cache.store.nbytes for cache in caches)
    running = [row.cache for row in batch.running if row.cache is not None]
    real = sum(cache.store.nbytes for cache in [*caches, *running])
    counts = batch.counts()
    assert real <= counts.cache_bytes <= counts.cache_limit


def ask(batch: Batch, *prompt: int, **keys: Any) -> Asked:
    """Asks for the likeliest five tokens after a prompt, and waits for them."""
    asked = Asked(batch, request(prompt, **keys))
    run(batch)
    return asked


def request(prompt: Sequence[int], max_tokens: int = 5, **keys: Any) -> Request:
    from manta.model.sampling import Sampling

    keys = {"sampling": Sampling(temperature=0), **keys}
    return Request(tuple(prompt), max_tokens, **keys)


def alone(model: Any, asked: Request) -> Ended:
    """What a request gets from a plain loop: no cache, and all tokens computed again each time."""
    tokenizer = made_tokenizer()
    ids, prompt = list(asked.prompt), len(asked.prompt)
    numbers = draws([asked.seed], torch.device("cpu"))
    longest = min(CONTEXT, prompt + asked.max_tokens)
    while len(ids) < longest:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[:, -1]
        logits = adjusted(logits[0], asked, ids, ids[prompt:]).unsqueeze(0)
        token = int(pick(logits[:, : tokenizer.vocab_size], asked.sampling, next(numbers)))
        if token in asked.ends:
            return Ended("stop", tuple(ids[prompt:]), tokenizer.decode(ids[prompt:]))
        ids.append(token)
        kept = ids_before(tokenizer, ids[prompt:], asked.stop)
        if kept != ids[prompt:]:
            return Ended("stop", tuple(kept), tokenizer.decode(kept))
    return Ended("length", tuple(ids[prompt:]), tokenizer.decode(ids[prompt:]))


def adjusted(logits: Tensor, asked: Request, seen: list[int], answer: list[int]) -> Tensor:
    """(V,) logits after penalties and biases, id by id."""
    logits = logits.clone()
    for id in set(seen):
        r = asked.penalties.repetition
        logits[id] = logits[id] / r if logits[id] > 0 else logits[id] * r
    for id in set(answer):
        logits[id] -= asked.penalties.presence + asked.penalties.frequency * answer.count(id)
    for id, bias in asked.logit_bias.items():
        logits[id] += bias
    return logits
