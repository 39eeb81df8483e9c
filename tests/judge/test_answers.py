"""Questions in the forms that files have, and what models answer to them."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import ROOT
from manta.config import load
from manta.errors import DataError
from manta.evaluate.chat import Chat
from manta.evaluate.inference_settings import ChatConfig
from manta.job import run_job
from manta.judge import answers
from manta.judge.answers import TOO_LONG, Answer, Model
from manta.judge.questions import Question, read
from manta.judge.records import Records
from manta.judge.settings import JudgeConfig
from manta.model.inference import inference
from manta.text.conversations import Turn
from manta.train.checkpoints import checkpoint

# Rows, the turns that are asked, and the reference.
HI = [Turn("user", "Hi?")]
TALK = [Turn("user", "Hi?"), Turn("assistant", "Hello."), Turn("user", "Who?")]
FORMS: list[tuple[dict[str, Any], list[Turn], str | None]] = [
    ({"question": "Hi?"}, HI, None),
    ({"question": "Hi?", "answer": "Hello."}, HI, "Hello."),
    ({"question": "Hi?", "reference": "Hello.", "id": 7}, HI, "Hello."),
    ({"instruction": "Hi?", "input": "", "output": "Hello."}, HI, "Hello."),
    ({"instruction": "Hi", "input": "you?", "output": ""}, [Turn("user", "Hi\n\nyou?")], None),
    ({"prompt": "Hi?", "completion": "Hello."}, HI, "Hello."),
    ({"prompt": "Hi?"}, HI, None),
    ({"messages": [turn._asdict() for turn in TALK]}, TALK, None),
    ({"prompt": [turn._asdict() for turn in TALK]}, TALK, None),
    (
        {"messages": [t._asdict() for t in [Turn("system", "S"), *HI, Turn("assistant", "Ho")]]},
        [Turn("system", "S"), *HI], "Ho",
    ),
    (
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho"}]},
        HI, "Ho",
    ),
]  # fmt: skip


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_every_form_of_a_question_is_read(ending: str, tmp_path: Path) -> None:
    rows = [row for row, _, _ in FORMS]
    file = tmp_path / f"q.{ending}"
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    file.write_text(json.dumps(rows, indent=1) if ending == "json" else lines)
    assert read(str(file)) == [Question(tuple(turns), answer) for _, turns, answer in FORMS]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "Hi?"}, "unknown form|are not those of a conversation"),
        ({"question": ""}, "'prompt' is empty"),
        ({"question": None}, "are not those of a conversation"),
        ({"question": 3}, "not a list of turns"),
        ([], "but a row is a JSON object"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "after an optional system"),
        ({"instruction": "Hi?", "input": 3, "output": "x"}, "'input' is the number 3"),
    ],
    ids=str,
)
def test_a_row_without_a_question_is_named_by_its_number(
    row: Any, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "q.json"
    file.write_text(json.dumps([{"question": "Hi?"}, row]))
    with pytest.raises(DataError, match=rf"q\.json, row 2: .*(?:{words})") as refused:
        read(str(file))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("q.txt", b"Hi?", r"unknown kind of file; readable are \.json, \.jsonl"),
        ("q.json", b"", "no questions in it; a row has question"),
        ("q.json", b"[]", "no questions in it"),
        ("q.jsonl", b"\xff", "not UTF-8 at byte 0"),
        ("q.json", b"[{]", "not valid JSON"),
        ("q.jsonl", b'{"question": "a", "question": "b"}', "row 1: .*is there twice"),
    ],
    ids=str,
)
def test_a_file_that_has_no_questions_is_said_so(
    name: str, data: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words):
        read(str(tmp_path / name))
    with pytest.raises(DataError, match="no such file"):
        read(str(tmp_path / "nowhere.json"))


@given(data=st.binary(max_size=60) | st.sampled_from([b'{"key": 1}', b"[" * 5000, b"null"]))
@settings(deadline=None, max_examples=30)
def test_whatever_else_is_in_the_file_its_whole_rows_are_read(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("records") / "kept.jsonl"
    rows = [Answer(f"{i}", "m", "/c", "q\n\u2028?", "a\r\x00", 3, None) for i in range(4)]
    Records(str(path), Answer).add(rows[:2])
    path.write_bytes(path.read_bytes() + data)
    Records(str(path), Answer).add(rows[2:])
    found = Records(str(path), Answer).rows
    assert [found[row.key] for row in rows] == rows


def config(home: Path, *keys: str) -> JudgeConfig:
    common = [f"home={home}", f"questions={home}/questions.json", "device=cpu", "max_tokens=30"]
    return load(JudgeConfig, [*common, *keys])


@pytest.mark.parametrize("run", ["base", "chat"])
@pytest.mark.parametrize("keys", [[], ["temperature=0.7"]], ids=str)
def test_an_answer_is_what_a_chat_says_and_does_not_depend_on_the_batch(
    run: str, keys: list[str], judged_home: Path, tmp_path: Path
) -> None:
    c = config(judged_home, *keys)
    model = Model.of(run, str(judged_home))
    asked, (own,) = answers.read(c, [model])
    found = {}
    for size in (1, 5):
        kept = Records(str(tmp_path / f"{size}.jsonl"), Answer)
        sized = config(judged_home, *keys, f"batch={size}")
        found[size] = [a.text for a in answers.answer(sized, model, own, kept, lambda n: None)]
    assert found[1] == found[5]
    if keys:
        return
    with inference(torch.device("cpu"), "fp32"):
        loaded, made = checkpoint.load_model(model.path), checkpoint.load_tokenizer(model.path)
        chat = Chat(loaded, made, load(ChatConfig, ["temperature=0", "max_tokens=30"]))
        for question, text in zip(asked, found[1], strict=True):
            chat.reset()
            assert "".join(chat.answer(question.text)) == text


def test_a_question_that_does_not_fit_and_an_answer_that_is_cut_off_are_noted(
    judged_home: Path, tmp_path: Path
) -> None:
    model = Model.of("chat", str(judged_home))
    long = Question((Turn("user", "Where? " * 300),), None)
    tight = Question((Turn("user", "x" * 600),), None)
    kept = Records(str(tmp_path / "kept.jsonl"), Answer)
    c = config(judged_home, "max_tokens=100")
    first, second = answers.answer(c, model, [long, tight], kept, lambda n: None)
    assert (first.text, first.tokens, first.note) == ("", 0, TOO_LONG)
    assert 0 < second.tokens < 100 and second.note in (None, "cut off")
    assert len(Records(kept.path, Answer).rows) == 2


def test_the_book_s_two_forms_of_an_instruction_are_asked_as_they_were_trained(
    judged_home: Path,
) -> None:
    """A model with Alpaca's template gets its own words before the input; a judge does not."""
    plain = Model("a", "", "1", "\n\n")
    alpaca = Model("b", "", "2", "\n\n### Input:\n")
    asked, chosen = answers.read(config(judged_home, "limit=2"), [plain, alpaca])
    assert [q.text for q in asked] == [q.text for q in chosen[0]]
    assert chosen[1][1].text == "Where did animal 1 go?\n\n### Input:\nIt is a 1."
    assert len(asked) == 2


