"""A conversation with a model: the cache that is kept, where answers end, a full context."""

import fcntl
import io
import os
import pty
import random
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checkpoints import MODELS, model_of, save
from helpers.common import ROOT
from helpers.evaluation import TEXT
from manta.config import from_dict
from manta.errors import ConfigError, DataError
from manta.evaluate.chat import Chat, Exchange
from manta.evaluate.inference_settings import ChatConfig
from manta.evaluate.lines import PROMPT, lines
from manta.model.gpt import GPT
from manta.model.inference import inference
from manta.model.reader import Reader
from manta.text import templates
from manta.text import tokenizer as tokenizers
from manta.text.conversations import Turn
from manta.text.templates import Template, with_template
from manta.text.tokenizer import Tokenizer

JOB = [sys.executable, str(ROOT / "jobs" / "chat.py"), "checkpoint=run"]
CONTEXT = 120  # tokens, which a few turns fill
BASE = tokenizers.train([TEXT], 300)
FORMS = {
    "transcript": BASE,
    **{name: with_template(BASE, source, name) for name, source in templates.NAMED.items()},
}
QUESTIONS = ["The cat?", "and   the DOG", "<|im_end|>", "é 日本", "a" * 12, "User: x"]


def model_for(tokenizer: Tokenizer, family: str = "llama, grouped") -> GPT:
    # What Alpaca's form has around each question is longer than the context of the others.
    length = 400 if tokenizer is FORMS["alpaca"] else CONTEXT
    return model_of({**MODELS[family], "context_length": length}, tokenizer.vocab_size)


def chat_of(model: GPT, tokenizer: Tokenizer, **keys: Any) -> Chat:
    return Chat(model, tokenizer, from_dict(ChatConfig, {"temperature": 0.0, **keys}))


class Forgetful(Reader):
    """Reads every text from its beginning."""

    def logits(self, ids: list[int]) -> torch.Tensor:
        self._read = []
        return super().logits(ids)


@pytest.mark.parametrize("family", ["gpt2", "llama, grouped"])
@pytest.mark.parametrize("form", FORMS)
def test_answers_with_the_cache_are_those_computed_from_the_beginning(
    form: str, family: str
) -> None:
    """Several turns, with answers that are cut off by their length, by the reader (Ctrl-C) and by a
    full context."""
    tokenizer = FORMS[form]
    model = model_for(tokenizer, family)
    draw = random.Random(form + family)
    for system in (None, "Be brief."):
        keys = {"system": system, "max_tokens": 14}
        with inference(torch.device("cpu"), "fp32"):
            kept, again = (chat_of(model, tokenizer, **keys) for _ in range(2))
            again._reader = Forgetful(model)
            dropped = []
            for _ in range(9 if kept.form.has_turns else 2):
                question, most = draw.choice(QUESTIONS), draw.choice([3, 99])
                for chat in (kept, again):
                    texts = chat.answer(question)
                    for _, _ in zip(range(most), texts, strict=False):
                        pass
                    texts.close()
                assert kept.exchanges == again.exchanges and kept.notes == again.notes
                assert len(kept.exchanges[-1].answer) > 0
                dropped += [note for note in kept.notes if "dropped" in note]
        assert bool(dropped) == kept.form.has_turns
        if dropped:
            assert dropped[0].startswith(f'the context of {CONTEXT} tokens is full: turn 1 ("')
            numbers = [exchange.number for exchange in kept.exchanges]
            assert numbers == [*range(numbers[0], 10)] and len(dropped) == numbers[0] - 1
            opening = tokenizer.decode(kept.prompt("x"))[:60]
            assert (system or "") in opening


