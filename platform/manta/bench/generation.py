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
LAST = 32  # tokens over which the speed at the full length is measured


def generation(c: BenchConfig) -> dict[str, Any]:
    """Tokens/s of a new model of the config's shape: the speed does not depend on its weights."""
    device = find_device("fp32", bool(c.gpus_per_worker), c.threads_per_worker or available_cpus())
    shape = c.expected_model
    context = max(shape.context_length, PROMPT + c.new_tokens)
    shape = dataclasses.replace(shape, context_length=context)
    torch.manual_seed(c.seed)
    model = GPT(shape).to(device.torch_device)
    rates: dict[str, list[float]] = {}
    for index in range(c.rounds + 1):
        found = {}
        found["cached"], found["cached_last"] = _rates(model, c, 1, True)
        found["batched"], _ = _rates(model, c, BATCH, True)
        found["uncached"], found["uncached_last"] = _rates(model, c, 1, False)
        for key, rate in found.items() if index else ():  # the first round warms up
            rates.setdefault(key, []).append(rate)

    def ratios(a: str, b: str) -> list[float]:
        return [x / y for x, y in zip(rates[a], rates[b], strict=True)]

    return {
        "device": device.description,
        "parameters": num_parameters(shape),
        "new_tokens": c.new_tokens,
        "batch": BATCH,
        **{f"{key}_tokens_per_second": statistics.median(found) for key, found in rates.items()},
        "cached_ratio": statistics.median(ratios("cached", "uncached")),
        "cached_ratios": ratios("cached", "uncached"),
        "cached_last_ratio": statistics.median(ratios("cached_last", "uncached_last")),
        "batched_ratio": statistics.median(ratios("batched", "cached")),
    }


def _rates(model: GPT, c: BenchConfig, prompts: int, use_cache: bool) -> tuple[float, float]:
    """Tokens/s over all prompts; and of the last tokens alone, which have all others before."""
    times = [time.perf_counter()]
    for _ in generate_batch(
        model,
        [list(range(i, i + PROMPT)) for i in range(prompts)],
        c.new_tokens,
        seeds=list(range(prompts)),
        use_cache=use_cache,
    ):
        times.append(time.perf_counter())
    last = min(LAST, c.new_tokens)
    whole = prompts * c.new_tokens / (times[-1] - times[0])
    return whole, prompts * last / (times[-1] - times[-1 - last])


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
            f"  at the end, each {result['cached_last_tokens_per_second']:,.1f} and "
            f"{result['uncached_last_tokens_per_second']:,.1f} tok/s, "
            f"{result['cached_last_ratio']:.1f}x",
            f"{result['batch']} prompts at once  "
            f"{result['batched_tokens_per_second']:>10,.1f} tok/s",
            f"  / one            {result['batched_ratio']:>10.1f}x",
        ]
    )
