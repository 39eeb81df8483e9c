"""Text from a model, token by token, with a cache."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from manta.model.cache import Cache
from manta.model.gpt import LanguageModel
from manta.model.inference import send, without_cudnn_attention
from manta.model.sampling import EVERY_TOKEN, Sampling, draws, pick


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
