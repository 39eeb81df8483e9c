"""Small corpora to prepare in many parts, the content of a prepared dataset, and ways to stop a
preparation in the middle."""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from manta import storage
from manta.config import from_dict
from manta.data import passes, prepare, shuffle
from manta.data.manifest import Manifest
from manta.data.passes import Task
from manta.data.recipe import PrepareConfig
from manta.data.shuffle import SPLITS
from manta.text import sources

VAL_FRACTION = 0.2
WORDS = ["ray", "manta", "sea", "é", "🐟", "\n", "<|endoftext|>", "1234", "  "]


def set_sizes(
    patch: pytest.MonkeyPatch,
    part_bytes: int = 8000,
    run_bytes: int = 3000,
    batch_tokens: int = 300,
    shard_tokens: int = 3000,
) -> None:
    """Sets sizes at which a small corpus has several parts, runs, batches and shards."""
    patch.setattr(sources, "PART_BYTES", part_bytes)
    patch.setattr(shuffle, "RUN_BYTES", run_bytes)
    patch.setattr(shuffle, "BATCH_TOKENS", batch_tokens)
    patch.setattr(prepare, "LEAST_SHARD_TOKENS", shard_tokens)
    patch.setattr(prepare, "ROW_GROUP_TOKENS", 512)


def in_this_process(task: Task, indexes: list[int]) -> Iterator[dict[str, Any]]:
    """Runs a task as Ray Data does."""
    for index in indexes:
        yield {key: values[0] for key, values in task({"index": np.array([index])}).items()}


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """Prepares in this process: there are no nodes to look at, and no tasks to hand out."""
    patch.setattr(passes, "over_ray", in_this_process)
    patch.setattr(passes, "require_nodes", lambda *_: None)


def silent(line: str) -> None:
    pass


def write_rows(folder: Path, files: list[list[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(files):
        lines = "".join(json.dumps({"body": row}) + "\n" for row in rows)
        (folder / f"{number}.jsonl").write_text(lines)
    return folder


def config_of(source: Path, **keys: Any) -> PrepareConfig:
    defaults = {
        "source": str(source),
        "text_key": "body",
        "vocab_size": 280,
        "val_fraction": VAL_FRACTION,
        "name": "rows",
    }
    return from_dict(PrepareConfig, defaults | keys)


def content(folder: str | Path) -> dict[str, bytes]:
    """Every file of a dataset, by its path in the folder."""
    root = Path(folder)
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def tokens_of(manifest: Manifest, split: str) -> np.ndarray:
    """The tokens of a split, read with nothing but pyarrow, from a local folder."""
    files = [pq.read_table(f"{manifest.path}/{s.file}")["tokens"] for s in manifest.split(split)]
    return np.concatenate([file.to_numpy() for file in files])


def texts_of(manifest: Manifest, split: str) -> list[str]:
    made = manifest.load_tokenizer()
    ids = tokens_of(manifest, split)
    assert ids[-1] == made.eot
    return [
        made.decode(piece[:-1].tolist())
        for piece in np.split(ids, np.flatnonzero(ids == made.eot)[:-1] + 1)
    ]


def all_texts(manifest: Manifest) -> list[str]:
    return [text for split in SPLITS for text in texts_of(manifest, split)]


def some_files() -> list[list[str]]:
    """Rows for some files, with empty documents and with documents that occur more than once."""
    draw = random.Random(0)
    files = [
        [
            " ".join(draw.choices(WORDS, k=draw.randint(1, 40))) + f" {file} {row}"
            for row in range(50)
        ]
        for file in range(6)
    ]
    files[1][10] = files[1][20] = files[1][0]  # in one run
    files[5][:5] = files[0][:5]  # far apart
    files[2][7], files[3][0], files[4][49] = "", " \n\t", "  "  # U+2003 is a space too
    return files


class Killed(BaseException):
    """Acts like a SIGKILL: nothing catches it."""


@contextlib.contextmanager
def killed_at(write: int, named: bool) -> Iterator[None]:
    """Stops the code inside at a write, before or after the file has got its name."""
    take_name, count = storage._take_name, 0

    def counting(beside: str, inside: str) -> None:
        nonlocal count
        count += 1
        if count < write or named:
            take_name(beside, inside)
        if count == write:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(storage, "_take_name", counting)
        yield


def stopped_before_the_end(c: PrepareConfig, home: Path) -> Path:
    """The folder of a dataset that lacks only its manifest."""
    with pytest.MonkeyPatch.context() as patch:

        def save(self: Manifest) -> None:
            raise Killed

        patch.setattr(Manifest, "save", save)
        with pytest.raises(Killed):
            prepare.prepare(c, str(home), silent)
    return Path(c.folder(str(home)))
