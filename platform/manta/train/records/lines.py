"""Files of a run's records, one JSON object a line: only whole records are read."""

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

from pyarrow import fs as pafs

from manta import foreign, storage
from manta.foreign import Whole

LONGEST_LINE = 1 << 20  # bytes; a record of a step has a few hundred


@dataclasses.dataclass
class Metrics:
    """What Manta computes with of a record in metrics.jsonl. A figure that is not finite is there
    as a text, "nan" or "inf"."""

    step: Whole
    tokens: Whole | None = None
    loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    val_accuracy: float | None = None
    val_macro_f1: float | None = None
    step_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.tokens is None and (self.loss, self.val_loss) != (None, None):
            raise ValueError("tokens is missing")


@dataclasses.dataclass
class Sample:
    """What Manta computes with of a record in samples.jsonl."""

    step: Whole


def read(path: str, kind: type) -> tuple[list[dict[str, Any]], str | None]:
    """The records in a file that are a `kind`, and what is wrong with the file, in one line; None:
    nothing. A last line that was cut short, as a process left it that was killed, is not wrong."""
    found = storage.info(path).type
    if found == pafs.FileType.NotFound:
        return [], None
    if found != pafs.FileType.File:
        return [], f"{path}: not a file"
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, line in enumerate(_lines(path), 1):
        try:
            record = foreign.parse(line, dict)
            foreign.check(record, kind)
            records.append(record)
        except ValueError as e:
            if line.endswith(b"\n") or len(line) > LONGEST_LINE:
                problems.append(f"{path}, line {number}: {e}")
    more = f" (and {len(problems) - 1:,} more lines)" if len(problems) > 1 else ""
    return records, f"{problems[0]}{more}" if problems else None


def _lines(path: str) -> Iterator[bytes]:
    """The lines of a file. One that is too long is the last: what follows cannot be told apart."""
    fs, inside = storage.filesystem(path)
    with (
        fs.open_input_stream(inside, compression=None) as stream,
        io.BufferedReader(stream) as reader,
    ):
        while line := reader.readline(LONGEST_LINE + 1):
            yield line
            if len(line) > LONGEST_LINE:
                return
