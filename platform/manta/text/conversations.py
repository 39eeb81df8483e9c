"""Conversations in the forms in which data sets have them, as turns.

Between reading and tokenizing, a conversation is one text: the JSON of its turns
([["user", "Hi"], ["assistant", "Hello"]]). So conversations are read, shuffled and compared as
documents are.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from manta import foreign
from manta.text.rows import BadRow, Reading, described, too_large

ROLES = ("system", "user", "assistant")
# The names that data sets have for the roles.
ROLE_OF = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip
FORMS = (
    "messages (a list of role and content)",
    "conversations (a list of from and value)",
    "instruction, input and output",
    "prompt and completion",
)
# What a message can have that would change its meaning if it were ignored.
REFUSED = (
    "tool_calls", "tool_call_id", "function_call", "refusal", "audio", "reasoning_content",
    "weight",
)  # fmt: skip
INPUT = "\n\n"  # between the instruction and the input of a row
ALPACA_INPUT = "\n\n### Input:\n"


class Turn(NamedTuple):
    """What one side says; `role` is one of ROLES."""

    role: str
    content: str


def text_of_row(row: Mapping[str, Any], reading: Reading) -> str:
    """A row's conversation as one text, of which `turns_of` makes turns again.

    Raises:
        BadRow: the row has no conversation, or one with an empty turn, an unknown role, or roles
            out of order.
    """
    refuse_twice(row)
    turns = _turns(row, reading)
    check_order([turn.role for turn in turns])
    return joined(turns, reading)


def refuse_twice(row: Mapping[str, Any]) -> None:
    """Raises BadRow if a field is there twice: one of them would be ignored."""
    if twice := getattr(row, "keys_twice", None):  # rows.value_of_json
        raise BadRow("two texts", f"'{min(twice)}' is there twice", "leave out one of them")


def joined(turns: list[Turn], reading: Reading) -> str:
    """Turns as one text. Raises BadRow if it is too large."""
    text = json.dumps(turns, ensure_ascii=False)
    if len(text) > reading.most_bytes or len(text.encode()) > reading.most_bytes:
        raise too_large(f"a conversation of {len(text):,} characters", reading)
    return text


def turns_of(text: str) -> list[Turn]:
    return [Turn(role, content) for role, content in json.loads(text)]


def plain(text: str) -> str:
    """All that is said in a conversation, without the roles."""
    return "\n".join(turn.content for turn in turns_of(text))


def _turns(row: Mapping[str, Any], reading: Reading) -> list[Turn]:
    there = {key for key, value in row.items() if value is not None}
    found = [
        form
        for form, keys in enumerate(
            ({"messages"}, {"conversations"}, {"instruction", "output"}, {"prompt", "completion"})
        )
        if keys <= there
    ]
    if not found:
        raise BadRow(
            "unknown form",
            f"its fields ({foreign.line(', '.join(row)) or 'none'}) are not those of a "
            f"conversation; the forms are {'; '.join(FORMS)}",
            "rename its fields",
        )
    if len(found) > 1:
        named = " and ".join(FORMS[form] for form in found)
        raise BadRow("two forms", f"it has {named}", "leave out one of them")
    if found[0] < 2:
        key = ("messages", "conversations")[found[0]]
        return messages(row[key], key, reading)
    if found[0] == 2:
        return _instruction(row, reading)
    parts = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[key]
        if isinstance(value, str):
            parts.append(Turn(role, content_of(value, key, reading)))
        else:
            parts += messages(value, key, reading)
    return parts


def _instruction(row: Mapping[str, Any], reading: Reading) -> list[Turn]:
    turns = question(row, "instruction", reading)
    return [*turns, Turn("assistant", content_of(row["output"], "output", reading))]


def question(row: Mapping[str, Any], key: str, reading: Reading) -> list[Turn]:
    """The turns before an answer that fields of texts have: a system's turn if there is one, and
    the user's, of the text under `key` and of the input of an instruction."""
    turns = []
    if row.get("system") not in (None, ""):
        turns.append(Turn("system", content_of(row["system"], "system", reading)))
    asked = content_of(row[key], key, reading)
    if key == "instruction" and row.get("input") not in (None, ""):
        asked += reading.before_input + content_of(row["input"], "input", reading)
    return [*turns, Turn("user", asked)]


def messages(value: Any, key: str, reading: Reading) -> list[Turn]:
    """The turns in a list of messages. Raises BadRow if it is none."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        raise BadRow(
            "no turns", f"'{key}' is {described(value)}, not a list of turns", "fix the row"
        )
    return [_message(item, f"{key}.{i}", reading) for i, item in enumerate(value)]


def _message(item: Any, key: str, reading: Reading) -> Turn:
    if not isinstance(item, Mapping):
        raise BadRow("no turns", f"'{key}' is {described(item)}, not an object", "fix the row")
    for names in (("role", "content"), ("from", "value")):
        if names[0] in item and names[1] in item:
            break
    else:
        has = foreign.line(", ".join(map(str, item))) or "nothing"
        raise BadRow(
            "no turns", f"'{key}' has neither role and content nor from and value (it has: {has})",
            "fix the row",
        )  # fmt: skip
    for name in REFUSED:
        if item.get(name) not in (None, [], "", 1):
            raise BadRow(
                "not only text", f"'{key}' has {name}, which Manta does not train", "remove it"
            )
    role = item[names[0]]
    if not isinstance(role, str) or role not in ROLE_OF:
        raise BadRow(
            "unknown role",
            f"'{key}.{names[0]}' is {described(role)}; known are {', '.join(ROLE_OF)}",
            "rename it",
        )
    return Turn(ROLE_OF[role], content_of(item[names[1]], f"{key}.{names[1]}", reading))


def content_of(value: Any, key: str, reading: Reading) -> str:
    """The text of a turn. Raises BadRow if it has none."""
    if isinstance(value, Sequence) and not isinstance(value, str):  # OpenAI's parts
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            for part in value
        ]
        if not all(isinstance(text, str) for text in texts):
            raise BadRow("not only text", f"'{key}' has parts that are not text", "remove them")
        value = "".join(map(str, texts))
    if not isinstance(value, str):
        raise BadRow("not text", f"'{key}' is {described(value)}, not a text", "fix the row")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        if reading.errors == "strict":
            raise BadRow(
                "not Unicode",
                f"'{key}' is not valid Unicode at character {e.start}",
                "fix it or set data.errors=replace",
            ) from None
        value = value.encode(errors="surrogatepass").decode(errors="replace")
    if not value or value.isspace():
        raise BadRow("empty turn", f"'{key}' is empty", "fix the row")
    return value


def check_order(roles: list[str]) -> None:
    """Raises BadRow unless, after an optional system, user and assistant take turns."""
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if turns != expected or not turns:
        at = next((i for i, (a, b) in enumerate(zip(turns, expected, strict=True)) if a != b), 0)
        shown = ", ".join(roles[: len(roles) - len(turns) + at + 1])
        raise BadRow(
            "roles out of order",
            f"its turns are {shown}{', ...' if at + 1 < len(turns) else ''}, but after an optional "
            "system the user begins, and user and assistant take turns",
            "fix the row",
        )
