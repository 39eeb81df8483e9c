"""Requests to a model, as rows of tokens: each common beginning once, with everything that may
follow it, in batches of similar length. Which rows form a batch depends only on the requests."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from manta.errors import DataError


@dataclasses.dataclass(frozen=True)
class Pair:
    """The tokens of a continuation, and of the context before it (at least one)."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A continuation in a row."""

    pair: int
    """Index of the pair among all pairs of the request."""
    tokens: tuple[int, ...]
    places: tuple[int, ...]
    """Index in the row of the token after which each of `tokens` is predicted."""


@dataclasses.dataclass(frozen=True)
class Row:
    tokens: tuple[int, ...]
    branches: tuple[int, ...] | None
    """0 for the beginning, then 1, 2, ..., as `GPT.forward` takes them; None: just one branch."""
    answers: tuple[Answer, ...]


def rows_of(pairs: Sequence[Pair], context_length: int) -> list[Row]:
    """The rows that answer all pairs, none longer than the context.

    A pair that is longer loses its beginning, as with lm-eval's own models.

    Raises:
        DataError: a continuation alone is longer than the context.
    """
    for pair in pairs:
        if len(pair.continuation) > context_length:
            raise DataError(
                f"a continuation of {len(pair.continuation)} tokens is longer than the model's "
                f"context of {context_length}: use a model with a longer context"
            )
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        alike.setdefault(pair.context, []).append(index)
    rows = []
    for context, indices in alike.items():
        # The last token of a continuation is predicted but never read.
        longest = context_length + 1 - len(context)
        fits = [i for i in indices if len(pairs[i].continuation) <= longest]
        rows += [_alone(i, pairs[i], context_length) for i in indices if i not in set(fits)]
        while fits:
            room, count = context_length - len(context), 0
            for index in fits:
                room -= len(pairs[index].continuation) - 1
                count += room >= 0
            together, fits = fits[:count], fits[count:]
            if len(together) == 1:
                rows.append(_alone(together[0], pairs[together[0]], context_length))
            else:
                rows.append(_together(context, together, pairs))
    return rows


def _alone(index: int, pair: Pair, context_length: int) -> Row:
    tokens = (pair.context + pair.continuation)[-(context_length + 1) : -1]
    first = len(tokens) - len(pair.continuation)
    return Row(tokens, None, (Answer(index, pair.continuation, tuple(range(first, len(tokens)))),))


def _together(context: tuple[int, ...], indices: list[int], pairs: Sequence[Pair]) -> Row:
    tokens, branches = list(context), [0] * len(context)
    answers = []
    for branch, index in enumerate(indices, 1):
        continuation = pairs[index].continuation
        places = [len(context) - 1, *range(len(tokens), len(tokens) + len(continuation) - 1)]
        answers.append(Answer(index, continuation, tuple(places)))
        tokens += continuation[:-1]
        branches += [branch] * (len(continuation) - 1)
    return Row(tuple(tokens), tuple(branches), tuple(answers))


def batches_of(rows: Iterable[Row], most_tokens: int, most_logits: int) -> list[list[Row]]:
    """Batches of rows of one kind and similar length, longest first. A batch has at most
    `most_tokens` tokens, padding included, and `most_logits` places to predict from, or one row."""
    ordered = sorted(rows, key=lambda row: (row.branches is None, -len(row.tokens)))
    found = []
    for _, kind in itertools.groupby(ordered, key=lambda row: row.branches is None):
        batch: list[Row] = []
        places = 0
        for row in kind:
            new = sum(len(answer.places) for answer in row.answers)
            longest = len(batch[0].tokens) if batch else 0
            if batch and ((len(batch) + 1) * longest > most_tokens or places + new > most_logits):
                found.append(batch)
                batch, places = [], 0
            batch.append(row)
            places += new
        found.append(batch)
    return found
