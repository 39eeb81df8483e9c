"""Documents of the suites, read from this machine or from the run's own dataset."""

import dataclasses
import functools
import random
import re
from typing import Any

from manta import foreign, storage
from manta.data import manifest as manifests
from manta.data import shards
from manta.data.conversations import KIND, conversations_of
from manta.data.manifest import Manifest
from manta.errors import DataError
from manta.evaluate import core
from manta.evaluate.conversation import Conversation, ids_of
from manta.evaluate.files import read_rows, read_text
from manta.evaluate.settings import EvaluateConfig
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint as checkpoints

QUICK_TOKENS = 12_000  # for perplexity: half a minute at 124M on two cores
QUICK_PIECES = 60
PIECE_TOKENS = 64
CHOICES = 4


class Documents:
    """The documents of a suite's tasks, for the checkpoint at `path`."""

    def __init__(self, c: EvaluateConfig, path: str):
        self._c, self._path = c, path
        self._made: dict[str, list[dict[str, Any]] | None] = {}

    def check(self, task: str, about: dict[str, Any]) -> None:
        """Raises DataError if a file is missing or not as expected."""
        if task.startswith("core_"):
            core.file(self._c.evals.data_dir, about["file"])
        else:
            self._made[task] = self(task, about)

    def __call__(self, task: str, about: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The documents of a task; None: lm-eval loads them.

        Raises:
            DataError: a file is missing or not as expected.
        """
        if task in self._made:
            return self._made[task]
        local = self._c.evals
        if task.startswith("hellaswag") and (file := self._file("hellaswag")):
            return read_hellaswag(file)
        if task == "lambada" and (file := self._file("lambada")):
            return read_lambada(file)
        if task == "wikitext" and local.wikitext_path is not None:
            text = read_text(local.wikitext_path, "evals.wikitext_path")
            # A page begins at its title, ` = Title = `; section titles have more signs.
            pages = re.split(r"(?m)^(?= = [^=\n]+ = ?$)", text)
            return [{"page": page} for page in pages if page.strip()]
        if task.startswith("core_"):
            return core.documents(local.data_dir, about, self._c.limit)
        if task in ("perplexity", "quick_perplexity", "quick_continuation"):
            tokenizer = checkpoints.load_tokenizer(self._path)
            texts = [text for text in self._texts if text.strip()]
            if task == "quick_continuation":
                if any(isinstance(text, Conversation) for text in texts):
                    texts = ["\n\n".join(texts)]  # a conversation may be shorter than a piece
                length = checkpoints.load_model_config(self._path).context_length
                return continuations(texts, tokenizer, min(PIECE_TOKENS, length))
            most = QUICK_TOKENS if task == "quick_perplexity" else None
            return whole_texts(texts, tokenizer, most)
        return None

    def _file(self, suite: str) -> str | None:
        """The suite's one file, if it was given by itself or is in data_dir."""
        local = self._c.evals
        given: str | None = getattr(local, f"{suite}_path")
        if given is not None:
            return storage.absolute(given)
        published = {"hellaswag": "hellaswag_val.jsonl", "lambada": "lambada_test.jsonl"}[suite]
        if local.data_dir is not None:
            path = storage.join(storage.absolute(local.data_dir), published)
            return path if storage.exists(path) else None
        return None

    @functools.cached_property
    def _texts(self) -> list[str]:
        local = self._c.evals
        if local.text_path is not None:
            return [read_text(local.text_path, "evals.text_path")]
        if local.dataset is not None:
            path = manifests.resolve(local.dataset, self._c.home_folder)
            return texts_of(manifests.load(path), checkpoints.load_tokenizer(self._path))
        texts = val_texts(self._path)
        if not texts:
            raise DataError(
                f"{self._path} was imported and has no dataset: give evals.text_path=FILE or "
                "evals.dataset=NAME"
            )
        return texts


def val_texts(path: str) -> list[str]:
    """The documents of the val split on which the checkpoint's run was measured."""
    texts, tokenizer = list[str](), checkpoints.load_tokenizer(path)
    for folder in checkpoints.load_state(path).datasets:
        if not manifests.exists(folder):
            raise DataError(
                f"the dataset of this checkpoint is no longer at {folder}; give a text with "
                "evals.text_path=FILE"
            )
        texts += texts_of(manifests.load(folder), tokenizer)
    return texts


def texts_of(manifest: Manifest, reader: Tokenizer) -> list[str]:
    """The documents of a dataset's val split.

    Of a dataset of conversations, each text is what the chat template wrote, without special
    tokens. For a model whose tokenizer `reader` has these, it is a `Conversation`, whose ids are
    those that a run trains on.
    """
    tokenizer, split = manifest.load_tokenizer(), manifest.split("val")
    if manifest.recipe.get("kind") != KIND:
        return [
            tokenizer.text_of(ids.tolist())
            for shard in split
            for ids in shards.documents(manifest, shard)
        ]
    is_known = reader.extends(tokenizer)
    found: list[str] = []
    for ids in (ids for shard in split for ids in conversations_of(manifest, shard)):
        text = _without_special(ids.tolist(), tokenizer)
        found.append(Conversation(text, ids[1:].tolist()) if is_known else text)
    return found


def _without_special(ids: list[int], tokenizer: Tokenizer) -> str:
    special = {token.id for token in tokenizer.extras.added if token.special}
    return tokenizer.decode([token for token in ids if token not in special])


def whole_texts(texts: list[str], tokenizer: Tokenizer, most: int | None) -> list[dict[str, Any]]:
    """Documents for perplexity with their numbers of tokens, at most `most` tokens in all, and the
    `ids` of conversations."""
    documents, left = list[dict[str, Any]](), most
    for text in texts:
        ids = ids_of(text, tokenizer)
        is_plain = not isinstance(text, Conversation)
        if left is not None:
            if left < len(ids) and is_plain:
                text = tokenizer.decode(ids[:left]).rstrip("\ufffd")
                ids = tokenizer.encode(text)
            elif left < len(ids):
                ids = ids[:left]
                text = _without_special(ids, tokenizer)
            left -= len(ids)
        if ids:
            made = {"text": str(text), "num_tokens": len(ids)}
            documents.append(made if is_plain else {**made, "ids": ids})
        if left is not None and left <= 0:
            break
    return documents


def continuations(texts: list[str], tokenizer: Tokenizer, length: int) -> list[dict[str, Any]]:
    """Pieces of `length` tokens, spread evenly over the texts. Each has four endings, its own last
    quarter and those of three other pieces; `label` is the index of its own. The same texts give
    the same pieces.

    Raises:
        DataError: there are fewer than four pieces with different endings.
    """
    cut = max(1, 3 * length // 4)
    found = []
    for text in texts:
        ids = tokenizer.encode(text)
        for begin in range(0, len(ids) - length + 1, length):
            halves = ids[begin : begin + cut], ids[begin + cut : begin + length]
            beginning, ending = map(tokenizer.decode, halves)
            if "\ufffd" not in beginning + ending and beginning.strip() and ending.strip():
                found.append((beginning, ending))
    step = max(1, len(found) // QUICK_PIECES)
    pieces = found[::step][:QUICK_PIECES]
    if len({ending for _, ending in pieces}) < CHOICES:
        raise DataError(
            f"suite=quick: the val split has {len(found)} pieces of {length} tokens, but needs "
            f"{CHOICES} different ones: give a longer text with evals.text_path=FILE"
        )
    rng = random.Random(0)
    documents = []
    for beginning, ending in pieces:
        others = sorted({other for _, other in pieces} - {ending})
        endings = [ending, *rng.sample(others, CHOICES - 1)]
        rng.shuffle(endings)
        label = endings.index(ending)
        documents.append({"beginning": beginning, "endings": endings, "label": label})
    return documents


@dataclasses.dataclass
class _HellaSwag:
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: list[str]
    label: int

    def __post_init__(self) -> None:
        if len(self.endings) != CHOICES or not 0 <= self.label < CHOICES:
            raise ValueError(f"needs {CHOICES} endings, and a label from 0 to {CHOICES - 1}")


def read_hellaswag(path: str) -> list[dict[str, Any]]:
    """Reads HellaSwag's rows. Raises DataError, naming the line, if a row is not valid."""

    def read(row: dict[str, Any]) -> dict[str, Any]:
        found = dataclasses.asdict(foreign.check(row, _HellaSwag))
        return {**found, "label": str(found["label"])}

    has = ", ".join(field.name for field in dataclasses.fields(_HellaSwag))
    return read_rows(path, f"evals.hellaswag_path={path}", "HellaSwag", has, read)


def read_lambada(path: str) -> list[dict[str, Any]]:
    """Reads LAMBADA's rows. Raises DataError, naming the line, if `text` is not several words."""

    def read(row: dict[str, Any]) -> dict[str, Any]:
        text = row["text"]
        if not isinstance(text, str) or " " not in text:
            raise ValueError("needs a text of several words")
        return {"text": text}

    return read_rows(path, f"evals.lambada_path={path}", "LAMBADA", "a text", read)
