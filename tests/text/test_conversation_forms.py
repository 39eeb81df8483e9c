"""Conversations in the forms that data sets have, and the message for every other row."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manta.errors import DataError
from manta.text import conversations, sources
from manta.text.conversations import Turn, plain, turns_of
from manta.text.rows import BadRows
from manta.text.sources import Source

TURNS = [["user", "Hi"], ["assistant", "Hello"], ["user", "Bye"], ["assistant", "So long"]]
OPENAI = {"messages": [{"role": r, "content": c} for r, c in TURNS], "id": 7, "prompt": "Hi"}
SHARE_GPT = {
    "conversations": [
        {"from": {"user": "human", "assistant": "gpt"}[r], "value": c} for r, c in TURNS
    ]
}
ALPACA = {"instruction": "Add", "input": "1 and 2", "output": "3", "text": "unused"}
PAIR = {"prompt": "Hi", "completion": "Hello"}
PAIR_OF_LISTS = {"prompt": OPENAI["messages"][:1], "completion": OPENAI["messages"][1:2]}  # type: ignore[index]
PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
ROWS = [OPENAI, SHARE_GPT, ALPACA, PAIR, PAIR_OF_LISTS, PARTS]
EXPECTED = [
    TURNS,
    TURNS,
    [["user", "Add\n\n1 and 2"], ["assistant", "3"]],
    TURNS[:2],
    TURNS[:2],
    TURNS[:1],
]


def read(location: Path | str, bad: BadRows | None = None, **keys: Any) -> Iterator[list[Any]]:
    source = Source(str(location), kind="chat", before_input=conversations.INPUT, **keys)
    for part in sources.parts(source):
        for text in sources.documents(part, bad):
            yield [list(turn) for turn in turns_of(text)]


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.startswith("list"):
        path.write_text("\ufeff\n" + json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["list.json", "lines.json", "rows.jsonl"])
def test_every_form_is_read_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    assert list(read(write(tmp_path / name, ROWS))) == EXPECTED
    (tmp_path / "readme.md").write_text("not read")
    assert list(read(tmp_path)) == EXPECTED


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_every_form_is_read_from_parquet(tmp_path: Path, number: int) -> None:
    file = write(tmp_path / "a.parquet", [ROWS[number]] * 3)
    assert list(read(file)) == [EXPECTED[number]] * 3


def test_every_form_is_read_from_a_hugging_face_dataset(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [OPENAI] * 2)
    assert list(read(f"hf:{tmp_path / 'set'}")) == [TURNS] * 2


def test_the_turns_of_a_conversation_come_back() -> None:
    turns = [Turn("user", '"é\u2028\n'), Turn("assistant", "<|im_end|>")]
    text = json.dumps(turns, ensure_ascii=False)
    assert turns_of(text) == turns
    assert plain(text) == '"é\u2028\n\n<|im_end|>'


def message(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER, ANSWER = message("user", "Hi"), message("assistant", "Hello")
BAD: list[tuple[Any, str, str]] = [
    ({"a": 1, "b": ""}, "unknown form", "its fields (a, b) are not those of a conversation"),
    ({**PAIR, "messages": [USER]}, "two forms", "leave out one of them"),
    ({"messages": []}, "no turns", "'messages' is a list []"),
    ({"messages": "Hi"}, "no turns", "'messages' is the text 'Hi'"),
    ({"messages": [USER, 3]}, "no turns", "'messages.1' is the number 3"),
    ({"messages": [{"role": "user"}]}, "no turns", "(it has: role)"),
    ({"messages": [USER, message("tool", "x")]}, "unknown role", "'messages.1.role'"),
    ({"messages": [message(None, "x")]}, "unknown role", "known are system, user"),
    ({"messages": [USER, message("assistant", " \n")]}, "empty turn", "'messages.1.content'"),
    ({"messages": [USER, message("assistant", None)]}, "not text", "is null"),
    ({"messages": [message("user", [{"type": "image"}])]}, "not only text", "parts"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "not only text", "tool_calls"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "not only text", "weight"),
    ({"messages": [ANSWER, USER]}, "roles out of order", "its turns are assistant, ..."),
    ({"messages": [USER, USER, ANSWER]}, "roles out of order", "are user, user, ..."),
    ({"messages": [USER, message("system", "x")]}, "roles out of order", "user, system"),
    ({"messages": [message("system", "x")]}, "roles out of order", "are system"),
    ({**ALPACA, "output": ""}, "empty turn", "'output' is empty"),
    ({**PAIR, "completion": "\ud800"}, "not Unicode", "'completion' is not valid Unicode"),
    ([1], "not an object", "a list [1]"),
]


@pytest.mark.parametrize("row, kind, what", BAD, ids=[f"{i}-{b[1]}" for i, b in enumerate(BAD)])
def test_other_rows_are_named_or_counted(tmp_path: Path, row: Any, kind: str, what: str) -> None:
    for name, place in (("list.json", "row 2"), ("a.jsonl", "line 2")):
        file = write(tmp_path / name, [PAIR, row, PAIR])
        with pytest.raises(DataError) as e:
            list(read(file))
        said = str(e.value)
        assert said.startswith(f"{file}, {place}: ") and what in said and "\n" not in said
        assert said.endswith("or leave such rows out with data.on_bad_rows=skip")
        bad = BadRows("skip")
        assert list(read(file, bad, on_bad_rows="skip")) == [TURNS[:2]] * 2
        assert bad.counts == {str(file): {kind: 1}}


def test_a_key_that_is_there_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b", "completion": "c"}\n')
    with pytest.raises(DataError, match="'completion' is there twice"):
        list(read(tmp_path))


def test_half_a_surrogate_pair_is_replaced_if_that_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{**PAIR, "completion": "a\ud800"}])
    assert list(read(file, errors="replace")) == [
        [["user", "Hi"], ["assistant", "a\ufffd\ufffd\ufffd"]]
    ]


def test_a_list_or_a_row_that_is_too_large_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "list.json", [PAIR] * 9)
    with pytest.raises(DataError, match=r"a list of more than 100 bytes.*max_document_bytes"):
        list(read(file, most_bytes=100))
    large = {**PAIR, "completion": "x" * 200}
    file = write(tmp_path / "a.parquet", [large])
    with pytest.raises(DataError, match=r"a.parquet, row 1: a row of .* data.max_document_bytes"):
        list(read(file, most_bytes=100))
