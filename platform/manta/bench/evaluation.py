"""Measures lm-eval's requests in the batches of our adapter against one request at a time."""

import math
import random
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

from manta.bench.settings import BenchConfig
from manta.evaluate.adapter import MantaLM, in_process, loglikelihood_requests
from manta.model.families import model_of, num_parameters
from manta.model.gpt import LanguageModel
from manta.model.inference import inference
from manta.text import tokenizer
from manta.train.step.device import available_cpus, find_device

REQUESTS = 200
ALLOWED = {"fp32": 1e-4, "bf16": 2e-2}  # relative difference of two scores of a request
WORDS = ["a ray", "glides", "over", "the reef", "at night", "and", "feeds", "on plankton", "slowly"]


def evaluation(c: BenchConfig) -> dict[str, Any]:
    """Requests/s of a new model of the config's shape on made-up multiple-choice requests of 10 to
    80 words. The speed does not depend on the weights."""
    dtype = "fp32" if c.dtype == "auto" else c.dtype  # the default of jobs/evaluate.py
    device = find_device(dtype, bool(c.gpus_per_worker), c.threads_per_worker or available_cpus())
    torch.manual_seed(c.seed)
    model = model_of(c.expected_model).to(device.torch_device).eval()
    made = tokenizer.train(WORDS, 290)
    lm = in_process(model, made, dtype)
    pairs = _pairs(random.Random(c.seed), lm.max_length)
    requests = loglikelihood_requests(pairs)
    batched, one_by_one = [], []
    for index in range(c.rounds + 1):
        started = time.perf_counter()
        found = lm.loglikelihood(requests)
        between = time.perf_counter()
        with inference(device.torch_device, dtype):
            plain = [_score(lm, model, *pair) for pair in pairs]
        ended = time.perf_counter()
        for (a, _), b in zip(found, plain, strict=True):
            assert math.isclose(a, b, rel_tol=ALLOWED[dtype]), f"both score the same: {a}, {b}"
        if index:  # the first round warms up
            batched.append(REQUESTS / (between - started))
            one_by_one.append(REQUESTS / (ended - between))
    ratios = [a / b for a, b in zip(batched, one_by_one, strict=True)]
    return {
        "device": device.description,
        "dtype": dtype,
        "parameters": num_parameters(model.config),
        "requests_per_second": statistics.median(batched),
        "one_by_one_per_second": statistics.median(one_by_one),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def _pairs(chosen: random.Random, context: int) -> list[tuple[str, str]]:
    """(context, continuation) pairs. A word is at most 6 tokens, and a continuation must fit."""

    def words(low: int, high: int) -> str:
        return " ".join(chosen.choice(WORDS) for _ in range(chosen.randint(low, high)))

    longest = max(1, min(20, context // 8))
    return [(words(8, 60), " " + words(1, longest)) for _ in range(REQUESTS)]


def _score(lm: MantaLM, model: LanguageModel, context: str, continuation: str) -> float:
    """The log-likelihood of one request, computed as one would write it by hand."""
    before, after = lm.tok_encode(context), lm.tok_encode(context + continuation)
    place = model.embedding.weight.device
    tokens = torch.tensor([after[-(lm.max_length + 1) :]], device=place)
    count = min(len(after) - len(before), tokens.size(1) - 1)
    logits = model(tokens[:, :-1])[0, -count:]
    return -F.cross_entropy(logits.float(), tokens[0, -count:], reduction="sum").item()


def table(result: dict[str, Any]) -> str:
    ratios = result["ratios"]
    return "\n".join(
        [
            f"device            {result['device']}, {result['dtype']}",
            f"model             {result['parameters'] / 1e6:,.1f}M parameters",
            f"one by one        {result['one_by_one_per_second']:>10,.1f} requests/s",
            f"in batches        {result['requests_per_second']:>10,.1f} requests/s",
            f"  / one by one    {result['ratio']:>10.2f}x  (median of {len(ratios)} rounds, "
            f"{min(ratios):.2f}x to {max(ratios):.2f}x)",
        ]
    )
