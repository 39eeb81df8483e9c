"""Labelled texts in rows of data sets.

Between reading and tokenizing, a labelled text is one text: the JSON of its label and its text
(["spam", "You have won"]). Of a row to classify, the label may be missing: it is null then.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from manta import foreign
from manta.text import rows
from manta.text.rows import BadRow, Reading, described, too_large

KIND = "classify"
TO_CLASSIFY = "unlabelled"  # the same, of rows whose label may be missing


class Labelled(NamedTuple):
    label: str | None
    text: str


def text_of_row(row: Mapping[str, Any], reading: Reading) -> str:
    """A row's label and text as one text, of which `labelled` makes both again.

    Raises:
        BadRow: the row has no text, no label, or one of them twice.
    """
    keys = (reading.text_key, reading.label_key)
    if twice := [key for key in keys if key in getattr(row, "keys_twice", ())]:  # value_of_json
        raise BadRow("two texts", f"'{twice[0]}' is there twice", "leave out one of them")
    if reading.text_key not in row:
        raise rows.missing(row, reading)
    text = rows.text_of_value(row[reading.text_key], reading)
    joined = json.dumps([_label(row, reading), text], ensure_ascii=False)
    if len(joined) > reading.most_bytes or len(joined.encode()) > reading.most_bytes:
        raise too_large(f"a labelled text of {len(joined):,} characters", reading)
    return joined


def labelled(text: str) -> Labelled:
    return Labelled(*json.loads(text))


def _label(row: Mapping[str, Any], reading: Reading) -> str | None:
    key, value = reading.label_key, row.get(reading.label_key)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    label = str(value) if is_number else value
    if isinstance(label, str) and label and not label.isspace():
        return rows.text_of_value(label, reading._replace(text_key=key))
    if value in (None, "") and reading.kind == TO_CLASSIFY:
        return None
    if key not in row:
        has = foreign.line(", ".join(map(str, row))) or "nothing"
        raise BadRow("without a label", f"no '{key}' (it has: {has})", "set data.label_key")
    raise BadRow(
        "without a label",
        f"'{key}' is {described(value)}, not a label (a text or a whole number)",
        "fix the row or set data.label_key",
    )
