"""Questions about words and small numbers, and how a model's answers to them are counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checkpoints import MODELS, model_of
from helpers.evaluation import TEXT
from manta.config import from_dict
from manta.errors import ConfigError, DataError
from manta.evaluate import questions
from manta.evaluate.chat import Chat
from manta.evaluate.questions import AnswersConfig, Pair, QuestionsConfig
from manta.model.inference import inference
from manta.text import templates
from manta.text import tokenizer as tokenizers
from manta.text.templates import with_template


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), asked=st.integers(0, 10**6))
def test_no_conversation_has_a_question_that_is_asked(seed: int, asked: int) -> None:
    talks = questions.conversations(100, seed)
    assert talks == questions.conversations(100, seed)
    assert all(1 <= len(talk) <= questions.MOST_TURNS for talk in talks)
    written = {pair.question for talk in talks for pair in talk}
    held = questions.held_out(100, asked)
    assert not written & {pair.question for pair in held}
    for question, answer in held:  # whatever the form, a number is right
        if "minus" in question:
            high, low = (int(word) for word in question.strip("?").split() if word.isdigit())
            assert answer.endswith(f" {high - low}.")


def test_the_file_is_written_once_and_another_one_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "made.jsonl"

    def write(**keys: Any) -> str:
        return questions.write(from_dict(QuestionsConfig, {"out": str(path), "count": 50, **keys}))

    assert write() == write() == str(path)
    data = path.read_bytes()
    with pytest.raises(DataError, match="another file is there"):
        write(seed=1)
    assert path.read_bytes() == data
    rows = [json.loads(line) for line in data.splitlines()]
    assert len(rows) == 50 and all(len(row["messages"]) % 2 == 0 for row in rows)


def test_held_out_questions_are_written_once_each_with_their_answers(tmp_path: Path) -> None:
    path = tmp_path / "held.jsonl"
    keys = {"out": str(path), "count": 300, "held_out": True}
    assert questions.write(from_dict(QuestionsConfig, keys)) == str(path)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["question"] for row in found}) == 300
    assert all(questions.is_held_out(row["question"]) and row["answer"] for row in found)
    with pytest.raises(ConfigError, match=r"count=9999: give at most [\d,]+ questions"):
        questions.write(from_dict(QuestionsConfig, {**keys, "count": 9999}))


def test_answers_that_end_and_that_are_right_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of this test says what a script has for each question."""
    tokenizer = with_template(tokenizers.train([TEXT], 300), templates.CHATML, "chatml")
    model = model_of({**MODELS["llama"], "context_length": 200}, tokenizer.vocab_size)
    said = {"One?": ("Right.", True), "Two?": ("Wrong.", True), "Three?": ("Right.", False)}
    pairs = [Pair(question, "Right.") for question in said]
    monkeypatch.setattr(questions, "held_out", lambda count, seed: pairs[:count])

    class Scripted(Chat):
        def answer(self, question: str) -> Any:
            text, is_ended = said[question]
            self.notes = [] if is_ended else ["cut off"]
            return iter([text])

    monkeypatch.setattr(questions, "Chat", Scripted)
    found = questions.ask(model, tokenizer, from_dict(AnswersConfig, {"count": 3}))
    assert found == (3, 2, 2)
    assert found.line() == "3 answers: 66.7% end by themselves, 66.7% are right"


def test_a_model_that_never_ends_its_answers_has_none_that_end() -> None:
    tokenizer = with_template(tokenizers.train([TEXT], 300), templates.CHATML, "chatml")
    model = model_of({**MODELS["llama"], "context_length": 120}, tokenizer.vocab_size)
    for end in tokenizer.ends:
        model.embedding.weight.data[end] = 0
    with inference(torch.device("cpu"), "fp32"):
        c = from_dict(AnswersConfig, {"count": 3, "max_tokens": 5})
        assert questions.ask(model, tokenizer, c) == (3, 0, 0)