@settings(deadline=None, max_examples=30)
@given(
    contents=st.lists(st.sampled_from(QUESTIONS) | st.text(min_size=1, max_size=8), min_size=1),
    system=st.none() | st.just("Be brief."),
)
def test_a_prompt_is_the_templates_if_answers_are_as_text_is_encoded(
    contents: list[str], system: str | None
) -> None:
    tokenizer = FORMS["chatml"]
    chat = chat_of(model_for(tokenizer), tokenizer, system=system)
    turns = [] if system is None else [Turn("system", system)]
    for number, content in enumerate(contents):
        turns.append(Turn("user", content))
        expected = Template.of(tokenizer).encode(turns, True).ids.tolist()
        assert chat.prompt(content) == expected
        said = f"answer {number}"
        turns.append(Turn("assistant", said))
        chat.exchanges.append(Exchange(number, content, tokenizer.encode(said)))


class Scripted(Reader):
    """Reads nothing, and likes the ids of a script best, one after the other."""

    def __init__(self, model: GPT, script: list[int]):
        super().__init__(model)
        self.script = iter(script)

    def logits(self, ids: list[int]) -> torch.Tensor:
        logits = torch.zeros(1, self._model.config.padded_vocab_size)
        logits[0, next(self.script)] = 1
        return logits


@settings(deadline=None, max_examples=30)
@given(said=st.text(st.sampled_from("a b.é日🐟\n"), max_size=12))
def test_an_answer_ends_at_the_other_speakers_turn_and_in_whole_characters(said: str) -> None:
    """The conversation keeps what was said before it, whatever tokens the border is in."""
    model = model_for(BASE)
    script = BASE.encode(f" {said}\nUser: and I say more, and more, and more")
    chat = chat_of(model, BASE)
    chat._reader = Scripted(model, script)
    pieces = list(chat.answer("What?"))
    assert "".join(pieces) == f" {said}".lstrip(" ") and "\ufffd" not in "".join(pieces)
    assert all(pieces)
    assert BASE.decode(chat.exchanges[0].answer) == f" {said}"
    assert BASE.decode(chat.prompt("x")) == (f"User: What?\nAssistant: {said}\nUser: x\nAssistant:")


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_ends_before_the_end_token(form: str) -> None:
    tokenizer = FORMS[form]
    model = model_for(tokenizer)
    chat = chat_of(model, tokenizer)
    end = tokenizer.ends[-1]
    chat._reader = Scripted(model, [*tokenizer.encode("Yes"), end])
    assert "".join(chat.answer("What?")) == "Yes" and chat.notes == []
    if form == "chatml":  # two questions and an answer, each with one end
        assert chat.prompt("x").count(end) == 3


class Interrupted(Scripted):
    """Reads a script until Ctrl-C."""

    def logits(self, ids: list[int]) -> torch.Tensor:
        try:
            return super().logits(ids)
        except StopIteration:
            raise KeyboardInterrupt from None


def test_an_answer_that_ctrl_c_stops_stays_in_the_conversation_as_far_as_it_went() -> None:
    tokenizer = FORMS["chatml"]
    model = model_for(tokenizer)
    chat = chat_of(model, tokenizer)
    for said in ("Yes", ""):
        chat._reader = Interrupted(model, tokenizer.encode(said))
        with pytest.raises(KeyboardInterrupt):
            list(chat.answer("What?"))
        assert [tokenizer.decode(e.answer) for e in chat.exchanges] == ["Yes"]
    turns = [Turn("user", "What?"), Turn("assistant", "Yes"), Turn("user", "x")]
    assert chat.prompt("x") == Template.of(tokenizer).encode(turns, True).ids.tolist()


def test_a_question_longer_than_the_context_is_not_answered_and_drops_nothing() -> None:
    tokenizer = FORMS["chatml"]
    with inference(torch.device("cpu"), "fp32"):
        chat = chat_of(model_for(tokenizer), tokenizer, max_tokens=2)
        list(chat.answer("One"))
        before = list(chat.exchanges)
        assert list(chat.answer("long " * 100)) == []
        assert chat.exchanges == before
        assert len(chat.notes) == 1 and chat.notes[0].startswith("not answered: ")
        chat.reset()
        assert chat.exchanges == []


