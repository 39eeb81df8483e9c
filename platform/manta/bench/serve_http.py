"""Measures the server as its clients see it: a server in a process of its own with a new model of
the config's shape, over HTTP.

Streams at once against one; a crowd of clients, a fifth of whom go away in the middle; and, given
HellaSwag's file, log-likelihoods against those of the same model in this process.
"""

import contextlib
import http.client
import json
import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from manta import config as configs
from manta import layout, ownership, storage
from manta.bench.serve import made_tokenizer
from manta.bench.settings import BenchConfig
from manta.errors import ConfigError
from manta.evaluate.adapter import in_process, loglikelihood_requests
from manta.model.families import model_of, num_parameters
from manta.serve.settings import ServeConfig
from manta.train.checkpoints import checkpoint
from manta.train.checkpoints.contents import TrainState

STREAMS = 8
CLIENTS = 64
SHARE_THAT_LEAVES = 0.2
LONGEST = 64  # tokens of an answer to one of the crowd
ROWS = 200  # of HellaSwag
START_SECONDS = 300
CACHE_GB = 1.0  # soon full, so that memory stays as it is from then on
NAME = "bench"


def serve_http(c: BenchConfig) -> dict[str, Any]:
    """Measures a server."""
    with ownership.scratch(layout.runs_folder(c.home_folder), "bench-serve") as home:
        path = _made(c, home)
        with _server(c, home) as (port, process):
            found = {
                "parameters": num_parameters(checkpoint.load_model_config(path)),
                "new_tokens": c.new_tokens,
                **_streams(c, port),
                **_crowd(c, port, process),
            }
            if c.hellaswag_path is not None:
                found |= _hellaswag(c.hellaswag_path, port, path)
    return found


def _made(c: BenchConfig, home: str) -> str:
    """A checkpoint of a new model; returns its path."""
    torch.manual_seed(c.seed)
    model = model_of(c.expected_model)
    path = layout.checkpoint_folder(layout.run_folder(home, NAME), 1)
    folder = Path(storage.filesystem(path)[1])
    folder.mkdir(parents=True)
    weights = dict(model.state_dict())
    if model.config.tie_embeddings:
        del weights["head.weight"]
    tokenizer = made_tokenizer(model.config.vocab_size or 0)
    names = checkpoint.write_model(folder, model.config, weights, tokenizer, TrainState(step=1))
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": storage.sha256(f"{path}/{name}")}
        for name in names
    }
    storage.write_json(f"{path}/{layout.MANIFEST}", {"files": files})
    return path


def _run(arguments: dict[str, Any], told: Any) -> None:
    """The server's process."""
    from manta.serve.serve import serve

    serve(configs.from_dict(ServeConfig, arguments), told.send)


