"""CORE (DCLM, Li et al. 2024, arXiv:2406.11794): 22 tasks, each accuracy centred between chance and
1, and their mean. Which tasks, and how each is asked, is in evals/core.yaml.

The examples before a question are drawn as nanochat draws them, whose figures for GPT-2 are the
usual references: the file's rows are shuffled with seed 1337, and row number i takes its examples
from the other rows with seed 1234 + i.
"""

import math
import random
from collections.abc import Mapping
from typing import Any

from manta import storage
from manta.errors import DataError
from manta.evaluate.files import read_rows

SOURCE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
KEYS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


def documents(folder: str | None, about: Mapping[str, Any], limit: int | None) -> list[Any]:
    """A task's prompts: each has `contexts`, `continuations`, of which one is single, and `gold`.

    Args:
        folder: that the bundle is in, or it.
        about: the task's metadata: kind, file, shots, delimiter.
        limit: the first so many rows of the shuffled file are all that there is.

    Raises:
        DataError: the file is missing, or not as it is published.
    """
    path, keys = file(folder, about["file"]), KEYS[about["kind"]]
    rows = read_rows(path, path, "CORE", ", ".join(keys), lambda row: {k: row[k] for k in keys})
    random.Random(1337).shuffle(rows)
    rows = rows[:limit]
    shots = about["shots"]
    if len(rows) <= shots:
        raise DataError(
            f"{about['file']}: {len(rows)} rows, and each is asked after {shots} others: raise "
            "limit="
        )
    return [_document(about, rows, index) for index in range(len(rows))]


def centred(accuracies: Mapping[str, tuple[float, float]], chance: Mapping[str, float]) -> Any:
    """CORE and its standard error, from (accuracy, standard error) of each task and the percentage
    that chance gives there."""
    scores, errors = [], []
    for name, (accuracy, error) in accuracies.items():
        by_chance = chance[name] / 100
        scores.append((accuracy - by_chance) / (1 - by_chance))
        errors.append(error / (1 - by_chance))
    count = len(scores)
    error = math.sqrt(sum(e * e for e in errors)) / count
    return {"core": sum(scores) / count, "core_stderr": error, "samples": count}


def file(folder: str | None, name: str) -> str:
    """A task's file. Raises DataError when it is not there."""
    if folder is not None:
        folder = storage.absolute(folder)
        for inside in ("eval_bundle/eval_data", "eval_data", ""):
            path = storage.join(folder, inside, name) if inside else storage.join(folder, name)
            if storage.exists(path):
                return path
    where = f"evals.data_dir={folder} has no eval_bundle/eval_data/{name}" if folder else ""
    raise DataError(
        f"suite=core: {where or 'it needs evals.data_dir=DIR'}; download {SOURCE} (the files of "
        "DCLM's, 22 tasks) and unpack it in DIR"
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
        # White space before a word is the word's: tokens are cut before it.
        context = whole.rstrip()
        contexts, continuations = [context], [whole[len(context) :] + row["continuation"]]
    return {"contexts": contexts, "continuations": continuations, "gold": row.get("gold", 0)}
