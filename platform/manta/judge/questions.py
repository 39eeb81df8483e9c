"""Questions from a person's file, with the reference answers that it has."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from manta import foreign, storage
from manta.errors import DataError
from manta.evaluate.files import MOST_BYTES
from manta.text import conversations, rows
from manta.text.conversations import Turn
from manta.text.rows import BadRow, Reading

ENDINGS = (".json", ".jsonl")
FORMS = "question (and answer), instruction (input, output), prompt (completion), messages"


class Question(NamedTuple):
    """A question: `turns` end with what the user asks."""

    turns: tuple[Turn, ...]
    reference: str | None
    """The answer that the file has."""

    @property
    def text(self) -> str:
        """The question for a judge: a transcript, if it has several turns."""
        if len(self.turns) == 1:
            return self.turns[0].content
        return "\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in self.turns)


def read(path: str, before_input: str = conversations.INPUT) -> list[Question]:
    """Reads questions, in the file's order.

    Args:
        before_input: what is put between the instruction and the input of a row.

    Raises:
        DataError: the file is missing, empty or of another kind, or a row has no question (the
            message has its number).
    """
    key = f"questions={path}"
    ending = os.path.splitext(path)[1].lower()  # noqa: PTH122 - may be s3://...
    if ending not in ENDINGS:
        raise DataError(f"{key}: unknown kind of file; readable are {', '.join(ENDINGS)}")
    data = foreign.read_bytes(storage.absolute(path), DataError, MOST_BYTES)
    reading = Reading("text", "strict", 0, MOST_BYTES, "chat", before_input)
    found, number = [], 0
    try:
        text = rows.text_of_bytes(data, reading).removeprefix("\ufeff")
        if text.lstrip().startswith("["):
            for number, row in enumerate(rows.value_of_json(text), 1):  # noqa: B007
                found.append(_question(row, reading))
        else:
            for number, content in enumerate(text.split("\n"), 1):  # noqa: B007
                if content and not content.isspace():
                    found.append(_question(rows.object_of_json(content), reading))
    except BadRow as e:
        where = f"{key}, row {number}" if number else key
        raise DataError(f"{where}: {e.what}; {e.remedy}") from None
    if not found:
        raise DataError(f"{key}: no questions in it; a row has {FORMS}")
    return found


def _question(row: Any, reading: Reading) -> Question:
    if not isinstance(row, dict):
        shown = rows.described(row)
        raise BadRow("not an object", f"{shown}, but a row is a JSON object", "fix it")
    row, is_open = _with_answer(row)
    turns = conversations.turns_of(conversations.text_of_row(row, reading))
    if turns[-1].role != "assistant":  # messages that end with a question
        return Question(tuple(turns), None)
    return Question(tuple(turns[:-1]), None if is_open else turns[-1].content)


def _with_answer(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The row in one of the forms of `text.conversations`, and whether its answer is only there for
    the form."""
    if getattr(row, "keys_twice", None):
        return row, False  # it will be refused
    if "question" in row and not {"messages", "conversations", "instruction", "prompt"} & {*row}:
        answer = row.get("answer") or row.get("reference")
        row = {"prompt": row["question"], "completion": answer}
    for asked, answered in (("instruction", "output"), ("prompt", "completion")):
        if row.get(asked) is not None and row.get(answered) in (None, ""):
            return {**row, answered: "?"}, True
    return row, False
