"""Conversations in SQLite: nothing that was said is lost, whoever writes and whenever it ends."""

import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.errors import DataError
from manta.serve.conversations import Conversations
from manta.text import conversations as texts
from manta.text.rows import Reading


@pytest.fixture
def kept(tmp_path: Path) -> Any:
    made = Conversations(tmp_path / "conversations.sqlite")
    yield made
    made.close()


def said(kept: Conversations, conversation: int) -> list[str]:
    """The texts of the branch that is shown."""
    leaf = kept.get(conversation)["leaf"]
    return [turn["text"] for turn in kept.path(conversation, leaf)]


def exchange(kept: Conversations, conversation: int, parent: int | None, n: int) -> int:
    """A question with its answer; returns the answer's id."""
    question = kept.ask(conversation, parent, f"question {n}")
    answer = kept.answer(conversation, question, "m", {"seed": n})
    kept.write(answer, f"answer {n}", "complete", ids=(n, n + 1), tokens=[["a", -0.5, []]])
    return answer


def test_a_conversation_is_kept_and_found_again(kept: Conversations) -> None:
    one = kept.new(system="Be kind.")
    last = exchange(kept, one, exchange(kept, one, None, 1), 2)
    kept.close()
    again = Conversations(kept.file)
    found = again.get(one)
    assert found["title"] == "question 1" and found["system"] == "Be kind."
    assert said(again, one) == ["question 1", "answer 1", "question 2", "answer 2"]
    turn = again.turn(one, last)
    assert turn["ids"] == [2, 3] and turn["settings"] == {"seed": 2} and turn["state"] == "complete"
    again.close()
    assert kept.file.stat().st_mode & 0o077 == 0


def test_an_edit_is_another_branch(kept: Conversations) -> None:
    one = kept.new()
    first = exchange(kept, one, None, 1)
    exchange(kept, one, first, 2)
    edited = exchange(kept, one, first, 3)
    assert said(kept, one)[2:] == ["question 3", "answer 3"]
    kept.change(one, leaf=edited - 2)
    assert said(kept, one)[2:] == ["question 2", "answer 2"]
    assert len(kept.get(one)["turns"]) == 6


def test_searched_renamed_deleted_and_back(kept: Conversations) -> None:
    one, two = kept.new(), kept.new()
    exchange(kept, one, None, 100)
    exchange(kept, two, None, 200)
    assert [c["id"] for c in kept.listed("answer 100")] == [one]
    assert kept.listed("100%") == [] and kept.listed("question _00") == []
    kept.change(two, title="a\nname\x1b[2J")
    assert kept.get(two)["title"] == "a name\\x1b[2J"
    stamp = kept.stamp()
    kept.delete(two)
    assert kept.stamp() != stamp
    assert [c["id"] for c in kept.listed()] == [one]
    with pytest.raises(KeyError):
        kept.get(two)
    kept.delete(two, undo=True)
    assert {c["id"] for c in kept.listed()} == {one, two}


def test_what_is_not_there_is_said(kept: Conversations) -> None:
    one, two = kept.new(), kept.new()
    answer = exchange(kept, one, None, 1)
    question = answer - 1
    for wrong in (
        lambda: kept.get(99),
        lambda: kept.ask(99, None, "x"),
        lambda: kept.ask(two, answer, "x"),  # of another conversation
        lambda: kept.ask(one, question, "x"),  # a question after a question
        lambda: kept.answer(one, answer, "m", {}),
        lambda: kept.change(one, leaf=99),
        lambda: kept.delete(99),
    ):
        with pytest.raises(KeyError):
            wrong()


