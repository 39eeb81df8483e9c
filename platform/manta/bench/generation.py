"""Generation: with the KV cache against without, and many prompts at once against one."""

import dataclasses
import statistics
import time
from typing import Any

import torch

from manta.bench.settings import BenchConfig
from manta.model.generate import generate_batch
from manta.model.gpt import GPT, num_parameters
from manta.train.device import available_cpus, find_device

PROMPT = 16
BATCH = 8


def generation(c: BenchConfig) -> dict[str, Any]:
    """Tokens/s of a new model of the config's shape: the speed does not depend on its weights."""
    device = find_device("fp32", bool(c.gpus_per_worker), c.threads_per_worker or available_cpus())
    shape = c.expected_model
    context = max(shape.context_length, PROMPT + c.new_tokens)
    shape = dataclasses.replace(shape, context_length=context)
    torch.manual_seed(c.seed)
    model = GPT(shape).to(device.torch_device)
    rates: dict[str, list[float]] = {"cached": [], "uncached": [], "batched": []}
    for index in range(c.rounds + 1):
        found = {
            "cached": _rate(model, c, 1, True),
            "batched": _rate(model, c, BATCH, True),
            "uncached": _rate(model, c, 1, False),
        }
        for key, rate in found.items() if index else ():  # the first round warms up
            rates[key].append(rate)
    pairs = list(zip(rates["cached"], rates["uncached"], rates["batched"], strict=True))
    return {
        "device": device.description,
        "parameters": num_parameters(shape),
        "new_tokens": c.new_tokens,
        "batch": BATCH,
        **{f"{key}_tokens_per_second": statistics.median(found) for key, found in rates.items()},
        "cached_ratio": statistics.median(a / b for a, b, _ in pairs),
        "cached_ratios": [a / b for a, b, _ in pairs],
        "batched_ratio": statistics.median(b / a for a, _, b in pairs),
    }


def _rate(model: GPT, c: BenchConfig, prompts: int, use_cache: bool) -> float:
    """Tokens/s over all prompts."""
    started = time.perf_counter()
    count = 0
    for new in generate_batch(
        model,
        [list(range(i, i + PROMPT)) for i in range(prompts)],
        c.new_tokens,
        seeds=list(range(prompts)),
        use_cache=use_cache,
    ):
        count += len(new)
    return count / (time.perf_counter() - started)


def table(result: dict[str, Any]) -> str:
    ratios = result["cached_ratios"]
    return "\n".join(
        [
            f"device             {result['device']}, fp32",
            f"model              {result['parameters'] / 1e6:,.1f}M parameters, "
            f"{result['new_tokens']} new tokens",
            f"without cache      {result['uncached_tokens_per_second']:>10,.1f} tok/s",
            f"with KV cache      {result['cached_tokens_per_second']:>10,.1f} tok/s",
            f"  / without        {result['cached_ratio']:>10.1f}x  (median of {len(ratios)} "
            f"rounds, {min(ratios):.1f}x to {max(ratios):.1f}x)",
            f"{result['batch']} prompts at once  "
            f"{result['batched_tokens_per_second']:>10,.1f} tok/s",
            f"  / one            {result['batched_ratio']:>10.1f}x",
        ]
    )