@contextlib.contextmanager
def _server(c: BenchConfig, home: str) -> Iterator[tuple[int, psutil.Process]]:
    """A server that runs: its port and its process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    device = "cuda" if c.gpus_per_worker else "cpu"
    arguments = {
        "home": home,
        "checkpoint": NAME,
        "port": 0,
        "device": device,
        "dtype": c.dtype,
        "cache_gb": CACHE_GB,
    }
    process = context.Process(target=_run, args=(arguments, theirs))
    process.start()
    try:
        port = 0
        until = time.monotonic() + START_SECONDS
        while not port:
            if not process.is_alive() or time.monotonic() > until:
                raise RuntimeError("the server did not start; it has printed why")
            if ours.poll(0.5):
                text = ours.recv()
                if text.startswith("serving "):
                    port = int(text.splitlines()[0].rpartition(":")[2])
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.join(timeout=60)


def _post(port: int, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    return connection.getresponse()


def _follow(port: int, body: dict[str, Any], most: int | None = None) -> int:
    """Reads a stream of a completion to its end, or goes away after `most` parts; returns the
    number of parts. Raises RuntimeError if it is not what a stream has to be."""
    reply = _post(port, "/v1/completions", {**body, "stream": True})
    if reply.status != 200:
        raise RuntimeError(f"{reply.status}: {reply.read()[:200]!r}")
    parts, last = 0, ""
    with contextlib.closing(reply):
        while line := reply.readline():
            text = line.decode().strip()
            if not text:
                continue
            last = text
            if '"error"' in text:
                raise RuntimeError(text[:200])
            parts += text != "data: [DONE]"
            if most is not None and parts >= most:
                return parts
    if last != "data: [DONE]":
        raise RuntimeError(f"the stream ended with {last[:100]!r}")
    return parts


def _prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(256, 2000) for _ in range(length)]


def _streams(c: BenchConfig, port: int) -> dict[str, Any]:
    """Tokens/s of eight streams at once and of one, in turn."""
    rates: dict[int, list[float]] = {1: [], STREAMS: []}
    with ThreadPoolExecutor(STREAMS) as pool:
        for number in range(c.rounds + 1):
            for count in rates:
                draw = random.Random(number)
                body = {"max_tokens": c.new_tokens, "temperature": 0, "logprobs": 0}
                bodies = [{**body, "prompt": _prompt(draw, 16)} for _ in range(count)]
                started = time.perf_counter()
                list(pool.map(lambda b: _follow(port, b), bodies))
                seconds = time.perf_counter() - started
                if number:
                    rates[count].append(count * c.new_tokens / seconds)
    ratios = [b / a for a, b in zip(rates[1], rates[STREAMS], strict=True)]
    return {
        "one_tokens_per_second": statistics.median(rates[1]),
        "many_tokens_per_second": statistics.median(rates[STREAMS]),
        "stream_ratios": ratios,
    }


def _crowd(c: BenchConfig, port: int, process: psutil.Process) -> dict[str, Any]:
    """Clients that ask again and again. Some go away before their answer ends."""
    until = time.monotonic() + 60 * c.minutes
    answered, left, problems = [0] * CLIENTS, [0] * CLIENTS, list[str]()

    def one(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < until:
            body = {
                "prompt": _prompt(draw, draw.randrange(1, 100)),
                "max_tokens": draw.randrange(8, LONGEST),
                "seed": draw.randrange(1 << 30),
                "temperature": draw.choice([0, 0.8]),
                "logprobs": 0,
            }
            leaves = draw.random() < SHARE_THAT_LEAVES
            try:
                _follow(port, body, draw.randrange(1, 6) if leaves else None)
                (left if leaves else answered)[number] += 1
            except Exception as e:
                problems.append(f"{type(e).__name__}: {e}")

    threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    sizes = []
    while any(thread.is_alive() for thread in threads):
        sizes.append(process.memory_info().rss)
        time.sleep(1)
    fifth = max(1, len(sizes) // 5)
    before, after = (
        statistics.median(s) for s in (sizes[fifth : 2 * fifth] or sizes, sizes[-fifth:])
    )
    return {
        "clients": CLIENTS,
        "minutes": c.minutes,
        "answered": sum(answered),
        "left": sum(left),
        "errors": len(problems),
        "first_errors": problems[:3],
        "memory_bytes": [before, after],
    }


def _hellaswag(file: str, port: int, path: str) -> dict[str, Any]:
    """Log-likelihoods of endings through the server and in this process."""
    rows = [json.loads(text) for text in Path(file).read_text().splitlines()[:ROWS]]
    tokenizer = checkpoint.load_tokenizer(path)
    model = checkpoint.load_model(path, torch.device("cpu"))
    pairs = [(row["ctx"], f" {ending}") for row in rows for ending in row["endings"]]
    expected = [score for score, _ in in_process(model, tokenizer).loglikelihood(
        loglikelihood_requests(pairs), disable_tqdm=True
    )]  # fmt: skip

    def one(pair: tuple[str, str]) -> float:
        context = tokenizer.encode(pair[0])
        # lm-eval cuts texts like this: a token across the border is the context's up to there.
        ids = context + tokenizer.encode(pair[0] + pair[1])[len(context) :]
        body = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0, "temperature": 0}
        reply = json.loads(_post(port, "/v1/completions", body).read())
        if "error" in reply:
            raise ConfigError(
                f"hellaswag_path={file}: {reply['error']['message']}; give a longer "
                "model.context_length"
            )
        return sum(reply["choices"][0]["logprobs"]["token_logprobs"][len(context) :])

    with ThreadPoolExecutor(STREAMS) as pool:
        found = list(pool.map(one, pairs))
    return {
        "rows": len(rows),
        "loglikelihoods_differ_by": max(abs(a - b) for a, b in zip(found, expected, strict=True)),
        "accuracy": _accuracy(rows, found),
        "accuracy_in_process": _accuracy(rows, expected),
    }


def _accuracy(rows: list[dict[str, Any]], scores: list[float]) -> float:
    right = 0
    for number, row in enumerate(rows):
        four = scores[4 * number : 4 * number + 4]
        right += four.index(max(four)) == int(row["label"])
    return right / len(rows)


def table(result: dict[str, Any]) -> str:
    ratios = result["stream_ratios"]
    before, after = result["memory_bytes"]
    lines = [
        f"model            {result['parameters'] / 1e6:,.1f}M parameters, in a process of its own",
        f"{STREAMS} streams        {result['many_tokens_per_second']:,.1f} tok/s over HTTP, one "
        f"{result['one_tokens_per_second']:,.1f}: {statistics.median(ratios):.1f}x  (median of "
        f"{len(ratios)} rounds, {min(ratios):.1f}x to {max(ratios):.1f}x)",
        f"{result['clients']} clients       {result['minutes']:g} minutes: {result['answered']:,} "
        f"answers, {result['left']:,} clients went away, {result['errors']} errors",
        f"memory           {before / 2**20:,.0f} MiB in the second fifth, {after / 2**20:,.0f} MiB "
        f"in the last ({after / before - 1:+.1%})",
    ]
    lines += [f"                 {problem}" for problem in result["first_errors"]]
    if "rows" in result:
        lines.append(
            f"HellaSwag        {result['rows']} rows: log-likelihoods differ by "
            f"{result['loglikelihoods_differ_by']:.1e} at most; accuracy {result['accuracy']:.4f}, "
            f"in this process {result['accuracy_in_process']:.4f}"
        )
    return "\n".join(lines)