def test_an_export_is_what_finetune_reads(kept: Conversations) -> None:
    one = kept.new(system="Be kind.")
    answer = exchange(kept, one, exchange(kept, one, None, 1), 2)
    kept.ask(one, answer, "a question without an answer")
    kept.new()  # an empty conversation
    rows = [json.loads(json.dumps(row)) for row in kept.export()]
    reading = Reading("text", "strict", 0, 1 << 20, "chat", "\n\n")
    (turns,) = [texts.turns_of(texts.text_of_row(row, reading)) for row in rows]
    assert [t.role for t in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[-1].content == "answer 2"
    assert list(kept.export(one)) == rows


def test_an_export_has_all_conversations_up_to_an_empty_text(kept: Conversations) -> None:
    with sqlite3.connect(kept.file) as db:  # many, quickly
        db.executemany(
            "INSERT INTO conversations (id, title, leaf, created, updated) VALUES (?, '', ?, 0, 0)",
            [(n, 2 * n) for n in range(1, 601)],
        )
        db.executemany(
            "INSERT INTO turns (id, conversation, parent, role, text, state, created)"
            " VALUES (?, ?, ?, ?, 'x', 'complete', 0)",
            [
                (2 * n - is_user, n, None if is_user else 2 * n - 1,
                 "user" if is_user else "assistant")
                for n in range(1, 601) for is_user in (1, 0)
            ],
        )  # fmt: skip
    assert len(kept.listed()) == len(list(kept.export())) == 600
    one = kept.new(system=" ")
    first = exchange(kept, one, None, 1)
    silent = kept.answer(one, kept.ask(one, first, "well?"), "m", {})
    kept.write(silent, "", "complete")
    exchange(kept, one, silent, 3)
    (row,) = kept.export(one)
    assert [message["content"] for message in row["messages"]] == ["question 1", "answer 1"]


def test_a_later_process_with_the_same_id_is_not_the_writer(kept: Conversations) -> None:
    """A server in a container has the same process id after each start."""
    one = kept.new()
    answer = kept.answer(one, kept.ask(one, None, "why?"), "m", {})
    kept.write(answer, "half", "streaming", ids=(1, 2))
    assert kept.turn(one, answer)["state"] == "streaming"
    with pytest.raises(KeyError):
        kept.go_on(one, answer)
    with sqlite3.connect(kept.file) as db:
        db.execute("UPDATE turns SET writer = ?", (f"{os.getpid()}:1.0",))
    found = kept.turn(one, answer)
    assert (found["state"], found["text"], found["ids"]) == ("interrupted", "half", [1, 2])
    kept.go_on(one, answer)
    assert kept.turn(one, answer)["state"] == "streaming"


def test_two_processes_see_each_other(kept: Conversations) -> None:
    other = Conversations(kept.file)
    one = kept.new()
    stamp = other.stamp()
    exchange(other, one, None, 1)
    assert said(kept, one) == ["question 1", "answer 1"] and kept.stamp() != stamp
    other.close()


def _write_until_killed(file: str, told: Any) -> None:
    kept = Conversations(Path(file))
    one = kept.new()
    parent = None
    for n in range(10_000):
        question = kept.ask(one, parent, f"question {n}")
        answer = kept.answer(one, question, "m", {})
        for part in range(5):
            kept.write(answer, f"answer {n} {part}", "streaming")
        if n % 2:
            kept.write(answer, f"answer {n}", "complete", ids=(n,))
            told.send((one, answer, n))
        parent = answer


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """All that was written when a process said so is there after SIGKILL; the answer that was being
    written is marked as interrupted."""
    file = tmp_path / "conversations.sqlite"
    context = multiprocessing.get_context("spawn")
    for _ in range(3):
        ours, theirs = context.Pipe()
        process = context.Process(target=_write_until_killed, args=(str(file), theirs))
        process.start()
        one, answer, n = ours.recv()
        time.sleep(0.05)
        while ours.poll():
            one, answer, n = ours.recv()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kept = Conversations(file)
        turn = kept.turn(one, answer)
        assert turn["state"] == "complete" and turn["text"] == f"answer {n}" and turn["ids"] == [n]
        states = {turn["state"] for turn in kept.get(one)["turns"]}
        assert "streaming" not in states
        kept.close()


def test_a_file_of_another_program_stays(tmp_path: Path) -> None:
    file = tmp_path / "conversations.sqlite"
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE mine (x)")
    before = file.read_bytes()
    with pytest.raises(DataError, match="belongs to another program"):
        Conversations(file)
    assert file.read_bytes() == before
    file.write_bytes(b"not a database at all, but a text of some length" * 100)
    with pytest.raises(DataError, match="cannot be opened"):
        Conversations(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(DataError, match="cannot be opened"):
        Conversations(file)


@pytest.mark.skipif(sys.platform == "win32", reason="SQLite's file is in use there")
def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "conversations.sqlite"
    kept = Conversations(file)
    one = kept.new()
    parent = None
    for n in range(200):
        parent = exchange(kept, one, parent, n)
    kept.close()
    content = bytearray(file.read_bytes())
    content[4096:20_000] = b"\xff" * (20_000 - 4096)
    file.write_bytes(content)
    with pytest.raises(DataError, match="move it away"):
        Conversations(file)
    assert file.read_bytes() == bytes(content)


steps = st.lists(
    st.tuples(st.sampled_from(["ask", "again", "leaf", "delete", "undo"]), st.integers(0, 30)),
    max_size=25,
)


@settings(max_examples=30, deadline=None)
@given(steps=steps)
def test_nothing_is_ever_lost(tmp_path_factory: pytest.TempPathFactory, steps: Any) -> None:
    """Whatever is done, each turn that was said is still in the file, with its parent."""
    kept = Conversations(tmp_path_factory.mktemp("kept") / "conversations.sqlite")
    one, said_so_far = kept.new(), dict[int, tuple[int | None, str]]()
    is_deleted = False
    for what, number in steps:
        answers = [turn for turn in said_so_far if said_so_far[turn][1].startswith("answer")]
        if what == "delete":
            kept.delete(one)
            is_deleted = True
        elif what == "undo":
            kept.delete(one, undo=True)
            is_deleted = False
        elif is_deleted:
            continue
        elif what == "ask":
            parent = answers[number % len(answers)] if answers else None
            answer = exchange(kept, one, parent, number)
            said_so_far |= {
                answer - 1: (parent, f"question {number}"),
                answer: (answer - 1, f"answer {number}"),
            }
        elif what == "again" and answers:
            question = said_so_far[answers[number % len(answers)]][0]
            assert question is not None
            answer = kept.answer(one, question, "m", {})
            kept.write(answer, f"answer {number}", "stopped")
            said_so_far[answer] = (question, f"answer {number}")
        elif what == "leaf" and said_so_far:
            kept.change(one, leaf=list(said_so_far)[number % len(said_so_far)])
    kept.delete(one, undo=True)
    turns = {turn["id"]: (turn["parent"], turn["text"]) for turn in kept.get(one)["turns"]}
    assert turns == said_so_far
    kept.close()
