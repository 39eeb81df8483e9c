"""Rows that are more than a text, of any kind, as one text each."""

from collections.abc import Mapping
from typing import Any

from manta.text import conversations, preferences
from manta.text.rows import Reading

TEXT_OF = {"chat": conversations.text_of_row, "preference": preferences.text_of_row}


def text_of_row(row: Mapping[str, Any], reading: Reading) -> str:
    """The text of a row of the kind that is read. Raises BadRow if the row is no such thing."""
    return TEXT_OF[reading.kind](row, reading)
