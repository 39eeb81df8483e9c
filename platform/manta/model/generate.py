"""Text from a model, token by token, with a KV cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from manta.config import Count, NonNegativeFloat, Seed, config
from manta.model.cache import KVCache
from manta.model.gpt import GPT


@config
class GenerateConfig:
    checkpoint: str = "quickstart"
    """A run's name or folder (its newest checkpoint), or a checkpoint's folder."""
    prompt: str = "def main("
    """Text to complete."""
    prompts: tuple[str, ...] = ()
    """Several texts to complete, all at once, instead of `prompt`."""
    max_tokens: Count = 128
    """Tokens to add at most; the model may end its text before."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature; 0: always the likeliest token."""
    top_k: Count | None = 50
    """Sample among so many likeliest tokens; null: all."""
    num_samples: Count = 1
    """Completions of each text; those of several come all at once."""
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
    batch = generate_batch(
        model,
        [prompt],
        max_tokens,
        seeds=[seed],
        temperature=temperature,
        top_k=top_k,
        stop=stop,
        use_cache=use_cache,
    )
    for new in batch:
        yield new[0]


def generate_batch(
    model: GPT,
    prompts: list[list[int]],
    max_tokens: int,
    *,
    seeds: list[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    stop: int | None = None,
    use_cache: bool = True,
) -> Iterator[dict[int, int]]:
    """Yields, up to `max_tokens` times, the next id of each prompt that has not ended, by the
    prompt's place; each gets what `generate` gives it alone, with its own seed."""
    assert prompts and all(prompts), "a prompt has at least one token"
    device, length = model.embedding.weight.device, model.config.context_length
    # On the CPU, so that a seed gives the same draws on every device.
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    windows = {i: prompt[-length:] for i, prompt in enumerate(prompts)}
    # Inference mode spares a token a quarter of its time. But weights that are sharded (ZeRO stage
    # 3; empty until a layer runs) would be gathered in it, and could not be trained afterwards.
    fast = all(weight.numel() for weight in model.parameters())
    with torch.inference_mode(fast):
        cache = KVCache(model.config, len(prompts), length if use_cache else 0, device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_tokens):
            for i in windows:
                if len(windows[i]) > length:
                    windows[i] = windows[i][-max(1, length // 2) :]
            if use_cache:
                logits = _with_cache(model, cache, list(windows.values()), fast)
            else:
                logits = torch.cat([_logits(model, [w], fast) for w in windows.values()])
            new = {
                i: pick(row, temperature, top_k, randoms[i])
                for i, row in zip(windows, logits.float().cpu(), strict=True)
            }
            going = [place for place, token in enumerate(new.values()) if token != stop]
            if len(going) < len(new):
                new = {i: token for i, token in new.items() if token != stop}
                cache.keep(going)
            if not new:
                return
            windows = {i: [*windows[i], token] for i, token in new.items()}
            yield new
    finally:
        model.train(was_training)


def _logits(model: GPT, rows: list[list[int]], fast: bool, cache: KVCache | None = None) -> Tensor:
    """(B, V) after the last of the tokens in each row."""
    tokens = torch.tensor(rows, device=model.embedding.weight.device)
    with torch.inference_mode(fast), torch.no_grad():
        return model(tokens, cache=cache, last_only=True)[:, -1]


def _with_cache(model: GPT, cache: KVCache, windows: list[list[int]], fast: bool) -> Tensor:
    """The same, of windows of which the cache may hold all but the last token. What it lacks is
    read first, and then the last token of all rows at once."""
    lacking = [row for row, w in enumerate(windows) if cache.lengths[row] != len(w) - 1]
    alike = len(lacking) == len(windows) and len({len(w) for w in windows}) == 1
    for rows in [lacking] if alike else [[row] for row in lacking]:
        part = cache if alike else cache.row(rows[0])
        part.lengths = [0] * len(rows)
        if len(windows[rows[0]]) > 1:
            _logits(model, [windows[row][:-1] for row in rows], fast, part)
        for row, seen in zip(rows, part.lengths, strict=True):
            cache.lengths[row] = seen
    return _logits(model, [window[-1:] for window in windows], fast, cache)


def pick(logits: Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    """One id from (V,) logits."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    # The first token at which the sum passes a number drawn evenly below the whole: a tenth of
    # what torch.multinomial takes, which draws a number for each token.
    sums = torch.softmax(logits.double() / temperature, dim=0).cumsum(0)
    drawn = torch.rand(1, generator=random, dtype=torch.float64) * sums[-1]
    below = sums[-1].nextafter(sums.new_zeros(()))  # where the product rounds up to the whole
    return int(torch.searchsorted(sums, drawn.minimum(below), right=True))
