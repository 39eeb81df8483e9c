"""A dataset's table of contents: what its shards contain, and checksums to verify them."""

import contextlib
import dataclasses
import json
from collections import Counter
from typing import Any, Literal

from manta import foreign, layout, storage
from manta.config import Count, Natural, name_of_dataset
from manta.errors import DataError
from manta.terminal import line, named
from manta.text import tokenizer as tokenizers

FORMAT = "manta-data-2"


@foreign.exact
@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One Parquet file of `tokens` rows.

    `text_bytes` is the size of its documents' text, and `max_token` the largest token id in it;
    `size` (in bytes) and `sha256` are those of the file.
    """

    file: str
    split: Literal["train", "val", "test"]
    documents: Natural
    tokens: Natural
    text_bytes: Natural
    max_token: Natural
    size: Natural
    sha256: str
    footer_sha256: str


@foreign.exact
@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A document of the corpus: its number in a file (or a piece of one), and how it begins."""

    file: str
    row: Count
    excerpt: str


@foreign.exact
@dataclasses.dataclass(frozen=True, slots=True)
class NearPair:
    """A document that was dropped because it is similar to another one, and that one."""

    similarity: float
    dropped: Place
    like: Place


@foreign.exact
@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of the dataset in folder `path`, which was prepared from `recipe`."""

    path: str
    recipe: dict[str, Any]
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: Count
    eot: Natural
    dtype: Literal["uint16", "uint32"]
    row_group_tokens: Count
    dropped: dict[str, Natural]
    """Numbers of documents left out, by reason: empty, duplicate, contaminated, and near_duplicate
    if these were looked for; of conversations also unlabelled: without a trained token, or
    pairs longer than a row; of labelled texts also conflicting and balanced."""
    lengths: dict[str, list[Natural]]
    """Numbers of documents of 2^i to 2^(i+1) - 1 tokens for each i, and the tokens in them."""
    shards: tuple[Shard, ...]
    skipped: dict[str, dict[str, Natural]] = dataclasses.field(default_factory=dict)
    """Numbers of rows without a usable text that were left out, by file and by reason."""
    near_pairs: tuple[NearPair, ...] = ()
    """Some of the near duplicates, as examples."""
    cut: dict[str, Natural] = dataclasses.field(default_factory=dict)
    """Numbers of conversations that were cut at a turn to fit in a row, or labelled texts at their
    end, by file."""
    labels: tuple[str, ...] = ()
    """Labels of a dataset of labelled texts; the id of the first is `vocab_size`."""
    label_counts: dict[str, list[Natural]] = dataclasses.field(default_factory=dict)
    """Numbers of texts of each label, by split."""

    def split(self, name: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == name]

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.split(split))

    def text_bytes(self, split: str) -> int:
        return sum(shard.text_bytes for shard in self.split(split))

    def documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.split(split))

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def save(self) -> None:
        """Commits the dataset: it exists once this has been written, and not before."""
        storage.write_json(storage.join(self.path, layout.MANIFEST), self._content())

    def _content(self) -> dict[str, Any]:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        del content["path"]
        if not self.skipped:  # so that such a dataset has the digest that it always had
            del content["skipped"]
        if not self.near_pairs:  # a key that datasets of earlier versions do not have
            del content["near_pairs"]
        if not self.cut:
            del content["cut"]
        if not self.labels:
            del content["labels"], content["label_counts"]
        return {**content, "sha256": _digest(content)}

    @property
    def sha256(self) -> str:
        """A digest of all the contents: two datasets with the same digest are the same."""
        return self._content()["sha256"]

    def load_tokenizer(self) -> tokenizers.Tokenizer:
        """Loads the tokenizer that is saved with the dataset.

        Raises:
            DataError: its file is not the one that made the tokens.
        """
        path = storage.join(self.path, layout.ENCODING)
        made = tokenizers.load(path)
        if made.sha256 != self.tokenizer_sha256:
            raise DataError(
                f"{path}: not the tokenizer that this dataset was made with (sha256 differs); "
                "restore it, or delete the folder to prepare it again"
            )
        return made


def exists(path: str) -> bool:
    return storage.exists(storage.join(path, layout.MANIFEST))


def names(folder: str) -> list[str]:
    """The names of the datasets in a folder."""
    found = [item.base_name for item in storage.list_files(folder, recursive=False)]
    return [name for name in found if exists(storage.join(folder, name))]


def resolve(name: str, home: str) -> str:
    """The folder of a dataset, which a person gives by its name or as a folder.

    Raises:
        DataError: there is no such dataset.
    """
    places = [storage.absolute(name)]
    with contextlib.suppress(ValueError):  # not the name of a dataset
        places.insert(0, layout.dataset_folder(home, name_of_dataset(name)))
    for path in places:
        if exists(path):
            return path
    folder = layout.datasets_folder(home)
    raise DataError(
        f"dataset={line(name)}: no dataset there; give a folder, or a name (there are: "
        f"{named(names(folder)) or f'none under {folder}'})"
    )


def load(path: str) -> Manifest:
    """Loads the manifest of the dataset in folder `path`.

    Raises:
        DataError: there is no dataset, or its manifest is another version's, damaged or edited.
    """
    file = storage.join(path, layout.MANIFEST)
    remedy = f"restore it, or delete {path} to prepare the data again"
    content: Any = foreign.read_json(file, Any, DataError)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = line(repr(content.get("format") if isinstance(content, dict) else None))
        raise DataError(
            f"{file}: its format is {found}, but this version of Manta reads {FORMAT!r}; "
            f"delete {path} to prepare the data again"
        )
    if content.pop("sha256", None) != _digest(content):
        raise DataError(f"{file}: edited or damaged (its sha256 differs); {remedy}")
    try:
        del content["format"]
        made = foreign.check({**content, "path": path}, Manifest)
    except ValueError as e:
        raise DataError(f"{file}: damaged ({e}); {remedy}") from None
    for shard in made.shards:
        if "/" in shard.file or not foreign.is_plain_name(shard.file):
            raise DataError(
                f"{file}: damaged ({foreign.line(shard.file)!r} is no file in its folder); {remedy}"
            )
    return made


def check(manifest: Manifest) -> None:
    """Checks that a manifest does not contradict itself.

    Raises:
        DataError: it lists a shard twice, or a token id that its tokenizer does not know.
    """
    file = storage.join(manifest.path, layout.MANIFEST)
    twice = [n for n, count in Counter(s.file for s in manifest.shards).items() if count > 1]
    if twice:
        raise DataError(f"{file}: lists {named(twice, most=3)} twice; prepare the data again")
    for shard in manifest.shards:
        if shard.max_token >= manifest.vocab_size + len(manifest.labels):
            raise DataError(
                f"{storage.join(manifest.path, shard.file)}: holds token id {shard.max_token}, but "
                f"the tokenizer {manifest.tokenizer} has {manifest.vocab_size}; prepare the data "
                "again"
            )


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # An edited file can contain half of a surrogate pair, which needs a digest too.
    return storage.sha256_of(canonical.encode(errors="surrogatepass"))
