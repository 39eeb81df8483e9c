"""A dataset's table of contents: what its shards hold, and how to know that they are whole.

data/<name>/train-00000.parquet ...   one row a document: its tokens, end-of-text included
data/<name>/val-00000.parquet ...
data/<name>/encoding.json             the tokenizer
data/<name>/MANIFEST.json             written last: without it there is no dataset
"""

import dataclasses
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from manta import storage
from manta.errors import DataError
from manta.text import tokenizer as tokenizers

FILE_NAME = "MANIFEST.json"
FORMAT = "manta-data-1"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One Parquet file. `tokens`, `rows` (documents) and `text_bytes` are totals over the file;
    `row_groups` has the number of tokens in each row group."""

    file: str
    split: Literal["train", "val"]
    rows: int
    tokens: int
    text_bytes: int
    row_groups: list[int]
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of the dataset in folder `path`, as prepared from `recipe`."""

    path: str
    recipe: dict[str, Any]
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eot: int
    shards: tuple[Shard, ...]

    def split(self, name: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == name]

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.split(split))

    def text_bytes(self, split: str) -> int:
        return sum(shard.text_bytes for shard in self.split(split))

    def rows(self, split: str) -> int:
        return sum(shard.rows for shard in self.split(split))

    def save(self) -> None:
        """Commits the dataset: after this, and not before, it exists."""
        content = dataclasses.asdict(self)
        del content["path"]
        storage.write_json(storage.join(self.path, FILE_NAME), {"format": FORMAT, **content})

    def load_tokenizer(self) -> tokenizers.Tokenizer:
        """Raises DataError when the tokenizer's file is not the one that made the tokens."""
        path = storage.join(self.path, tokenizers.FILE_NAME)
        made = tokenizers.load(path)
        if made.sha256 != self.tokenizer_sha256:
            raise DataError(
                f"{path}: not the tokenizer that this dataset was made with (sha256 differs); "
                "restore it, or delete the folder to prepare it anew"
            )
        return made


def exists(path: str) -> bool:
    return storage.exists(storage.join(path, FILE_NAME))


def load(path: str) -> Manifest:
    """Raises DataError when there is no dataset, or its manifest cannot be read."""
    file = storage.join(path, FILE_NAME)
    content = storage.read_json(file)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise DataError(f"{file}: not a manifest of this version of Manta; prepare the data anew")
    try:
        shards = tuple(Shard(**shard) for shard in content.pop("shards"))
        return Manifest(path=path, shards=shards, **content)
    except (TypeError, KeyError) as e:
        raise DataError(f"{file}: a damaged manifest ({e}); prepare the data anew") from None


def verify(manifest: Manifest, hashes: bool, shards: Iterable[Shard] | None = None) -> None:
    """Checks that every shard is there and whole, by size and, with `hashes`, by sha256.

    Raises:
        DataError: naming each shard that is not, and what to do.
    """

    def problem(shard: Shard) -> str | None:
        path = storage.join(manifest.path, shard.file)
        try:
            storage.check_file(path, shard.size, shard.sha256 if hashes else None, DataError)
        except DataError as e:
            return str(e)
        return None

    with ThreadPoolExecutor(8) as pool:
        found = [p for p in pool.map(problem, shards or manifest.shards) if p is not None]
    if found:
        raise DataError(
            "; ".join(found) + f". Not trained on. Restore it, or delete {manifest.path} to "
            "prepare the data anew"
        )
