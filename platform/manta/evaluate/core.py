"""CORE (DCLM, Li et al. 2024, arXiv:2406.11794): the mean accuracy of 22 tasks, each centred so
that chance is 0 and all correct is 1. evals/core.yaml lists the tasks and how each is asked.

The examples before a question are drawn as in nanochat, whose figures for GPT-2 are the usual
references: the file's rows are shuffled with seed 1337, and row number i takes its examples from
the other rows with seed 1234 + i.
"""

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any, Literal

from manta import foreign, storage
from manta.config import Natural, NonNegativeFloat
from manta.errors import DataError
from manta.evaluate.files import read_rows

SOURCE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"


@dataclasses.dataclass
class _Choice:
    query: str
    choices: list[str]
    gold: Natural

    def __post_init__(self) -> None:
        _check_gold(self.gold, self.choices)


@dataclasses.dataclass
class _Schema:
    context_options: list[str]
    continuation: str
    gold: Natural

    def __post_init__(self) -> None:
        _check_gold(self.gold, self.context_options)


@dataclasses.dataclass
class _Modeling:
    context: str
    continuation: str


def _check_gold(gold: int, of: list[str]) -> None:
    if gold >= len(of):
        raise ValueError(f"gold={gold}: there are {len(of)} to choose from, and 0 is the first")


ROWS: dict[str, type] = {
    "multiple_choice": _Choice,
    "schema": _Schema,
    "language_modeling": _Modeling,
}


@dataclasses.dataclass
class About:
    """The metadata of a task."""

    kind: Literal["multiple_choice", "schema", "language_modeling"]
    file: str
    """Path of the file in the bundle's eval_data."""
    shots: Natural
    """Rows before each question, as examples."""
    delimiter: str
    chance: NonNegativeFloat
    """Accuracy by chance, in percent."""


def documents(folder: str | None, about: Mapping[str, Any], limit: int | None) -> list[Any]:
    """A task's prompts: `contexts` and `continuations`, one of which has one item, and `gold`.

    Args:
        folder: the bundle, or the folder that contains it.
        about: the task's metadata: kind, file, shots, delimiter.
        limit: the number of rows to use, the first of the shuffled file, for examples too.

    Raises:
        DataError: the file is missing, not as published, or has too few rows.
    """
    path, kind = file(folder, about["file"]), ROWS[about["kind"]]
    has = ", ".join(field.name for field in dataclasses.fields(kind))
    rows = read_rows(path, path, "CORE", has, lambda r: dataclasses.asdict(foreign.check(r, kind)))
    random.Random(1337).shuffle(rows)
    rows = rows[:limit]
    shots = about["shots"]
    if len(rows) <= shots:
        raise DataError(
            f"{about['file']}: {len(rows)} rows, but each needs {shots} others as examples: raise "
            "limit="
        )
    return [_document(about, rows, index) for index in range(len(rows))]


def centred(accuracies: Mapping[str, tuple[float, float]], chance: Mapping[str, float]) -> Any:
    """CORE and its standard error, from each task's (accuracy, standard error) and its accuracy by
    chance, in percent."""
    scores, errors = [], []
    for name, (accuracy, error) in accuracies.items():
        by_chance = chance[name] / 100
        scores.append((accuracy - by_chance) / (1 - by_chance))
        errors.append(error / (1 - by_chance))
    count = len(scores)
    error = math.sqrt(sum(e * e for e in errors)) / count
    return {"core": sum(scores) / count, "core_stderr": error, "samples": count}


def file(folder: str | None, name: str) -> str:
    """The path of a task's file. Raises DataError if the file does not exist."""
    if folder is not None:
        folder = storage.absolute(folder)
        for inside in ("eval_bundle/eval_data", "eval_data", ""):
            path = storage.join(folder, inside, name) if inside else storage.join(folder, name)
            if storage.exists(path):
                return path
    where = f"evals.data_dir={folder} has no eval_bundle/eval_data/{name}" if folder else ""
    raise DataError(
        f"suite=core: {where or 'it needs evals.data_dir=DIR'}; download {SOURCE} (the files of "
        "DCLM's 22 tasks) and unpack it in DIR"
    )


def _document(about: Mapping[str, Any], rows: list[Any], index: int) -> dict[str, Any]:
    row, delimiter, shots = rows[index], about["delimiter"], about["shots"]
    others = [i for i in range(len(rows)) if i != index]
    examples = [rows[i] for i in random.Random(1234 + index).sample(others, shots)]
    if about["kind"] == "multiple_choice":
        shown = [f"{e['query']}{delimiter}{e['choices'][e['gold']]}\n\n" for e in examples]
        before = "".join(shown)
        contexts, continuations = [f"{before}{row['query']}{delimiter}"], row["choices"]
    elif about["kind"] == "schema":
        shown = [
            f"{e['context_options'][e['gold']]}{delimiter}{e['continuation']}\n\n" for e in examples
        ]
        before = "".join(shown)
        contexts = [f"{before}{option}{delimiter}" for option in row["context_options"]]
        continuations = [row["continuation"]]
    else:
        shown = [f"{e['context'].strip()}{delimiter}{e['continuation']}\n\n" for e in examples]
        whole = f"{''.join(shown)}{row['context'].strip()}{delimiter}"
        # White space before a word belongs to the word's token, so the cut comes before it.
        context = whole.rstrip()
        contexts, continuations = [context], [whole[len(context) :] + row["continuation"]]
    return {"contexts": contexts, "continuations": continuations, "gold": row.get("gold", 0)}
