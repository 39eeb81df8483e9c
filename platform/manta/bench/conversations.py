"""Measures a training step on conversations against one on documents of the same shape, in turn, by
the same engine: what masks, weights of micro batches and masked attention cost."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from manta.bench.model import on_workers
from manta.bench.settings import BenchConfig
from manta.data.conversations import rule
from manta.data.packing import fill
from manta.evaluate.questions import conversations
from manta.model.gpt import num_parameters
from manta.text import templates
from manta.text import tokenizer as tokenizers
from manta.text.conversations import Turn
from manta.text.templates import Template
from manta.text.tokenizer import Tokenizer
from manta.train.build import build, micro_batch
from manta.train.objectives.answers import Answers
from manta.train.objectives.next_token import Batch, NextToken
from manta.train.objectives.weights import weighted
from manta.train.step.device import Device

COUNT = 4000  # conversations, which are repeated


def measure(c: BenchConfig) -> dict[str, Any]:
    """Times steps of one worker, or of `num_workers`."""
    return on_workers(c, _measure)


def _measure(c: BenchConfig, device: Device) -> dict[str, Any]:
    rows, tokenizer = made_rows(c.sequence_length, c.seed)
    model = dataclasses.replace(c.model, vocab_size=tokenizer.vocab_size)
    size = micro_batch(c, model, device, c.workers, False)
    c = dataclasses.replace(c, micro_batch_size=size)
    accum = c.grad_accum_steps(c.total_steps)
    engine = build(c, model, device, size=size, steps=accum, compiled=False)
    objectives = {
        "documents": NextToken(tokenizer, document_mask=False),
        "documents_masked": NextToken(tokenizer, document_mask=True),
        "conversations": Answers(tokenizer, True, rule(tokenizer)),
    }
    batches = {
        name: objective.batches(_forever(rows, size), at_once=accum)
        for name, objective in objectives.items()
    }

    def step(name: str) -> None:
        drawn: Iterator[tuple[Batch, float]]
        drawn = weighted(batches[name].__next__, accum, device.torch_device)
        with engine.casting_once():
            for index, (batch, weight) in enumerate(drawn):
                tokens, targets = batch.to(device.torch_device)
                loss = objectives[name].figures(engine, tokens, targets)["loss"]
                engine.backward(weight * loss, is_last=index == accum - 1)
        float(engine.step(c.optimizer.grad_clip))  # waits for the device

    seconds: dict[str, list[float]] = {name: [] for name in objectives}
    for number in range(c.rounds + 1):
        for name in objectives:
            started = time.perf_counter()
            for _ in range(c.steps_per_round):
                step(name)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    tokens = accum * size * c.sequence_length * c.workers * c.steps_per_round
    ratios = {
        against: [a / b for a, b in zip(seconds[against], seconds["conversations"], strict=True)]
        for against in ("documents", "documents_masked")
    }
    return {
        "device": device.description,
        "dtype": device.dtype,
        "parameters": num_parameters(model),
        "workers": c.workers,
        "micro_batch_size": size,
        "micro_batches": accum,
        "seq_len": c.sequence_length,
        "trained_share": _trained_share(objectives["conversations"], rows),
        "tokens_per_second": {n: tokens / statistics.median(s) for n, s in seconds.items()},
        "ratios": ratios,
    }


def made_rows(seq_len: int, seed: int) -> tuple[np.ndarray, Tokenizer]:
    """Rows of made conversations in ChatML, (N, seq_len + 1) ids, and the tokenizer."""
    talks = conversations(COUNT, seed)
    texts = [f"{question}\n{answer}\n" for talk in talks for question, answer in talk]
    base = tokenizers.train(texts, 4096)
    tokenizer = templates.with_template(base, templates.NAMED["chatml"], "chatml")
    template = Template.of(tokenizer)
    encoded = []
    for talk in talks:
        turns = [
            turn
            for question, answer in talk
            for turn in (Turn("user", question), Turn("assistant", answer))
        ]
        ids = template.encode(turns).ids
        if len(ids) <= seq_len:
            encoded.append(ids)
    places = fill([len(ids) for ids in encoded], seq_len)
    rows = np.full((len(places), seq_len + 1), tokenizer.start, dtype=np.int64)
    for row, members in zip(rows, places, strict=True):
        ids = np.concatenate([encoded[number] for number in members])
        row[: len(ids)] = ids
    return rows, tokenizer


def _forever(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for first in itertools.cycle(range(0, len(rows) - size + 1, size)):
        yield rows[first : first + size]


def _trained_share(objective: NextToken, rows: np.ndarray) -> float:
    return (objective.batch(rows).units or 0) / rows[:, 1:].size


def table(result: dict[str, Any]) -> str:
    rates = result["tokens_per_second"]
    lines = [
        f"device            {result['device']}, {result['dtype']}",
        f"model             {result['parameters'] / 1e6:,.1f}M parameters, sequences of "
        f"{result['seq_len']}, {result['micro_batches']} micro batches of "
        f"{result['micro_batch_size']}, {result['workers']} worker(s)",
        f"documents         {rates['documents']:>10,.0f} tok/s, attention over whole sequences",
        f"  masked          {rates['documents_masked']:>10,.0f} tok/s (document_mask=true)",
        f"conversations     {rates['conversations']:>10,.0f} tok/s, of which "
        f"{result['trained_share']:.0%} are trained",
    ]
    for name, ratios in result["ratios"].items():
        against = name.replace("_", ", ")
        lines.append(
            f"  of {against:<13}{statistics.median(ratios):>7.1%}  ({min(ratios):.1%} to "
            f"{max(ratios):.1%} in {len(ratios)} rounds)"
        )
    return "\n".join(lines)