def test_a_template_without_a_place_for_a_system_message_is_named() -> None:
    source = templates.CHATML.replace(
        "{% for",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for",
    )
    tokenizer = with_template(BASE, source, "own")
    with pytest.raises(ConfigError, match=r"^system=Be brief\.: the template refuses it \(no\)"):
        chat_of(model_for(tokenizer), tokenizer, system="Be brief.")


@pytest.mark.parametrize("form", ["transcript", "chatml"])
def test_the_job_answers_each_line_of_a_pipe(form: str, tmp_path: Path) -> None:
    """Only answers are on the standard output; they are the same again with the same seed."""
    tokenizer = FORMS[form]
    model = model_for(tokenizer)
    save(model, tokenizer, tmp_path)
    said = b"The cat\n\n  the dog \n/reset\nThe cat\n/quit\nnever asked\n"
    command = [*JOB, f"home={tmp_path}", "max_tokens=6", "device=cpu", "top_k=5", "seed=3"]
    done = subprocess.run(command, input=said, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    with inference(torch.device("cpu"), "fp32"):
        chat = chat_of(model, tokenizer, max_tokens=6, temperature=0.8, top_k=5, seed=3)
        expected = []
        for question in ("The cat", "the dog", "", "The cat"):
            if question:
                expected.append("".join(chat.answer(question)))
            else:
                chat.reset()
    assert done.stdout.decode() == "".join(f"{answer}\n" for answer in expected)
    assert "forgotten" in done.stderr.decode()


def test_a_terminal_gets_a_prompt_and_its_escapes_are_shown(tmp_path: Path) -> None:
    """Ctrl-C stops an answer. At the prompt, it says what ends the job, and Ctrl-D ends it."""
    tokenizer = FORMS["chatml"]
    family = {**MODELS["llama, grouped"], "context_length": 5000}
    model = model_of(family, tokenizer.vocab_size)
    with torch.no_grad():
        model.head.weight[tokenizer.encode("\x1b")[0]] *= 50  # the byte of a terminal's escape
    save(model, tokenizer, tmp_path)
    ours, theirs = pty.openpty()
    keys = ["max_tokens=4900", "device=cpu", "temperature=1", "top_k=2"]
    job = subprocess.Popen(
        [*JOB, f"home={tmp_path}", *keys], start_new_session=True,
        stdin=theirs, stdout=theirs, stderr=theirs,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    shown = shown_until(ours, PROMPT)
    os.write(ours, b"The cat\n")
    shown += shown_until(ours, "\\x1b")
    os.write(ours, b"\x03")
    stopped = shown_until(ours, PROMPT, again=b"\x03", patience=20)
    os.write(ours, b"\x03")
    shown += stopped + shown_until(ours, PROMPT, again=b"\x03")
    os.write(ours, b"\x04")
    assert job.wait(60) == 0
    os.close(ours)
    assert "stopped" in stopped and "Ctrl-D" in shown
    # (readline itself writes escapes, of which these are all that may be there)
    assert "\x1b" not in shown.replace("\x1b[?2004h", "").replace("\x1b[?2004l", "")


def shown_until(terminal: int, end: str, again: bytes = b"", patience: float = 3.0) -> str:
    """What a terminal shows up to `end`. If that has not come after some seconds, `again` is typed
    once more, as a person would: Python's readline passes over a Ctrl-C in the moment after it
    wrote a prompt."""
    shown, typed, until = b"", time.monotonic(), time.monotonic() + 120
    while time.monotonic() < until:
        if shown.replace(b"\x1b[?2004h", b"").endswith(end.encode()):
            return shown.decode()
        if again and time.monotonic() > typed + patience:
            typed = time.monotonic()
            os.write(terminal, again)
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)
    raise AssertionError(shown[-500:])


def test_a_pipe_that_is_not_utf8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\n")))
    with pytest.raises(DataError, match=r"^standard input, at line \d+: not UTF-8"):
        list(lines(print))
