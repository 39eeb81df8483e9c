"""Text from a model, token by token, with a cache."""

import dataclasses
from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from manta.model.cache import Cache
from manta.model.gpt import LanguageModel
from manta.model.inference import send, without_cudnn_attention

DRAWN_AT_ONCE = 256  # random numbers for each row, one per token


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits."""

    temperature: float = 1.0
    """Divides the logits; 0: always the likeliest token."""
    top_k: int | None = None
    """The number of likeliest tokens to choose among; None: all."""
    top_p: float = 1.0
    """Choose among the fewest of the likeliest tokens whose probability, after temperature and
    top_k, is at least this (nucleus sampling, Holtzman et al. 2020); 1: all."""
    vocab_size: int | None = None
    """The number of ids that the tokenizer has. Ids beyond it, which a model may have, stand for no
    text and are never chosen. None: all of the model's."""


EVERY_TOKEN = Sampling()


def generate(
    model: LanguageModel,
    prompt: list[int],
    max_tokens: int,
    *,
    sampling: Sampling = EVERY_TOKEN,
    stop: int | Collection[int] | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yields up to `max_tokens` ids that follow `prompt`, ending before the id `stop`,
    or one of several.

    When the context of a GPT is full, its older half is dropped and the rest read again. This
    happens with and without the cache, so that both give the same tokens. An LSTM reads and writes
    texts of any length: its state goes on.
    """
    batch = generate_batch(
        model,
        [prompt],
        max_tokens,
        seeds=[seed],
        sampling=sampling,
        stop=stop,
        use_cache=use_cache,
    )
    for new in batch:
        yield new[0]


def generate_batch(
    model: LanguageModel,
    prompts: list[list[int]],
    max_tokens: int,
    *,
    seeds: list[int],
    sampling: Sampling = EVERY_TOKEN,
    stop: int | Collection[int] | None = None,
    use_cache: bool = True,
) -> Iterator[dict[int, int]]:
    """Yields the next id of each prompt that has not ended, by the prompt's place, up to
    `max_tokens` times. Each prompt gets what `generate` gives it alone with the same seed.

    Tokens stay on the model's device from one step to the next; the host waits for the device once
    per token, to read them.
    """
    assert prompts and all(prompts), "a prompt has at least one token"
    ends = {stop} if isinstance(stop, int) else set(stop or ())
    assert len(seeds) == len(prompts), "each prompt has a seed"
    device = model.embedding.weight.device
    whole = max(map(len, prompts)) + max_tokens  # no text becomes longer
    length = whole if model.window is None else model.window
    # Inference mode saves a quarter of each token's time. But it would also gather sharded weights
    # (ZeRO stage 3; empty until a layer runs), which could not be trained afterwards.
    fast = all(weight.numel() for weight in model.parameters())
    windows = [prompt[-length:] for prompt in prompts]
    numbers = draws(seeds, device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(fast):
            cache = model.new_cache(len(prompts), min(length, whole)) if use_cache else None
            newest = send(torch.tensor([window[-1] for window in windows]), device)
            places = torch.arange(len(prompts), device=device)
        going = list(range(len(prompts)))  # the host's copy of `places`
        for _ in range(max_tokens):
            for window in windows:
                if len(window) > length:
                    del window[: -max(1, length // 2)]
            # These modes end before each yield, as the caller may train before it asks again.
            with torch.inference_mode(fast), torch.no_grad(), without_cudnn_attention():
                if cache is None:
                    logits = torch.cat([_logits(model, [window]) for window in windows])
                else:
                    logits = _with_cache(model, cache, windows, newest)
                newest = pick(logits, sampling, next(numbers)[places])
                tokens = newest.tolist()
                rows = [row for row, token in enumerate(tokens) if token not in ends]
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


def draws(seeds: list[int], device: torch.device) -> Iterator[Tensor]:
    """Yields (B,) numbers in [0, 1) for each token, the next of each seed's own sequence.

    The CPU draws them, many at once, so that a seed gives the same numbers on every device.
    """
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        drawn = [torch.rand(DRAWN_AT_ONCE, generator=r, dtype=torch.float64) for r in randoms]
        yield from send(torch.stack(drawn, dim=1), device)


def _with_cache(
    model: LanguageModel, cache: Cache, windows: list[list[int]], newest: Tensor
) -> Tensor:
    """Computes the (B, V) logits after the windows' last tokens; `newest` has these, (B,), on the
    device. Reads what the cache lacks of the tokens before them, then the last tokens of all rows
    at once."""
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


def _logits(model: LanguageModel, rows: list[list[int]], cache: Cache | None = None) -> Tensor:
    """Computes the (B, V) logits after the last token of each row."""
    tokens = send(torch.tensor(rows), model.embedding.weight.device)
    return model(tokens, cache=cache, last_only=True)[:, -1]


def pick(logits: Tensor, sampling: Sampling, numbers: Tensor) -> Tensor:
    """Picks (B,) ids from (B, V) logits. A temperature of 0 takes the likeliest ids, any other the
    ids on which `numbers` fall: (B,) float64, drawn evenly from [0, 1)."""
    logits = logits[:, : sampling.vocab_size]
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    if sampling.top_k is not None and sampling.top_k < logits.size(1):
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    # Take the first id at which the sum passes the number's share of the whole. This needs a tenth
    # of the time of torch.multinomial, which draws a number for each id.
    logits = logits.double() - logits.max(dim=1, keepdim=True).values  # at most 0: none overflows
    shares = torch.softmax(logits / sampling.temperature, dim=1)
    if sampling.top_p < 1:
        shares = nucleus(shares, sampling.top_p)
    sums = shares.cumsum(1)
    whole = sums[:, -1:]
    below = whole.nextafter(torch.zeros_like(whole))  # for products that round up to the whole
    places = (numbers.unsqueeze(1) * whole).minimum(below)
    return torch.searchsorted(sums, places, right=True).squeeze(1)


def nucleus(shares: Tensor, top_p: float) -> Tensor:
    """Keeps of each row of (B, V) probabilities the largest ones, as few as have a sum of at least
    `top_p`, and sets the others to 0. Of equal ones, those with lower ids are kept."""
    ordered, ids = shares.sort(dim=1, descending=True, stable=True)
    larger = F.pad(ordered.cumsum(1)[:, :-1], (1, 0))  # the sum of those before each
    is_out = torch.zeros_like(shares, dtype=torch.bool).scatter(1, ids, larger >= top_p)
    return shares.masked_fill(is_out, 0.0)
