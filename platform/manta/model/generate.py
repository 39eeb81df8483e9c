"""Text from a model, token by token, with a KV cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from manta.config import Count, NonNegativeFloat, Seed, config
from manta.model.gpt import GPT, KVCache


@config
class GenerateConfig:
    checkpoint: str = "quickstart"
    """A run's name or folder (its newest checkpoint), or a checkpoint's folder."""
    prompt: str = "def main("
    """Text to complete."""
    max_tokens: Count = 128
    """Tokens to add at most; the model may end its text before."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature; 0: always the likeliest token."""
    top_k: Count | None = 50
    """Sample among so many likeliest tokens; null: all."""
    num_samples: Count = 1
    """Completions to write."""
    seed: Seed = 0
    """Of the sampling: the same seed gives the same text."""
    home: str | None = None
    """Folder or URI for data and runs; null: $MANTA_HOME, or ~/manta."""


def generate(
    model: GPT,
    prompt: list[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yields up to `max_tokens` ids that follow `prompt`, ending before the id `stop`.

    temperature 0 takes the likeliest token. When the context is full, its older half is dropped
    and the rest read anew, with and without the cache alike, so that both give the same tokens.
    """
    assert prompt, "a prompt has at least one token"
    device = model.embedding.weight.device
    length = model.config.context_length
    # On the CPU, so that a seed gives the same draws on every device.
    random = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        window = prompt[-length:]
        cache: KVCache | None = None
        pending = window
        for _ in range(max_tokens):
            if len(window) > length:
                window = window[-max(1, length // 2) :]
                cache, pending = None, window
            if use_cache and cache is None:
                cache = KVCache(model.config, 1, length, device)
            fed = pending if use_cache else window
            with torch.no_grad():
                logits = model(torch.tensor([fed], device=device), cache=cache, last_only=True)
            token = pick(logits[0, -1].float().cpu(), temperature, top_k, random)
            if token == stop:
                return
            yield token
            window = [*window, token]
            pending = [token]
    finally:
        model.train(was_training)


def pick(logits: Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    """One id from (V,) logits."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = torch.softmax(logits / temperature, dim=0)
    return int(torch.multinomial(probabilities, 1, generator=random))
