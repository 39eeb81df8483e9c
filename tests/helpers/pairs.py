"""Pairs of a chosen and a rejected answer, as rows of ids."""

import random
from typing import Any

import numpy as np

from manta.data.preferences import PairEncoder
from manta.data.recipe import Chat
from manta.text import templates, tokenizer
from manta.text.preferences import text_of_row
from manta.text.rows import Reading
from manta.text.tokenizer import Tokenizer

WORDS = ["ray", "manta", "sea", "é", "🐟", "<|im_end|>", "1234", "why?", "yes"]
READING = Reading("text", "strict", 0, 1 << 20, "preference", "\n\n")


def chat_tokenizer(template: str = "chatml") -> Tokenizer:
    """A small tokenizer of a chat model."""
    made = tokenizer.train(["assistant\nuser\n### Response:\n ray sea why yes"] * 9, 270)
    return templates.with_template(made, templates.read(template), template)


def some_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of pairs, all different."""
    draw = random.Random(seed)

    def words() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))

    return [
        {"prompt": f"{words()} {i}", "chosen": f"{words()} +", "rejected": f"{words()} -"}
        for i in range(count)
    ]


def encoded(made: Tokenizer, row: dict[str, Any], row_tokens: int = 1 << 20) -> np.ndarray:
    """The ids of a row's pair."""
    encode = PairEncoder(made, Chat("preference", row_tokens, "last", "fail"))
    return encode(text_of_row(row, READING))[0]


def rows_of(made: Tokenizer, pairs: list[list[dict[str, Any]]], row_tokens: int) -> np.ndarray:
    """Rows of ids (B, row_tokens + 1), each with these pairs, as training reads them."""
    out = np.full((len(pairs), row_tokens + 1), made.start, dtype=np.int64)
    for row, those in zip(out, pairs, strict=True):
        ids = np.concatenate([encoded(made, pair) for pair in those])
        row[: len(ids)] = ids
    return out