def test_the_job_goes_on_after_a_kill_and_ends_with_2_and_a_line(
    judged_home: Path,
    tmp_path: Path,
    load_job: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The process is killed once some answers are kept; this one goes on."""
    rows = [{"question": f"What is {i}?"} for i in range(400)]
    (tmp_path / "many.json").write_text(json.dumps(rows))
    keys = [
        f"home={judged_home}", "checkpoint=base", f"questions={tmp_path}/many.json", "device=cpu",
        "batch=2", "max_tokens=40",
    ]  # fmt: skip
    file = judged_home / "judged" / "many" / "answers.jsonl"
    command = [sys.executable, str(ROOT / "jobs" / "judge.py"), *keys]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        for _ in range(10_000):
            if process.poll() is not None or (file.exists() and file.stat().st_size):
                break
            time.sleep(0.02)
        process.kill()
    before = Records(str(file), Answer).rows
    assert 0 < len(before) < 400
    job = load_job("judge")
    for more, code in (([], 0), (["judge=http://127.0.0.1:9/v1"], 2)):
        monkeypatch.setattr(sys, "argv", ["judge.py", *keys, "limit=12", *more])
        with pytest.raises(SystemExit) as ended:
            run_job(job.main, JudgeConfig)
        assert ended.value.code == code
        assert before.items() <= Records(str(file), Answer).rows.items()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: judge=http://127.0.0.1:9/v1: cannot say which models it has")
