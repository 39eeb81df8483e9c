"""Measures the preparation of text against tiktoken's own speed, in two forms: tiktoken on one
thread, times the number of cores that Ray has; and tiktoken on that many threads at once, which is
what the machine can do."""

import dataclasses
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from manta import cluster, ownership, storage
from manta.bench.settings import BenchConfig
from manta.data import prepare
from manta.data.passes import WORK
from manta.data.recipe import BPE_VOCAB_SIZE, PrepareConfig
from manta.text import sources, tokenizer
from manta.text.tokenizer import Tokenizer

FILES = 16
SAMPLE_BYTES = 8 << 20


def tokenize(c: BenchConfig) -> dict[str, Any]:
    with ownership.scratch(c.home_folder, "bench-tokenize") as folder:
        return measure(c, folder)


def measure(c: BenchConfig, folder: str) -> dict[str, Any]:
    texts, size = write_corpus(c, storage.join(folder, "corpus"))
    made = _tokenizer(c, texts)
    cores = cluster.capacity(1.0, 0.0)
    data = dataclasses.replace(
        PrepareConfig(), source=storage.join(folder, "corpus"), document_bytes=0
    )
    parts = sources.parts(data.corpus)
    path = storage.join(folder, "dataset")
    bare, at_once, passes, whole = [], [], [], []
    for index in range(c.rounds + 1):
        alone = tiktoken_rate(made, texts)
        with ThreadPoolExecutor(cores) as pool:  # tiktoken releases Python's lock
            together = sum(pool.map(lambda _: tiktoken_rate(made, texts), range(cores)))
        started = time.perf_counter()
        scattered = prepare.scatter(data, path, parts, made)
        between = time.perf_counter()
        prepare.gather(data, path, prepare.merge(path, scattered), made)
        ended = time.perf_counter()
        storage.delete_folder(storage.join(path, WORK))
        if index:  # the first round warms up
            bare.append(alone)
            at_once.append(together)
            passes.append(size / (between - started))
            whole.append(size / (ended - started))
    ratios = [a / (b * cores) for a, b in zip(passes, bare, strict=True)]
    both = [a / (b * cores) for a, b in zip(whole, bare, strict=True)]
    return {
        "tokenizer": made.name,
        "cores": cores,
        "text_bytes": size,
        "tiktoken_bytes_per_second": statistics.median(bare),
        "tiktoken_at_once_bytes_per_second": statistics.median(at_once),
        "tokenizing_bytes_per_second": statistics.median(passes),
        "preparing_bytes_per_second": statistics.median(whole),
        "tokenizing_ratio": statistics.median(ratios),
        "tokenizing_ratios": ratios,
        "preparing_ratio": statistics.median(both),
        "tokenizing_of_possible": statistics.median(
            a / b for a, b in zip(passes, at_once, strict=True)
        ),
    }


def write_corpus(c: BenchConfig, folder: str) -> tuple[list[str], int]:
    """Writes the config's corpus as JSONL files, repeated up to `text_bytes`. Returns its texts and
    the size of all text in the files."""
    texts: list[str] = []
    for part in sources.parts(c.data.corpus):
        texts += sources.documents(part)
        if sum(map(len, texts)) > SAMPLE_BYTES:
            break
    written = number = 0
    for index in range(FILES):
        lines = []
        while written < c.text_bytes * (index + 1) // FILES:
            text = f"{number}\n{texts[number % len(texts)]}"  # makes every document unique
            lines.append(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            number += 1
        storage.write_bytes(storage.join(folder, f"{index:02d}.jsonl"), "".join(lines).encode())
    return texts, written


def _tokenizer(c: BenchConfig, texts: list[str]) -> Tokenizer:
    if c.data.tokenizer == tokenizer.R50K:
        return tokenizer.named(tokenizer.R50K, c.data.tokenizer_file)
    return tokenizer.train(texts, c.data.vocab_size or BPE_VOCAB_SIZE)


def tiktoken_rate(made: Tokenizer, texts: list[str]) -> float:
    """Bytes of text per second that tiktoken alone encodes, in this thread."""
    encoding = made.tiktoken
    size = sum(len(text.encode()) for text in texts)
    started = time.perf_counter()
    for text in texts:
        encoding.encode_ordinary(text)
    return size / (time.perf_counter() - started)


def table(result: dict[str, Any]) -> str:
    ratios = result["tokenizing_ratios"]
    return "\n".join(
        [
            f"tokenizer                {result['tokenizer']}, {result['text_bytes'] / 1e6:,.0f} MB "
            "of text",
            f"tiktoken, one thread     {result['tiktoken_bytes_per_second'] / 1e6:>8.2f} MB/s",
            f"tiktoken, {result['cores']} threads      "
            f"{result['tiktoken_at_once_bytes_per_second'] / 1e6:>8.2f} MB/s",
            f"tokenizing pass          {result['tokenizing_bytes_per_second'] / 1e6:>8.2f} MB/s on "
            f"{result['cores']} cores",
            f"  / (tiktoken x cores)   {result['tokenizing_ratio']:>8.1%}  (median of "
            f"{len(ratios)} rounds, {min(ratios):.1%} to {max(ratios):.1%})",
            f"  / tiktoken at once     {result['tokenizing_of_possible']:>8.1%}",
            f"whole preparation        {result['preparing_bytes_per_second'] / 1e6:>8.2f} MB/s",
            f"  / (tiktoken x cores)   {result['preparing_ratio']:>8.1%}",
        ]
    )
