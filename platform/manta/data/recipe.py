"""The configs of a dataset and of the data that a run reads, and the recipe kept with a dataset."""

import dataclasses
import re
from typing import Any, ClassVar, Literal

from manta import layout, storage
from manta.config import (
    Count,
    DatasetName,
    DocumentBytes,
    Natural,
    NonNegativeFloat,
    OpenFraction,
    Seed,
    VocabSize,
    config,
    name_of_dataset,
)
from manta.data.label_keys import VAL_FRACTION, LabelKeys
from manta.data.order import PERIOD, Phase, thousandths
from manta.errors import ConfigError, DataError
from manta.text import conversations, sources, templates, tokenizer

BPE_VOCAB_SIZE = 4096
LEAST_SIMILARITY = 0.3
# Settings that a recipe has only if they are not these: recipes of earlier versions lack them.
UNSAID = {"deduplicate": "exact", "deduplicate_similarity": None, "kind": "text"}


Kind = Literal["text", "chat", "preference", "classify"]
TrainOn = Literal["assistant", "all"]
CHATS: tuple[Kind, ...] = ("chat", "preference")  # the kinds whose documents are conversations
ONLY_FOR: dict[str, tuple[Kind, ...]] = {
    "template": ("chat",), "train_on": ("chat",),
    "row_tokens": (*CHATS, "classify"), "on_unlabelled": CHATS,
    "text_key": ("text", "classify"), "document_bytes": ("text",),
    **dict.fromkeys((field.name for field in dataclasses.fields(LabelKeys)), ("classify",)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a dataset of conversations is made; the fields are keys of `PrepareConfig`, but for
    `train_on`, which is `last` for pairs: the last answer of each of the two conversations."""

    kind: Kind
    row_tokens: int
    train_on: Literal["assistant", "all", "last"]
    on_unlabelled: str


@config
class PrepareConfig(LabelKeys):
    only_for: ClassVar = (
        ("vocab_size", "tokenizer", ("bpe",)),
        ("tokenizer_file", "tokenizer", (tokenizer.R50K,)),
        ("val_fraction", "val_source", (None,)),
        *((key, "kind", kinds) for key, kinds in ONLY_FOR.items()),
    )

    source: str = sources.PYTHON
    """Location of the documents: `python` (source code and documentation of the running Python), a
    file, folder or glob of .txt, .md, .py, .jsonl (.gz, .zst) or .parquet files (local or s3://,
    gs://, ...), or `hf:OWNER/NAME`, a Hugging Face dataset, which is streamed."""
    kind: Kind = "text"
    """What the documents are. text: plain texts; chat: conversations, for fine-tuning, in the rows
    of .json, .jsonl (.gz, .zst) or .parquet files or of a Hugging Face dataset, with one of these
    sets of fields: messages (a list of role and content), conversations (a list of from and value),
    instruction, input and output, or prompt and completion; preference: pairs of a chosen and a
    rejected answer, in rows with prompt (or instruction and input), chosen and rejected, or with
    chosen and rejected that are whole conversations, alike up to the last answer. Their tokenizer
    is that of a chat model, with its template; classify: texts with a label each, in two columns of
    a .csv, .tsv or .parquet file, or two keys of .json or .jsonl (`label_key`, `text_key`)."""
    template: str = "chatml"
    """How a conversation is written: `chatml` (<|im_start|>ROLE ... <|im_end|>), `alpaca` (an
    instruction and a response, as plain text), or a file with a chat template in Jinja, as
    transformers has them, with {% generation %} around answers and their end token."""
    train_on: TrainOn = "assistant"
    """The tokens of a conversation that are trained: those of the assistant's turns with their end
    token, or all."""
    row_tokens: Count = 1024
    """Tokens in a row of whole conversations: the sequence length of the training. A longer
    conversation is cut after the last of the assistant's turns that fits; both conversations of a
    pair are in one row, and are not cut; a labelled text is cut at its end."""
    on_unlabelled: Literal["fail", "skip"] = "fail"
    """What to do about a conversation without a trained token (the assistant says nothing in it, or
    its first answer does not fit in a row), and about a pair that does not fit in a row: stop and
    name it, or leave it out and count it."""
    name: DatasetName | None = None
    """Name of the dataset, a folder under HOME/data; null: made from source and tokenizer."""
    license: str | None = None
    """Licence of the text, as reports and model cards shall name it; null: it is not named."""
    subset: str | None = None
    """Subset (configuration) of a Hugging Face dataset, such as sample-10BT."""
    split: str = "train"
    """Split of a Hugging Face dataset to read."""
    text_key: str = "text"
    """JSONL key or Parquet column with the text of a document."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do about bytes that are not UTF-8: they make a row bad (`on_bad_rows`), or U+FFFD is
    put in their place."""
    on_bad_rows: Literal["fail", "skip"] = "fail"
    """What to do about a row without a usable text (null, a number, no such key, a line that is not
    JSON, bytes that are not UTF-8, too large): stop and name it, or leave it out and count it. A
    row is a line of JSONL, a row of Parquet, or a document of plain text."""
    max_document_bytes: DocumentBytes = sources.MOST_BYTES
    """Bytes in the largest document, and in the longest line of JSONL; a larger one is a bad row.
    Preparation takes 6 to 13 times as much memory for it, in each task."""
    document_bytes: Natural | None = None
    """Cut longer plain-text files at blank lines into documents of about this many bytes; 0: each
    file is one document; null: 16384, but 0 for source=python."""
    tokenizer: str = "bpe"
    """`bpe`: trained on the corpus; `r50k_base`: GPT-2's; or the encoding.json of a dataset."""
    vocab_size: VocabSize | None = None
    """Tokens in a trained bpe, with end-of-text; null: 4096. Other tokenizers have a fixed size."""
    tokenizer_file: str | None = None
    """Path of the file r50k_base.tiktoken, if it cannot be downloaded."""
    val_fraction: OpenFraction = 0.05
    """Share of documents that go to the val split, decided by a hash of each document's text. Of
    labelled texts it is 0.1 by default, and exact, of each label alike."""
    val_source: str | None = None
    """Location of a separate val split, in the same form as `source`; all of `source` is then the
    train split. A document that is in both stays in both, but with deduplicate=near only in the
    val split."""
    shuffle_seed: Seed = 0
    """Seed of the shuffled order of the documents."""
    deduplicate: Literal["none", "exact", "near"] = "exact"
    """The copies of documents to drop. none: no copies; exact: copies of the same text; near:
    also documents that share most of their runs of five words with another one, estimated by
    MinHash. The first in the shuffled order is kept, of the val split if there is one. Documents of
    fewer than five words have only exact copies."""
    deduplicate_similarity: OpenFraction = 0.8
    """The least Jaccard similarity of near duplicates, 0.3 or more: the share of runs of five words
    that both documents have, among all that they have. One word in twenty replaced leaves 0.63."""
    decontaminate: tuple[str, ...] = ()
    """Files of evaluation examples (.jsonl, .txt, .parquet): a document that shares
    `decontaminate_ngram` consecutive words with one of them is dropped."""
    decontaminate_ngram: Count = 13
    """Words in a row that count as a copy."""

    @classmethod
    def beneath(cls, tree: dict[str, Any]) -> dict[str, Any]:
        return {"val_fraction": VAL_FRACTION} if tree.get("kind") == "classify" else {}

    def problems(self) -> list[str]:
        found = []
        if self.tokenizer not in ("bpe", tokenizer.R50K) and not self.tokenizer.endswith(".json"):
            found.append(
                f"tokenizer={self.tokenizer}: valid are bpe, {tokenizer.R50K}, or the path of a "
                f"dataset's {layout.ENCODING}"
            )
        if self.vocab_size is not None and self.tokenizer != "bpe":
            found.append(
                f"vocab_size is for tokenizer=bpe; {self.tokenizer} brings its own: omit it"
            )
        if self.tokenizer_file is not None and self.tokenizer != tokenizer.R50K:
            found.append(f"tokenizer_file is for tokenizer={tokenizer.R50K}: omit it")
        if self.subset is not None and not self.source.startswith(sources.HUGGING_FACE):
            found.append("subset is for a Hugging Face source (hf:OWNER/NAME): omit it")
        if self.kind == "classify":
            found += self.label_problems(
                self.val_source, self.val_fraction, self.deduplicate, self.text_key
            )
        elif self.val_source is not None and self.val_fraction != type(self).val_fraction:
            found.append("val_fraction is for a split of `source`; with val_source omit it")
        if self.kind != "text" and self.source == sources.PYTHON:
            what = "conversations" if self.kind in CHATS else "labels"
            found.append(f"source=python has no {what}: give files or a Hugging Face dataset")
        for key, kinds in ONLY_FOR.items():
            if self.kind not in kinds and getattr(self, key) != getattr(type(self), key):
                found.append(f"{key} is for kind={' or '.join(kinds)}: omit it")
        if self.deduplicate_similarity < LEAST_SIMILARITY:
            found.append(
                f"deduplicate_similarity={self.deduplicate_similarity}: valid are "
                f"{LEAST_SIMILARITY} to below 1"
            )
        if self.deduplicate != "near" and (
            self.deduplicate_similarity != type(self).deduplicate_similarity
        ):
            found.append("deduplicate_similarity is for deduplicate=near: omit it")
        try:
            name_of_dataset(self.dataset_name)
        except ValueError as e:
            found.append(f"name={self.dataset_name} (made from source and tokenizer): {e}")
        return found

    @property
    def corpus(self) -> sources.Source:
        return self._source(self.source)

    @property
    def val_corpus(self) -> sources.Source | None:
        return None if self.val_source is None else self._source(self.val_source)

    def _source(self, location: str) -> sources.Source:
        cut = self.document_bytes
        if cut is None:
            cut = 0 if location == sources.PYTHON or self.kind != "text" else 16384
        if location != sources.PYTHON and not location.startswith(sources.HUGGING_FACE):
            location = storage.absolute(location)
        return sources.Source(
            location, self.subset, self.split, self.text_key, self.errors, cut,
            self.max_document_bytes, self.on_bad_rows, self.kind, self._before_input,
            self.label_key, self.quotes,
        )  # fmt: skip

    @property
    def _before_input(self) -> str:
        """What is put between the instruction and the input of a row."""
        if self.kind not in CHATS:
            return ""
        is_alpaca = self.template == "alpaca"
        if self.kind == "preference":
            is_alpaca = self.template_source() == templates.ALPACA
        return conversations.ALPACA_INPUT if is_alpaca else conversations.INPUT

    def template_source(self) -> str:
        """The chat template: that of a named template or file or, for pairs, the tokenizer's.

        Raises:
            DataError: the file is missing or no template, or the tokenizer has none.
        """
        if self.kind == "chat":
            return templates.read(self.template)
        remedy = (
            "preferences are learnt by a model that chats, with its tokenizer and its template: "
            "fine-tune a model on conversations first (jobs/finetune.py kind=chat), and give "
            f"data.tokenizer=CHECKPOINT/{layout.ENCODING}"
        )
        if not self.tokenizer.endswith(".json"):
            raise DataError(f"data.tokenizer={self.tokenizer} has no chat template; {remedy}")
        source = tokenizer.load(storage.absolute(self.tokenizer)).extras.chat_template
        if not isinstance(source, str):
            raise DataError(f"data.tokenizer={self.tokenizer} has no chat template; {remedy}")
        return source

    @property
    def chat(self) -> Chat | None:
        """How conversations are made; None for texts."""
        if self.kind not in CHATS:
            return None
        trained = "last" if self.kind == "preference" else self.train_on
        return Chat(self.kind, self.row_tokens, trained, self.on_unlabelled)

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
        words += [self.kind] if self.kind != "text" else []
        return re.sub(r"[^\w.-]+", "-", "-".join(words)).strip("-")

    def folder(self, home: str) -> str:
        return layout.dataset_folder(home, self.dataset_name)

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the tokens: with another recipe, it is another dataset."""
        is_file = self.tokenizer.endswith(".json")
        split: dict[str, Any] = {"val_fraction": self.val_fraction}
        if self.val_corpus is not None:
            split = {"val_source": sources.identity(self.val_corpus)}
        similarity = self.deduplicate_similarity if self.deduplicate == "near" else None
        copies = {"deduplicate": self.deduplicate, "deduplicate_similarity": similarity}
        return {
            "source": sources.identity(self.corpus),
            "shuffle_seed": self.shuffle_seed,
            "decontaminate": [storage.absolute(file) for file in self.decontaminate],
            "decontaminate_ngram": self.decontaminate_ngram if self.decontaminate else None,
            "tokenizer": storage.absolute(self.tokenizer) if is_file else self.tokenizer,
            "vocab_size": (self.vocab_size or BPE_VOCAB_SIZE) if self.tokenizer == "bpe" else None,
            **split,
            **{key: value for key, value in copies.items() if value != UNSAID[key]},
            **self._kind_recipe(),
        }

    def _kind_recipe(self) -> dict[str, Any]:
        """Raises DataError if the template's file is missing or no template."""
        if self.kind == "classify":
            return {"kind": self.kind, "row_tokens": self.row_tokens, **self.label_recipe()}
        if self.chat is None:
            return {}
        found = dataclasses.asdict(self.chat)
        if self.kind == "chat":
            is_named = self.template in templates.NAMED
            found["template"] = self.template if is_named else storage.absolute(self.template)
        digest = storage.sha256_of(self.template_source().encode())
        return {**found, "template_sha256": digest}

    def strict_recipe(self) -> dict[str, Any]:
        """The recipe that ends at bad rows and at conversations without a trained token. What was
        made from it had none, so it is the same as what skips them."""
        return dataclasses.replace(self, on_bad_rows="fail", on_unlabelled="fail").recipe()


def first_difference(was: dict[str, Any], now: dict[str, Any]) -> tuple[str, str]:
    flat_was, flat_now = UNSAID | _flat(was), UNSAID | _flat(now)
    for key in sorted(flat_was.keys() | flat_now.keys()):
        if flat_was.get(key) != flat_now.get(key):
            return f"{key}={flat_was.get(key)}", f"{flat_now.get(key)}"
    raise ConfigError("the recipes are equal")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


Mix = dict[str, NonNegativeFloat]


@config
class DataConfig(PrepareConfig):
    mix: Mix = dataclasses.field(default_factory=dict)
    """Train on several prepared datasets: {name: weight}; a name is a folder under HOME/data. Each
    dataset gives its share of any 1,000 sequences, to the nearest thousandth; 0 leaves one out."""
    mix_switches: dict[Count, Mix] = dataclasses.field(default_factory=dict)
    """Mixes to switch to later: {tokens trained: mix}, such as better data for the last tenth."""
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents fill sequences. concat: one after the other; best_fit: arranged so that few
    are cut. Neither of them pads or drops tokens."""
    verify: bool = False
    """Check the sha256 of every shard before training. Sizes, footers, row counts and dtypes are
    always checked before training, and the sha256 of each row group when it is read."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """What to do about a row group that cannot be read or does not match the manifest: stop, or
    continue without its tokens."""
    on_changed: Literal["refuse", "use", "prepare"] = "refuse"
    """What to do about a dataset whose source, val_source, decontamination files or tokenizer file
    have changed since it was prepared: stop and name what changed, use the dataset as it is, or
    set it aside under another name and prepare it again."""
    log_fingerprint: bool = False
    """Write a fingerprint of each global batch's tokens to metrics.jsonl. It is the same on any
    number of workers, and after any resume."""

    def problems(self) -> list[str]:
        found = super().problems()
        mixes = {"mix": self.mix, **{f"mix_switches.{n}": m for n, m in self.mix_switches.items()}}
        for key, mix in mixes.items():
            if (mix or key != "mix") and not any(mix.values()):
                found.append(f"{key}={mix}: at least one weight has to be more than 0")
                continue
            for name, weight in mix.items():
                try:
                    name_of_dataset(name)
                except ValueError as e:
                    found.append(f"{key}.{name}: the name of a dataset is needed: {e}")
                    continue
                if weight and not thousandths(list(mix.values()))[list(mix).index(name)]:
                    found.append(
                        f"{key}.{name}={weight} is less than a thousandth of the mix: raise it, or "
                        "set it to 0"
                    )
        if self.mix_switches and not self.mix:
            found.append("mix_switches is for a mix: set mix too")
        if self.kind != "text" and self.packing != "concat":
            found.append(
                f"packing={self.packing} is for kind=text; conversations and labelled texts are "
                "packed whole when they are prepared: omit it"
            )
        if self.mix and self.on_changed == "prepare":
            found.append(
                "on_changed=prepare is for one dataset; those of a mix are prepared again by "
                "jobs/prepare.py, each with its own keys: set on_changed to refuse or use"
            )
        if self.mix:
            default = PrepareConfig()
            for field in dataclasses.fields(PrepareConfig):
                if getattr(self, field.name) != getattr(default, field.name):
                    found.append(
                        f"{field.name} is for preparing one dataset; those of a mix are prepared "
                        "beforehand, each by jobs/prepare.py with its own data.name: omit it"
                    )
        return found

    @property
    def datasets(self) -> list[str]:
        """Names of all datasets that the run ever reads, in the order of the config."""
        mixes = [self.mix, *self.mix_switches.values()]
        return list(dict.fromkeys(name for mix in mixes for name, weight in mix.items() if weight))

    def phases(self, seq_len: int) -> tuple[Phase, ...]:
        """The phases of the run: each mix, from its first sequence on."""
        if not self.mix:
            return (Phase(0, (PERIOD,)),)
        starts = {0: self.mix, **dict(sorted(self.mix_switches.items()))}
        return tuple(
            Phase(-(-tokens // seq_len), thousandths([mix.get(n, 0.0) for n in self.datasets]))
            for tokens, mix in starts.items()
        )
