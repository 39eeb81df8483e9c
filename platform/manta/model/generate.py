"""Text from a model, token by token, with a KV cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from manta.model.cache import KVCache
from manta.model.gpt import GPT
from manta.model.inference import send, without_cudnn_attention

DRAWN_AT_ONCE = 256  # numbers for each row, one a token


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
    and the rest read again, with and without the cache alike, so that both give the same tokens.
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
    prompt's place; each gets what `generate` gives it alone, with its own seed.

    Tokens go from one step to the next on the model's device; the host waits for it once a token,
    to read them.
    """
    assert prompts and all(prompts), "a prompt has at least one token"
    assert len(seeds) == len(prompts), "each prompt has a seed"
    device, length = model.embedding.weight.device, model.config.context_length
    # Inference mode spares a token a quarter of its time. But weights that are sharded (ZeRO stage
    # 3; empty until a layer runs) would be gathered in it, and could not be trained afterwards.
    fast = all(weight.numel() for weight in model.parameters())
    windows = [prompt[-length:] for prompt in prompts]
    numbers = _numbers(seeds, device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(fast):
            longest = min(length, max(map(len, windows)) + max_tokens)
            cache = KVCache(model.config, len(prompts), longest, device) if use_cache else None
            newest = send(torch.tensor([window[-1] for window in windows]), device)
            places = torch.arange(len(prompts), device=device)
        going = list(range(len(prompts)))  # `places`, as the host knows them
        for _ in range(max_tokens):
            for window in windows:
                if len(window) > length:
                    del window[: -max(1, length // 2)]
            # None of these may last while the caller has a token, and perhaps trains.
            with torch.inference_mode(fast), torch.no_grad(), without_cudnn_attention():
                if cache is None:
                    logits = torch.cat([_logits(model, [window]) for window in windows])
                else:
                    logits = _with_cache(model, cache, windows, newest)
                newest = pick(logits, temperature, top_k, next(numbers)[places])
                tokens = newest.tolist()
                rows = [row for row, token in enumerate(tokens) if token != stop]
                if len(rows) < len(tokens):
                    if not rows:
                        return
                    windows = [windows[row] for row in rows]
                    going, tokens = [going[row] for row in rows], [tokens[row] for row in rows]
                    kept = send(torch.tensor(rows), device)
                    places, newest = places[kept], newest[kept]
                    if cache is not None:
                        cache.keep(rows)
            for window, token in zip(windows, tokens, strict=True):
                window.append(token)
            yield dict(zip(going, tokens, strict=True))
    finally:
        model.train(was_training)


def _numbers(seeds: list[int], device: torch.device) -> Iterator[Tensor]:
    """Yields for each token (B,) numbers in [0, 1), the next of each seed's own sequence.

    The CPU draws them, so that a seed gives the same ones on every device, and many at once.
    """
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        drawn = [torch.rand(DRAWN_AT_ONCE, generator=r, dtype=torch.float64) for r in randoms]
        yield from send(torch.stack(drawn, dim=1), device)


def _with_cache(model: GPT, cache: KVCache, windows: list[list[int]], newest: Tensor) -> Tensor:
    """(B, V) after the last tokens of the windows, (B,) on the device, when the cache may hold what
    stands before them. What it lacks is read first, and then the last token of all rows at once."""
    lacking = [row for row, w in enumerate(windows) if cache.lengths[row] != len(w) - 1]
    alike = len(lacking) == len(windows) and len({len(w) for w in windows}) == 1
    for rows in [lacking] if alike else [[row] for row in lacking]:
        part = cache if alike else cache.row(rows[0])
        part.clear()
        if len(windows[rows[0]]) > 1:
            _logits(model, [windows[row][:-1] for row in rows], part)
        for row, seen in zip(rows, part.lengths, strict=True):
            cache.lengths[row] = seen
    return model(newest.unsqueeze(1), cache=cache, last_only=True)[:, -1]


def _logits(model: GPT, rows: list[list[int]], cache: KVCache | None = None) -> Tensor:
    """(B, V) after the last of the tokens in each row."""
    tokens = send(torch.tensor(rows), model.embedding.weight.device)
    return model(tokens, cache=cache, last_only=True)[:, -1]


def pick(logits: Tensor, temperature: float, top_k: int | None, numbers: Tensor) -> Tensor:
    """(B,) ids from (B, V) logits, where a temperature of 0 takes the likeliest, and others what
    (B,) float64 numbers that are drawn evenly from [0, 1) fall on."""
    if temperature == 0:
        return logits.argmax(dim=1)
    if top_k is not None and top_k < logits.size(1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    # The first token at which the sum passes the number's share of the whole: a tenth of what
    # torch.multinomial takes, which draws a number for each token.
    sums = torch.softmax(logits.double() / temperature, dim=1).cumsum(1)
    whole = sums[:, -1:]
    below = whole.nextafter(torch.zeros_like(whole))  # where the product rounds up to the whole
    shares = (numbers.unsqueeze(1) * whole).minimum(below)
    return torch.searchsorted(sums, shares, right=True).squeeze(1)
