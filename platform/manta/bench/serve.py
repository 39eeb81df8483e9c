"""Measures the serving engine in this process: a conversation with and without its cache, eight
streams at once against one, and what a long prompt costs those who are being answered."""

import dataclasses
import gc
import queue
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from manta.bench.settings import BenchConfig
from manta.evaluate.inference_settings import inference_dtype
from manta.model.activations import Dtype
from manta.model.families import model_of, num_parameters
from manta.model.generate import generate
from manta.model.gpt import LanguageModel
from manta.model.inference import inference
from manta.model.sampling import Sampling
from manta.serve.engine.budget import cache_budget
from manta.serve.engine.engine import Engine
from manta.serve.engine.request import Ended, Event, Failed, Piece, Request
from manta.text.tokenizer import Tokenizer
from manta.train.step.device import Device, available_cpus, find_device

TURNS = 50
QUESTION, ANSWER = 10, 8  # tokens; 50 turns fill 900
STREAMS = 8
PROMPT = 16
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=0.8, top_k=50)
ENDS = 10  # turns at the beginning and the end whose times are compared


class Client:
    """Asks an engine, and notes when which tokens came."""

    def __init__(self, engine: Engine, request: Request):
        self._events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        self._asked = time.perf_counter()
        self.times: list[float] = []
        """Seconds from the request to each token."""
        engine.submit(request, lambda event: self._events.put((time.perf_counter(), event)))

    def wait(self) -> tuple[int, ...]:
        """The ids of the whole answer."""
        while True:
            at, event = self._events.get()
            if isinstance(event, Failed):
                raise RuntimeError(event.why)
            if isinstance(event, Ended):
                return event.ids
            if isinstance(event, Piece):
                self.times += [at - self._asked] * len(event.tokens)


def serve(c: BenchConfig) -> dict[str, Any]:
    """Measures an engine with a new model of the config's shape (the speed does not depend on the
    weights)."""
    on_gpu = bool(c.gpus_per_worker)
    dtype = inference_dtype(c.dtype, torch.device("cuda" if on_gpu else "cpu"))
    device = find_device(dtype, on_gpu, c.threads_per_worker or available_cpus())
    shape = c.expected_model
    context = max(shape.context_length, TURNS * (QUESTION + ANSWER), PROMPT + c.new_tokens)
    shape = dataclasses.replace(shape, context_length=context)
    torch.manual_seed(c.seed)
    model = model_of(shape).to(device.torch_device).eval()
    tokenizer = made_tokenizer(shape.vocab_size or 0)
    precision: Dtype = "bf16" if device.dtype == "bf16" else "fp32"
    budget = cache_budget(shape, device.torch_device, precision)
    engine = Engine(
        model, tokenizer, device=device.torch_device, dtype=precision, cache_bytes=budget
    )
    try:
        result = {
            "device": device.description,
            "dtype": device.dtype,
            "parameters": num_parameters(shape),
            "cache_bytes": budget,
            "new_tokens": c.new_tokens,
            **_streams(engine, c),
            **_stall(engine, c),
            **_conversation(engine, c),
        }
    finally:
        engine.close()
    # The engine's kernels are not those of the model alone, which now has its weights back.
    result["generate_tokens_per_second"] = _generated(model, device, c)
    result["turns_as_computed_again"] = _same(
        model, device, result.pop("prompts"), result.pop("answers")
    )
    return result


def made_tokenizer(size: int) -> Tokenizer:
    """A tokenizer of this many ids: the bytes, pairs of them, and the end of a text."""
    pairs = (bytes([a, b]) for a in range(256) for b in range(256))
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {next(pairs): rank for rank in range(256, size - 1)}
    return Tokenizer("bench", r"(?s:..?)", ranks, size - 1)


def _prompts(count: int, length: int, seed: int, vocab_size: int) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocab_size - 1, (count, length), generator=random)
    return [tuple(row) for row in drawn.tolist()]


def _at_once(engine: Engine, requests: Sequence[Request]) -> tuple[float, list[tuple[int, ...]]]:
    """Tokens/s of requests that come at once, and their answers."""
    gc.collect()
    started = time.perf_counter()
    clients = [Client(engine, request) for request in requests]
    answers = [client.wait() for client in clients]
    return sum(map(len, answers)) / (time.perf_counter() - started), answers


def _streams(engine: Engine, c: BenchConfig) -> dict[str, Any]:
    """Eight streams at once against one, in turn; the texts of each, at once and alone."""
    size = c.expected_model.vocab_size or 0
    rates: dict[str, list[float]] = {}
    equal = total = 0
    for index in range(c.rounds + 1):
        prompts = _prompts(STREAMS, PROMPT, index, size)
        for name, sampling in (("greedy", GREEDY), ("drawn", DRAWN)):
            requests = [
                Request(prompt, c.new_tokens, sampling, seed=n) for n, prompt in enumerate(prompts)
            ]
            # The first round warms up, and has each of them alone.
            singles = range(STREAMS) if index == 0 else [index % STREAMS]
            alone = [_at_once(engine, [requests[number]]) for number in singles]
            many, answers = _at_once(engine, requests)
            total += len(alone)
            for number, (_, (answer,)) in zip(singles, alone, strict=True):
                equal += answer == answers[number]
            if index:
                rates.setdefault(f"{name}_one", []).append(alone[0][0])
                rates.setdefault(f"{name}_many", []).append(many)
    ratios = {
        name: [b / a for a, b in zip(rates[f"{name}_one"], rates[f"{name}_many"], strict=True)]
        for name in ("greedy", "drawn")
    }
    return {
        **{f"{key}_tokens_per_second": statistics.median(found) for key, found in rates.items()},
        "stream_ratios": ratios,
        "streams_equal": [equal, total],
    }


