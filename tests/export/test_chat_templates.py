"""Chats have the ids, and the trained ones among them, that transformers gives them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import families
from helpers.families import CORPUS
from manta.data.conversations import rule, trained
from manta.export import special_tokens
from manta.text import templates, tokenizer, tokenizer_json
from manta.text.conversations import Turn
from manta.text.templates import Template, with_template
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import RESERVED

FAMILIES = ("llama3", "qwen3", "smollm2")
WORDS = [
    "Hello", " the", " answer", " is", "\n", "\n\n", "  ", "\t", " 12", "345", "é", "a\u0304",
    "日本", "🐟 ", "don't", " we'll", "...", ".\n", "!", "def f(x):\r\n  return", "### Response:\n",
    "assistant\n", "<|", "|>", "user", "<think>", " \n ",
]  # fmt: skip


def tokenizer_of(name: str, folder: Path) -> Tokenizer:
    if name == "bpe":
        return tokenizer.train(CORPUS, 400, RESERVED)
    if name == "r50k-like":
        return tokenizer.train(CORPUS, 400)
    folder.mkdir()
    getattr(families, name)(folder)
    data = (folder / "tokenizer.json").read_bytes()
    return tokenizer_json.from_json(data, "there", special_tokens.read(folder))


def exported(made: Tokenizer, folder: Path) -> Any:
    """The tokenizer as transformers reads it from an exported folder."""
    from transformers import AutoTokenizer

    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer_json.to_json(made))
    special_tokens.write(folder, made, 1024)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("form", ["chatml", "alpaca"])
@pytest.mark.parametrize("name", ["bpe", "r50k-like"])
def test_a_tokenizer_of_mantas_with_a_template_comes_back_from_an_export(
    tmp_path: Path, name: str, form: str
) -> None:
    made = with_template(tokenizer_of(name, tmp_path), templates.read(form), form)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json.to_json(made))
    special_tokens.write(tmp_path, made, 1024)
    special_tokens.write_json(tmp_path / "config.json", special_tokens.ids(made))
    data = (tmp_path / "tokenizer.json").read_bytes()
    back = tokenizer_json.from_json(data, "there", special_tokens.read(tmp_path))
    assert (back.extras, back.ranks, back.eot) == (made.extras, made.ranks, made.eot)


def conversation(draw: random.Random, most: int) -> list[Turn]:
    def content() -> str:
        text = ""
        while not text.strip():
            text = "".join(draw.choices(WORDS, k=draw.randint(1, 20)))
        return text

    roles = ["system"] * draw.randint(0, 1) + ["user", "assistant"] * draw.randint(1, most)
    return [Turn(role, content()) for role in roles]


@pytest.mark.parametrize(
    "count", [100, pytest.param(10_000, marks=pytest.mark.long)], ids=["few", "many"]
)
@pytest.mark.parametrize("form", ["chatml", "alpaca"])
@pytest.mark.parametrize("name", ["bpe", "r50k-like", *FAMILIES])
def test_ids_and_mask_are_those_of_transformers(
    tmp_path: Path, name: str, form: str, count: int
) -> None:
    made = with_template(tokenizer_of(name, tmp_path / "there"), templates.read(form), form)
    template, found = Template.of(made), rule(made)
    theirs = exported(made, tmp_path / "exported")
    written = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    ends = written["eos_token_id"]
    assert template.end in (ends if isinstance(ends, list) else [ends])
    draw = random.Random(0)
    ids = answers = ambiguous = 0
    for _ in range(count):
        turns = conversation(draw, 3 if form == "chatml" else 1)
        messages = [turn._asdict() for turn in turns]
        expected = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        encoded = template.encode(turns)
        assert encoded.ids[0] == made.start and not encoded.trained[0]
        assert encoded.ids[1:].tolist() == expected["input_ids"], messages
        mask = [bool(flag) for flag in expected["assistant_masks"]]
        assert encoded.trained[1:].tolist() == mask, messages
        followed = np.append(encoded.ids.astype(np.int64), made.start)
        by_rule = trained(found, followed[None])[0, :-1].tolist()
        asked = template.encode(turns[:-1], add_generation_prompt=True).ids
        if form == "alpaca" and made.decode(asked.tolist()).count("\n\n### Response:\n") > 1:
            ambiguous += by_rule != mask  # preparation names such a row
        else:
            assert by_rule == mask, messages
        theirs_asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True)
        assert asked[1:].tolist() == theirs_asked["input_ids"]
        ids += len(mask)
        answers += sum(turn.role == "assistant" for turn in turns)
        ends = encoded.ids[encoded.trained] == template.end
        assert ends.sum() == sum(turn.role == "assistant" for turn in turns)
    print(f"| {name} | {form} | {count:,} | {answers:,} | {ids:,} | 0 | {ambiguous:,} |")
