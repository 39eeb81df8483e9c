"""Measures sampling with and without the KV cache, and many prompts at once against one."""

import dataclasses
import statistics
import time
from typing import Any

import torch

from manta.bench.settings import BenchConfig
from manta.evaluate.inference_settings import inference_dtype
from manta.model.families import model_of, num_parameters
from manta.model.generate import generate_batch
from manta.model.gpt import LanguageModel
from manta.model.inference import inference
from manta.train.step.device import available_cpus, find_device

PROMPT = 16
BATCH = 8
LARGE_BATCH = 64
LAST = 32  # tokens over which the speed at the full length is measured


def generation(c: BenchConfig) -> dict[str, Any]:
    """Tokens/s of a new model of the config's shape (the speed does not depend on the weights)."""
    on_gpu = bool(c.gpus_per_worker)
    dtype = inference_dtype(c.dtype, torch.device("cuda" if on_gpu else "cpu"))
    device = find_device(dtype, on_gpu, c.threads_per_worker or available_cpus())
    shape = c.expected_model
    context = max(shape.context_length, PROMPT + c.new_tokens)
    shape = dataclasses.replace(shape, context_length=context)
    torch.manual_seed(c.seed)
    model = model_of(shape).to(device.torch_device)
    rates: dict[str, list[float]] = {}
    for index in range(c.rounds + 1):
        found = {}
        with inference(device.torch_device, device.dtype):
            found["cached"], found["cached_last"] = _rates(model, c, 1, True)
            found["batched"], _ = _rates(model, c, BATCH, True)
            found["large_batch"], _ = _rates(model, c, LARGE_BATCH, True)
            found["uncached"], found["uncached_last"] = _rates(model, c, 1, False)
        for key, rate in found.items() if index else ():  # the first round warms up
            rates.setdefault(key, []).append(rate)

    def ratios(a: str, b: str) -> list[float]:
        return [x / y for x, y in zip(rates[a], rates[b], strict=True)]

    return {
        "device": device.description,
        "dtype": device.dtype,
        "parameters": num_parameters(shape),
        "new_tokens": c.new_tokens,
        "batch": BATCH,
        "large_batch": LARGE_BATCH,
        **{f"{key}_tokens_per_second": statistics.median(found) for key, found in rates.items()},
        "cached_ratio": statistics.median(ratios("cached", "uncached")),
        "cached_ratios": ratios("cached", "uncached"),
        "cached_last_ratio": statistics.median(ratios("cached_last", "uncached_last")),
        "batched_ratio": statistics.median(ratios("batched", "cached")),
        "large_batch_ratio": statistics.median(ratios("large_batch", "cached")),
    }


def _rates(
    model: LanguageModel, c: BenchConfig, prompts: int, use_cache: bool
) -> tuple[float, float]:
    """Tokens/s over all prompts: of all new tokens, and of the last ones (with a full context)."""
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
    at_once = []
    for size, key in ((result["batch"], "batched"), (result["large_batch"], "large_batch")):
        at_once += [
            f"{size:<2} prompts at once {result[f'{key}_tokens_per_second']:>10,.1f} tok/s",
            f"  / one            {result[f'{key}_ratio']:>10.1f}x",
        ]
    return "\n".join(
        [
            f"device             {result['device']}, {result['dtype']}",
            f"model              {result['parameters'] / 1e6:,.1f}M parameters, "
            f"{result['new_tokens']} new tokens",
            f"without cache      {result['uncached_tokens_per_second']:>10,.1f} tok/s",
            f"with KV cache      {result['cached_tokens_per_second']:>10,.1f} tok/s",
            f"  / without        {result['cached_ratio']:>10.1f}x  (median of {len(ratios)} "
            f"rounds, {min(ratios):.1f}x to {max(ratios):.1f}x)",
            f"  at the end, each {result['cached_last_tokens_per_second']:,.1f} and "
            f"{result['uncached_last_tokens_per_second']:,.1f} tok/s, "
            f"{result['cached_last_ratio']:.1f}x",
            *at_once,
        ]
    )
