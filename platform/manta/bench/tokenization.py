"""Measures the preparation of text against tiktoken's own speed, in two forms: tiktoken on one
thread, times the number of cores that Ray has; and tiktoken on that many threads at once, which is
what the machine can do. With data.deduplicate=near, preparation without near duplicates is
measured in turn with that without copies."""

import dataclasses
import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from manta import ownership, storage
from manta.bench.settings import BenchConfig
from manta.cluster import capacity
from manta.data import prepare
from manta.data.passes import WORK
from manta.data.recipe import BPE_VOCAB_SIZE, PrepareConfig
from manta.text import sources, tokenizer, tokenizer_r50k
from manta.text.tokenizer import Tokenizer

FILES = 16
SAMPLE_BYTES = 8 << 20


def tokenize(c: BenchConfig) -> dict[str, Any]:
    with ownership.scratch(c.home_folder, "bench-tokenize") as folder:
        return measure(c, folder)


def measure(c: BenchConfig, folder: str) -> dict[str, Any]:
    texts, size, documents = write_corpus(c, storage.join(folder, "corpus"))
    made = _tokenizer(c, texts)
    cores = capacity.workers_that_fit(1.0, 0.0)
    data = dataclasses.replace(
        PrepareConfig(), source=storage.join(folder, "corpus"), document_bytes=0
    )
    parts = sources.parts(data.corpus)
    path = storage.join(folder, "dataset")
    with_near = dataclasses.replace(
        data, deduplicate="near", deduplicate_similarity=c.data.deduplicate_similarity
    )
    bare, at_once, passes, whole, near = [], [], [], [], []
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
        if c.data.deduplicate == "near":
            seconds, dropped = _prepare_without_near(with_near, path, parts, made)
            if index:
                near.append(size / seconds)
        if index:  # the first round warms up
            bare.append(alone)
            at_once.append(together)
            passes.append(size / (between - started))
            whole.append(size / (ended - started))
    ratios = [a / (b * cores) for a, b in zip(passes, bare, strict=True)]
    both = [a / (b * cores) for a, b in zip(whole, bare, strict=True)]
    found = {}
    if near:
        slower = [a / b for a, b in zip(near, whole, strict=True)]
        found = {
            "near_bytes_per_second": statistics.median(near),
            "near_ratios": slower,
            "near_ratio": statistics.median(slower),
            "near_dropped": dropped,
            "documents_per_byte": documents / size,
        }
    return found | {
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


def _prepare_without_near(
    c: PrepareConfig, path: str, parts: list[sources.Part], made: Tokenizer
) -> tuple[float, int]:
    """Returns (seconds, near duplicates that were dropped)."""
    started = time.perf_counter()
    scattered = prepare.scatter(c, path, parts, made)
    documents = prepare.merge(path, scattered)
    found = prepare.find_near(c, path, scattered)
    gathered = prepare.gather(c, path, documents, made, found.dropped)
    seconds = time.perf_counter() - started
    storage.delete_folder(storage.join(path, WORK))
    return seconds, sum(record["near_duplicates"] for record in gathered)


def write_corpus(c: BenchConfig, folder: str) -> tuple[list[str], int, int]:
    """Writes the config's corpus as JSONL files, repeated up to `text_bytes`. Returns its texts,
    the size of all text in the files, and the number of documents.

    If near duplicates are looked for, the words of the repeated texts are in another order.
    """
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
            if c.data.deduplicate == "near" and number >= len(texts):
                words = text.split(" ")
                random.Random(number).shuffle(words)
                text = " ".join(words)
            lines.append(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            number += 1
        storage.write_bytes(storage.join(folder, f"{index:02d}.jsonl"), "".join(lines).encode())
    return texts, written, number


def _tokenizer(c: BenchConfig, texts: list[str]) -> Tokenizer:
    if c.data.tokenizer == tokenizer.R50K:
        return tokenizer_r50k.named(tokenizer.R50K, c.data.tokenizer_file)
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
    lines = []
    if "near_ratio" in result:
        found = result["near_ratios"]
        speed = result["near_bytes_per_second"]
        lines = [
            f"without near duplicates  {speed / 1e6:>8.2f} MB/s, "
            f"{speed * result['documents_per_byte']:,.0f} documents/s; "
            f"{result['near_dropped']:,} dropped",
            f"  / whole preparation    {result['near_ratio']:>8.1%}  (median of {len(found)} "
            f"rounds, {min(found):.1%} to {max(found):.1%})",
        ]
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
            *lines,
        ]
    )
