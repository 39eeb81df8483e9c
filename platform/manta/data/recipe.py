"""What a dataset is made from: the config of a preparation, and the recipe that it leaves."""

import re
from typing import Any, Literal

from manta import storage
from manta.config import Count, Natural, OpenFraction, Seed, VocabSize, config
from manta.errors import ConfigError
from manta.text import sources, tokenizer

BPE_VOCAB_SIZE = 4096
NAME = r"[\w-][\w.-]*"


@config
class PrepareConfig:
    source: str = sources.PYTHON
    """Where the documents are: `python` (the source code and documentation of the running Python),
    a file, folder or glob of .txt, .md, .py, .jsonl (.gz, .zst) or .parquet files (local or s3://,
    gs://, ...), or `hf:OWNER/NAME`, a Hugging Face dataset, streamed."""
    name: str | None = None
    """Name of the prepared dataset, a folder under HOME/data; null: from source and tokenizer."""
    subset: str | None = None
    """Subset (configuration) of a Hugging Face dataset, such as sample-10BT."""
    split: str = "train"
    """Split of a Hugging Face dataset to read."""
    text_key: str = "text"
    """JSONL key or Parquet column that holds a document's text."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: stop and name them, or put U+FFFD in their place."""
    document_bytes: Natural | None = None
    """A longer plain-text file is cut at blank lines into documents of about so many bytes; 0: a
    file is one document; null: 16384, but 0 for source=python."""
    tokenizer: str = "bpe"
    """`bpe`: trained on the corpus; `r50k_base`: GPT-2's; or the encoding.json of a dataset."""
    vocab_size: VocabSize | None = None
    """Tokens in a trained bpe, end-of-text included; null: 4096. Other tokenizers bring theirs."""
    tokenizer_file: str | None = None
    """The file r50k_base.tiktoken, where it cannot be downloaded."""
    val_fraction: OpenFraction = 0.05
    """Share of documents that go to the val split, decided by a hash of each document's text."""
    shuffle_seed: Seed = 0
    """Of the order that documents are shuffled into."""
    decontaminate: tuple[str, ...] = ()
    """Files of evaluation examples (.jsonl, .txt, .parquet): a document that shares
    `decontaminate_ngram` consecutive words with one of them is dropped."""
    decontaminate_ngram: Count = 13
    """Words in a row that count as a copy."""

    def problems(self) -> list[str]:
        found = []
        if self.tokenizer not in ("bpe", tokenizer.R50K) and not self.tokenizer.endswith(".json"):
            found.append(
                f"tokenizer={self.tokenizer}: valid are bpe, {tokenizer.R50K}, or the path of a "
                f"dataset's {tokenizer.FILE_NAME}"
            )
        if self.vocab_size is not None and self.tokenizer != "bpe":
            found.append(
                f"vocab_size is for tokenizer=bpe; {self.tokenizer} brings its own: omit it"
            )
        if self.tokenizer_file is not None and self.tokenizer != tokenizer.R50K:
            found.append(f"tokenizer_file is for tokenizer={tokenizer.R50K}: omit it")
        if self.subset is not None and not self.source.startswith(sources.HUGGING_FACE):
            found.append("subset is for a Hugging Face source (hf:OWNER/NAME): omit it")
        if self.name is not None and not re.fullmatch(NAME, self.name):
            found.append(f"name={self.name}: letters, digits, '.', '_' and '-' are valid")
        return found

    @property
    def corpus(self) -> sources.Source:
        cut = self.document_bytes
        if cut is None:
            cut = 0 if self.source == sources.PYTHON else 16384
        location = self.source
        if location != sources.PYTHON and not location.startswith(sources.HUGGING_FACE):
            location = storage.absolute(location)
        return sources.Source(location, self.subset, self.split, self.text_key, self.errors, cut)

    @property
    def dataset_name(self) -> str:
        if self.name is not None:
            return self.name
        last = self.source.removeprefix(sources.HUGGING_FACE).rstrip("/").rpartition("/")[2]
        words = [last.partition(".")[0] or "data", *([self.subset] if self.subset else [])]
        if self.tokenizer == "bpe":
            words.append(f"bpe{self.vocab_size or BPE_VOCAB_SIZE}")
        else:
            words.append(self.tokenizer.rpartition("/")[2].removesuffix(".json"))
        return re.sub(r"[^\w.-]+", "-", "-".join(words)).strip("-")

    def folder(self, home: str) -> str:
        return storage.join(home, "data", self.dataset_name)

    def recipe(self) -> dict[str, Any]:
        """What decides the tokens: a dataset made by another recipe is another dataset."""
        is_file = self.tokenizer.endswith(".json")
        return {
            "source": sources.identity(self.corpus),
            "shuffle_seed": self.shuffle_seed,
            "decontaminate": [storage.absolute(file) for file in self.decontaminate],
            "decontaminate_ngram": self.decontaminate_ngram if self.decontaminate else None,
            "tokenizer": storage.absolute(self.tokenizer) if is_file else self.tokenizer,
            "vocab_size": (self.vocab_size or BPE_VOCAB_SIZE) if self.tokenizer == "bpe" else None,
            "val_fraction": self.val_fraction,
        }


def first_difference(was: dict[str, Any], now: dict[str, Any]) -> tuple[str, str]:
    flat_was, flat_now = _flat(was), _flat(now)
    for key in sorted(flat_was.keys() | flat_now.keys()):
        if flat_was.get(key) != flat_now.get(key):
            return f"{key}={flat_was.get(key)}", f"{flat_now.get(key)}"
    raise ConfigError("the recipes are equal")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
