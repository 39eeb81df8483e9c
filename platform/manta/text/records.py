"""Rows that are more than a text, of any kind, as one text each."""

from collections.abc import Mapping
from typing import Any

from manta.text import conversations, labels, preferences
from manta.text.rows import Reading

TEXT_OF = {
    "chat": conversations.text_of_row,
    "preference": preferences.text_of_row,
    labels.KIND: labels.text_of_row,
    labels.TO_CLASSIFY: labels.text_of_row,
}


def text_of_row(row: Mapping[str, Any], reading: Reading) -> str:
    """The text of a row of the kind that is read. Raises BadRow if the row is no such thing."""
    return TEXT_OF[reading.kind](row, reading)


def plain(kind: str, text: str) -> str:
    """What a person wrote of a row of this kind, which is one text as `text_of_row` makes it."""
    if kind in (labels.KIND, labels.TO_CLASSIFY):
        return labels.labelled(text).text
    return text if kind == "text" else conversations.plain(text)
