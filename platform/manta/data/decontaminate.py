"""Drops training documents that share a run of words with evaluation examples.

GPT-3 searched for shared runs of 13 words (Brown et al. 2020, appendix C) and cut out the text
around them; Manta drops the whole document.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from manta import foreign, storage
from manta.errors import DataError
from manta.text import files, parquet, rows, sources

WORD = re.compile(r"[^\W_]+")
NOT_SPACE = re.compile(r"\S")
JSON = rows.decoder()
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses no bits


class Decontaminator:
    """The word n-grams of evaluation examples, as sorted 64-bit hashes.

    A word is a run of letters and digits; case, spacing and punctuation do not count. (In a script
    without spaces, a word is all the text between two punctuation marks.) A text of fewer than n
    words has no n-grams, so it matches nothing, neither as a document nor as an example.
    """

    def __init__(self, ngrams: np.ndarray, ngram: int):
        assert ngram > 0 and ngrams.dtype == np.uint64
        self.ngrams = ngrams
        self.ngram = ngram

    @functools.cached_property
    def sha256(self) -> str:
        """A digest of n and the n-grams, which together decide which documents are dropped."""
        return storage.sha256_of(f"{self.ngram}\n".encode() + self.ngrams.astype("<u8").tobytes())

    def contaminated(self, text: str) -> bool:
        """Whether n consecutive words of the text are also in an evaluation example."""
        found = ngram_hashes(text, self.ngram)
        if not len(found) or not len(self.ngrams):
            return False
        # `searchsorted` places a hash above all others after the end of the array.
        places = np.minimum(np.searchsorted(self.ngrams, found), len(self.ngrams) - 1)
        return bool((self.ngrams[places] == found).any())


def build(paths: Sequence[str], ngram: int, most_bytes: int = sources.MOST_BYTES) -> Decontaminator:
    """Collects the n-grams of all texts in files of evaluation examples, local or at any URI.

    In .jsonl, .json (.gz) and .parquet files, each string in a row, at any depth, is a text; in
    .txt and .md files, each piece between blank lines. A row, and a file of another kind than
    .jsonl and .parquet, has at most `most_bytes`.

    Raises:
        DataError: a file is missing, damaged, too large or of another kind, or none of its texts
            has n words.
    """
    found = [_ngrams_of(path, ngram, most_bytes) for path in paths]
    everything = np.concatenate(found) if found else np.zeros(0, np.uint64)
    return Decontaminator(np.unique(everything), ngram)


def _ngrams_of(path: str, ngram: int, most: int) -> np.ndarray:
    kind = next((ending for ending in READERS if path.lower().endswith(ending)), None)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; readable are {', '.join(READERS)}")
    absolute = storage.absolute(path)
    try:
        item = storage.info(absolute)
        if item.type == pafs.FileType.NotFound:
            raise DataError(f"{path}: no such file")
        if item.type == pafs.FileType.Unknown:
            raise DataError(f"{path}: {files.what_is(absolute)}; give a file, or leave it out")
        if item.type != pafs.FileType.File:
            raise DataError(f"{path}: a folder; name its files")
        found = [ngram_hashes(text, ngram) for text in READERS[kind](absolute, most)]
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path}: not {e.encoding.upper()} at byte {e.start}; convert the file"
        ) from None
    except (pa.ArrowException, ValueError, OSError, EOFError, RecursionError) as e:
        reason = foreign.line(str(e))
        raise DataError(
            f"{path}: cannot be read ({reason}); restore the file or leave it out"
        ) from None
    if not any(map(len, found)):
        raise DataError(
            f"{path}: none of its {len(found)} texts has {ngram} words, so it would protect "
            "nothing; leave it out, or look for shorter runs of words"
        )
    return np.unique(np.concatenate(found))


def _read(path: str, most: int) -> str:
    with files.opened(files.Piece(path), "strict") as file:
        data = file.read(most + 1)
    _refuse_large(len(data), most, path)
    return data.decode().removeprefix("\ufeff")


def _refuse_large(size: int, most: int, where: str) -> None:
    if size > most:
        raise DataError(
            f"{where}: more than {most:,} bytes, which is data.max_document_bytes; raise it or "
            "leave the file out"
        )


def _plain_text(path: str, most: int) -> Iterable[str]:
    return (text for text in re.split(r"\n\s*\n", _read(path, most)) if text.strip())


def _json(path: str, most: int) -> Iterator[str]:
    """The strings of a file with one JSON value, or one per line: .json names both kinds."""
    text = _read(path, most)
    place = 0
    while start := NOT_SPACE.search(text, place):
        value, place = JSON.raw_decode(text, start.start())
        yield from _strings(value)


def _jsonl(path: str, most: int) -> Iterator[str]:
    with files.opened(files.Piece(path), "strict") as file:
        for number, (offset, line) in enumerate(files.lines(file, 0, files.END, most), 1):
            _refuse_large(len(line), most, f"{path}: line {number}")
            if files.is_blank(offset, line, most):
                continue
            try:
                value = JSON.decode(line.decode().removeprefix("" if offset else "\ufeff"))
            except UnicodeDecodeError as e:
                at = offset + e.start
                raise DataError(f"{path}: not UTF-8 at byte {at}; convert the file") from None
            except (ValueError, RecursionError) as e:
                reason = foreign.line(str(e))
                raise DataError(
                    f"{path}: line {number} cannot be read ({reason}); restore the file or leave "
                    "it out"
                ) from None
            yield from _strings(value)


def _parquet(path: str, most: int) -> Iterator[str]:
    with parquet.opened(path) as file:
        parquet.refuse_namesakes(file.schema_arrow.names, path)
        for batch in parquet.batches(file):
            _refuse_large(batch.nbytes // max(batch.num_rows, 1), most, path)
            yield from _strings(batch.to_pylist())


READERS: dict[str, Callable[[str, int], Iterable[str]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".json.gz": _json,
    ".txt": _plain_text,
    ".md": _plain_text,
    ".parquet": _parquet,
}


def _strings(value: Any) -> Iterator[str]:
    """Every string in a row, except the keys, which are the same in all rows."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _words(text: str) -> list[str]:
    # An accented letter can be one character or two; NFC makes both spellings equal.
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())


@functools.lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> bytes:
    """A hash of a word that is the same in every process, unlike Python's own hash()."""
    return hashlib.blake2b(word.encode(), digest_size=8).digest()


def ngram_hashes(text: str, ngram: int) -> np.ndarray:
    """A hash of each n consecutive words: a polynomial of the words' hashes, modulo 2^64."""
    words = _words(text)
    count = len(words) - ngram + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    each = np.frombuffer(b"".join(map(_word_hash, words)), "<u8").astype(np.uint64)
    hashes = each[:count].copy()
    for i in range(1, ngram):
        hashes *= MULTIPLIER
        hashes += each[i : i + count]
    return hashes
