"""Pairs of answers in the forms that data sets have, and the message for every other row."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manta.errors import DataError
from manta.text import conversations, sources
from manta.text.conversations import plain
from manta.text.preferences import pair_of
from manta.text.rows import BadRows
from manta.text.sources import Source

Row = dict[str, Any]


def said(*turns: str) -> list[Row]:
    """A list of messages; the user begins."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def shared(text: str) -> list[Row]:
    return [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
            for m in said("Hi", text)]  # fmt: skip


TURNS = [["user", "Hi"], ["chosen", "Hello"], ["rejected", "What?"]]
LONG = [["user", "a"], ["assistant", "b"], ["user", "c"], ["chosen", "d"], ["rejected", "e"]]
FORMS: dict[str, tuple[Row, list[list[str]]]] = {
    "texts": ({"prompt": "Hi", "chosen": "Hello", "rejected": "What?", "score": 3}, TURNS),
    "question": (
        {"system": "Be brief.", "question": "Hi", "chosen": "Hello", "rejected": "What?"},
        [["system", "Be brief."], *TURNS],
    ),
    "lists": (
        {"prompt": said("Hi"), "chosen": said("", "Hello")[1:], "rejected": said("", "What?")[1:]},
        TURNS,
    ),
    "one message": (
        {"prompt": "Hi", "chosen": said("", "Hello")[1], "rejected": said("", "What?")[1]},
        TURNS,
    ),
    "prompt again": (
        {"prompt": "Hi", "chosen": said("Hi", "Hello"), "rejected": said("Hi", "What?")},
        TURNS,
    ),
    "implicit": ({"chosen": said("a", "b", "c", "d"), "rejected": said("a", "b", "c", "e")}, LONG),
    "ShareGPT": ({"chosen": shared("Hello"), "rejected": shared("What?")}, TURNS),
    "one text": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        },
        LONG,
    ),
    "instruction": (
        {"instruction": "Add", "input": "1", "output": "?", "chosen": "2", "rejected": "3"},
        [["user", "Add\n\n1"], ["chosen", "2"], ["rejected", "3"]],
    ),
}
BAD: dict[str, tuple[Row, str, str]] = {
    "no rejected": (
        {"prompt": "Hi", "chosen": "Hello"},
        "unknown form",
        r"its fields \(prompt, chosen\) are not those of a pair .* the forms are prompt",
    ),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "no prompt", "there is no prompt, question or"),
    "two prompts": (
        {"prompt": "Hi", "instruction": "Hi", "chosen": "a", "rejected": "b"},
        "two prompts",
        "it has prompt and instruction",
    ),
    "equal": ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "equal answers", "the same answer"),
    "other prompts": (
        {"chosen": said("Hi", "a"), "rejected": said("Ho", "b")},
        "no shared prompt",
        "do not begin with the same turn",
    ),
    "no turn before": ({"chosen": said("a"), "rejected": said("b")}, "no shared prompt", "do not"),
    "two answers differ": (
        {"chosen": said("a", "b", "c", "d"), "rejected": said("a", "x", "c", "d")},
        "more than an answer",
        "have 4 and 4 turns and differ from turn 2 on, but only the last answer may differ",
    ),
    "another prompt again": (
        {"prompt": "Hi", "chosen": said("Ho", "a"), "rejected": said("Hi", "b")},
        "no shared prompt",
        "'chosen' has 2 turns, and those before its last are not the prompt",
    ),
    "the user's": (
        {"prompt": said("a", "b"), "chosen": said("c"), "rejected": said("d")},
        "no answer",
        "the last turn of 'chosen' is the user's, not an answer",
    ),
    "no user": (
        {"prompt": said("", "Hi")[1:], "chosen": "a", "rejected": "b"},
        "roles out of order",
        "its turns are assistant",
    ),
    "empty": ({"prompt": "Hi", "chosen": " ", "rejected": "b"}, "empty turn", "'chosen' is empty"),
    "a number": ({"prompt": "Hi", "chosen": 3, "rejected": "b"}, "no turns", "is the number 3"),
}


def read(location: Path, bad: BadRows | None = None) -> list[Any]:
    source = Source(str(location), kind="preference", before_input=conversations.INPUT)
    return [
        json.loads(text) for part in sources.parts(source) for text in sources.documents(part, bad)
    ]


def write(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_form_is_read_from_json(tmp_path: Path) -> None:
    rows, expected = zip(*FORMS.values(), strict=True)
    for name in ("list.json", "rows.jsonl"):
        assert read(write(tmp_path / name, list(rows))) == list(expected)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_from_parquet(form: str, tmp_path: Path) -> None:
    row, expected = FORMS[form]
    assert read(write(tmp_path / "rows.parquet", [row, row])) == [expected, expected]


def test_a_pair_is_two_conversations_with_one_prompt() -> None:
    chosen, rejected = pair_of(json.dumps(LONG))
    assert [list(turn) for turn in chosen] == [*LONG[:3], ["assistant", "d"]]
    assert [list(turn) for turn in rejected] == [*LONG[:3], ["assistant", "e"]]
    assert plain(json.dumps(LONG)) == "a\nb\nc\nd\ne"


@pytest.mark.parametrize("name", BAD)
def test_other_rows_are_named_or_counted(name: str, tmp_path: Path) -> None:
    row, kind, words = BAD[name]
    path = write(tmp_path / "rows.jsonl", [FORMS["texts"][0], row])
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{words}.*on_bad_rows=skip"):
        read(path)
    bad = BadRows("skip")
    assert read(path, bad) == [TURNS]
    assert list(bad.counts[str(path)]) == [kind]