def _stall(engine: Engine, c: BenchConfig) -> dict[str, Any]:
    """The longest time between two tokens of a stream while a prompt of 900 tokens is read, and the
    time until that prompt's first token."""
    size = c.expected_model.vocab_size or 0
    gaps, quiet, firsts = [], [], []
    for index in range(c.rounds):
        (short,) = _prompts(1, PROMPT, 1000 + index, size)
        (long,) = _prompts(1, TURNS * (QUESTION + ANSWER) - ANSWER, 2000 + index, size)
        stream = Client(engine, Request(short, min(c.new_tokens, 60), GREEDY))
        time.sleep(0.2)
        other = Client(engine, Request(long, 1, GREEDY))
        other.wait()
        stream.wait()
        between = [b - a for a, b in zip(stream.times, stream.times[1:], strict=False)]
        gaps.append(max(between))
        quiet.append(statistics.median(between))
        firsts.append(other.times[0])
    return {
        "longest_gap_seconds": statistics.median(gaps),
        "usual_gap_seconds": statistics.median(quiet),
        "long_prompt_seconds": statistics.median(firsts),
    }


def _conversation(engine: Engine, c: BenchConfig) -> dict[str, Any]:
    """A conversation of 50 turns; the last turns' prompts also without what the cache has."""
    size = c.expected_model.vocab_size or 0
    history: tuple[int, ...] = ()
    firsts, excess, prompts, answers, anew = [], [], [], [], []
    for question in _prompts(TURNS, QUESTION, 7, size):
        prompt = history + question
        before = engine.counts().prefilled
        client = Client(engine, Request(prompt, ANSWER, GREEDY))
        answer = client.wait()
        _settle(engine)
        excess.append(engine.counts().prefilled - before - QUESTION)
        firsts.append(client.times[0])
        prompts.append(prompt)
        answers.append(answer)
        history = prompt + answer
    for number in range(c.rounds):
        other = ((prompts[-1][0] + 1 + number) % (size - 1), *prompts[-1][1:])
        client = Client(engine, Request(other, 1, GREEDY))
        client.wait()
        anew.append(client.times[0])
    return {
        "turns": TURNS,
        "tokens_at_the_end": len(history),
        "tokens_read_twice": sum(excess),
        "first_token_seconds": firsts,
        "first_token_anew_seconds": statistics.median(anew),
        "prompts": prompts,
        "answers": answers,
    }


def _settle(engine: Engine) -> None:
    """Waits until the engine has read the last token of an answer."""
    while engine.counts().running or engine.counts().waiting:
        time.sleep(0.001)
    time.sleep(0.05)


def _generated(model: LanguageModel, device: Device, c: BenchConfig) -> float:
    """Tokens/s of the same stream by jobs/generate.py's loop."""
    (prompt,) = _prompts(1, PROMPT, 1, c.expected_model.vocab_size or 0)
    rates = []
    with inference(device.torch_device, device.dtype):
        for index in range(c.rounds + 1):
            started = time.perf_counter()
            made = list(generate(model, list(prompt), c.new_tokens, sampling=GREEDY))
            if index:  # the first round warms up
                rates.append(len(made) / (time.perf_counter() - started))
    return statistics.median(rates)


def _same(
    model: LanguageModel,
    device: Device,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> list[int]:
    """How many answers are those of the model alone, which reads each prompt as a whole; of how
    many."""
    equal = 0
    with inference(device.torch_device, device.dtype):
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = generate(model, list(prompt), ANSWER, sampling=GREEDY)
            equal += tuple(expected) == tuple(answer)
    return [equal, len(prompts)]


def table(result: dict[str, Any]) -> str:
    def milliseconds(seconds: float) -> str:
        return f"{1000 * seconds:,.0f} ms"

    firsts = result["first_token_seconds"]
    early, late = (statistics.median(some) for some in (firsts[1 : 1 + ENDS], firsts[-ENDS:]))
    anew = result["first_token_anew_seconds"]
    same, count = result["turns_as_computed_again"]
    lines = [
        f"device               {result['device']}, {result['dtype']}",
        f"model                {result['parameters'] / 1e6:,.1f}M parameters, "
        f"{result['cache_bytes'] / 1e9:,.1f} GB for caches",
        f"conversation         {result['turns']} turns, {result['tokens_at_the_end']} tokens: "
        f"{result['tokens_read_twice']} tokens read twice, "
        f"{same} of {count} answers as computed again",
        f"  first token        {milliseconds(late)} in the last {ENDS} turns, "
        f"{milliseconds(early)} in the first ({late / early:.2f}x)",
        f"  without the cache  {milliseconds(anew)} at the end ({anew / late:.1f}x)",
    ]
    for name, ratios in result["stream_ratios"].items():
        lines += [
            f"{STREAMS} streams, {name:<9} "
            f"{result[f'{name}_many_tokens_per_second']:>8,.1f} tok/s, one "
            f"{result[f'{name}_one_tokens_per_second']:,.1f}: "
            f"{statistics.median(ratios):.1f}x  (median of {len(ratios)} rounds, "
            f"{min(ratios):.1f}x to {max(ratios):.1f}x)"
        ]
    lines += [
        f"  by generate        {result['generate_tokens_per_second']:>8,.1f} tok/s, one stream",
        f"  same texts         {result['streams_equal'][0]} of {result['streams_equal'][1]} "
        "streams wrote at once what they wrote alone",
        f"a prompt of 900      first token after {milliseconds(result['long_prompt_seconds'])}; "
        f"meanwhile a stream's tokens came at most "
        f"{milliseconds(result['longest_gap_seconds'])} apart, else "
        f"{milliseconds(result['usual_gap_seconds'])}",
    ]
    return "\n".join(lines)
