"""Tokenizers: tiktoken's named encodings, and byte-pair encodings trained on the corpus.

Hugging Face's `tokenizers` trains and tiktoken encodes. Both kinds are one class with one file
format, saved with every dataset and every checkpoint.
"""

import base64
import codecs
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from manta import foreign
from manta.config import Natural
from manta.errors import DataError, MantaError
from manta.terminal import without_stderr
from manta.text.lost_bytes import LostBytes
from manta.text.tokenizer_extras import (
    END_OF_TEXT,
    Added,
    Extras,
    Splitter,
    can_cut,
    nfc,
    only,
)

FORMAT = "manta-bpe-1"
FORMAT_WITH_EXTRAS = "manta-bpe-2"
R50K = "r50k_base"
LEAST_SIZE = 257  # ids of a tokenizer without merges: the bytes, and end-of-text
R50K_SIZE = 50257  # ids, end-of-text included
# A longer text is encoded in windows of this many characters. Windows change no id. They bound what
# one very long word costs in tiktoken: 50 MB of the letter "a" take 31 s and 2.3 GB more memory
# without windows (48 bytes per byte; "-", NUL and newlines the same), 11 s and 0.1 GB with them.
# Also, tiktoken fails at a million white-space characters before a word.
WINDOW = 1 << 17
# The trainer's time grows with the square of a word's length (5 s at 100 kB), and its memory with
# the length of a text (100 bytes per byte). So it gets long words and long texts in pieces of this
# many characters.
TRAINED_WORD = 1000
TRAINED_TEXT = 1 << 17
# A tokenizer may lack bytes that no text has (others lose their character), but none of these.
ESSENTIAL = bytes([*range(0x20, 0x7F), *b"\n"])
_LONG_WORD = re.compile(rf"(?<!\S)\S{{{TRAINED_WORD + 1},}}|(?<!\s)\s{{{TRAINED_WORD + 1},}}")
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


# Letters, digits, marks, spaces and line ends of several scripts, and each ASCII character next to
# letters, digits, spaces and itself. A pattern that loses one of them loses text; one that takes
# very long does so here.
PROBE = "Don't say 12 times: naïve Ωmega a\u0304 — 日本語!\r\n\n\t  x "
PROBE += "a" * 60 + " " * 60 + "!" * 60
PROBE += "".join(f"a{chr(i)}b {chr(i)} 1{chr(i)}2{chr(i)}{chr(i)}\n" for i in range(128))


class Tokenizer:
    """Turns text into token ids and back. Text that spells a special token is ordinary text."""

    def __init__(
        self,
        name: str,
        pattern: str,
        ranks: dict[bytes, int],
        eot: int,
        extras: Extras | None = None,
    ):
        self.name = name
        self.eot = eot
        """Id of the end-of-text token, which follows every document."""
        self.pattern = pattern
        """The regular expression that splits text into words, within which merges happen."""
        self.ranks = ranks
        """The id of each token that merges make; ids are in the order of the merges."""
        self.extras = extras or only(eot)
        self._split = Splitter(self.extras)
        bos = [] if self.extras.bos is None else [self.extras.bos]
        self._opening, self._closing = np.array(bos, self.dtype), np.array([eot], self.dtype)
        self.lacking = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        """Bytes without a token, which a text loses, as in transformers (SmolLM2 lacks some)."""
        # tiktoken needs a token for each byte: these get ids that `LostBytes` takes out.
        stand_ins = {bytes([b]): self.vocab_size + i for i, b in enumerate(self.lacking)}
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=pattern,
            mergeable_ranks=ranks | stand_ins,
            special_tokens={token.content: token.id for token in self.extras.added},
        )
        one = self._encoding._encode_single_piece
        lost = LostBytes(pattern, self.lacking, self.token_bytes(), one) if self.lacking else None
        self._lost = lost

    @property
    def tiktoken(self) -> tiktoken.Encoding:
        """The tiktoken encoding behind this tokenizer, to compare measurements with."""
        return self._encoding

    @property
    def vocab_size(self) -> int:
        """Number of ids, including those of the end-of-text token and of other special tokens."""
        return len(self.ranks) + len(self.extras.added)

    def extends(self, other: "Tokenizer") -> bool:
        """Whether this tokenizer makes the same ids of every text as `other`, and has all special
        tokens of it. It may have more of them."""
        theirs = other.extras.added
        mine, others = (
            (t.pattern, t.ranks, t.eot, t.extras.normalization, t.extras.bos) for t in (self, other)
        )
        return mine == others and self.extras.added[: len(theirs)] == theirs

    @property
    def dtype(self) -> np.dtype:
        """The smallest type for ids. The largest uint16 is never an id, so it can mark padding."""
        return np.dtype(np.uint16 if self.vocab_size <= np.iinfo(np.uint16).max else np.uint32)

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text, as an array (T,) of type `dtype`."""
        try:
            parts = list(self._parts(text))
        except UnicodeEncodeError:  # half of a surrogate pair, e.g. from a terminal: U+FFFD
            mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            parts = list(self._parts(mended))
        return np.concatenate(parts).astype(self.dtype)

    def document(self, text: str) -> np.ndarray:
        """The ids of a whole document, (T,): those of its text between the tokens that open and end
        it."""
        return np.concatenate([self._opening, self.encode_array(text), self._closing])

    def text_of(self, document: Sequence[int]) -> str:
        """The text of a document's ids, without the token that opens it."""
        is_open = self.extras.bos is not None and [*document[:1]] == [self.extras.bos]
        return self.decode(document[1:] if is_open else document)

    def prompt(self, text: str) -> list[int]:
        """The ids with which a model goes on with a text that begins a document; never none."""
        return [*self._opening.tolist(), *self.encode(text)] or [self.eot]

    @property
    def start(self) -> int:
        """Id of the token that is before a document's first one: bos, or the end-of-text token of
        the document before."""
        return self.eot if self.extras.bos is None else self.extras.bos

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids at which generation ends: that of end-of-text, and others, for example of the end of
        a turn in a chat."""
        return (self.eot, *self.extras.ends)

    def _parts(self, text: str) -> Iterator[np.ndarray]:
        yield np.empty(0, np.uint32)
        for part in self._split(text):
            if isinstance(part, int):
                yield np.array([part], np.uint32)
            else:
                windows = self._windows(part)
                yield from self._lost.taken_out(part, windows) if self._lost else windows

    def _encode(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def _windows(self, text: str) -> Iterator[np.ndarray]:
        """Yields the ids of a text, window by window; they equal the ids of the text as a whole.

        The next window begins at a token of this one, and its own first token must be the same.
        That token is then a token of the whole text too. A sequence of tokens is the encoding of
        its bytes if each two neighbours are the encoding of theirs (a merge across a border happens
        between the two or not at all), and here each two are neighbours in one of the windows.
        If no token fits, the window grows.
        """
        start, size = 0, WINDOW
        ids = self._encode(text[:size])
        while start + size < len(text):
            for count, at in self._borders(text, start + size, ids):
                following = self._encode(text[at : at + WINDOW])
                if following[0] == ids[count]:
                    yield ids[:count]
                    start, size, ids = at, WINDOW, following
                    break
            else:
                size *= 2
                ids = self._encode(text[start : start + size])
        yield ids

    def _borders(self, text: str, end: int, ids: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yields places near the end of a window: the number of tokens before, and the index of the
        character in the text.

        A place is at least eight tokens before the end, since the last words may be cut there if
        the text continues.
        """
        behind = b""
        tried = 0
        for count in range(len(ids) - 1, max(0, len(ids) - 64), -1):
            behind = self._encoding.decode_single_token_bytes(int(ids[count])) + behind
            if len(ids) - count < 8 * (tried + 1) or behind[0] & 0xC0 == 0x80:  # within a character
                continue
            at = end - len(behind.decode())
            if can_cut(self.pattern, text, at):
                tried += 1
                yield count, at

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(list(tokens))

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yields the text of ids as they arrive, in whole characters only."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(self._encoding.decode_single_token_bytes(token))
        yield decoder.decode(b"", final=True)

    def token_bytes(self) -> np.ndarray:
        """(V,) int32: the number of bytes of text each id stands for; 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        for added in self.extras.added:
            lengths[added.id] = 0 if added.special else len(added.content.encode())
        return lengths

    @functools.cached_property
    def serialized(self) -> bytes:
        """The tokenizer as a JSON file: name, pattern, end-of-text id, tokens in order of rank, and
        extras if it has any. The tokens take the ids that no added token has."""
        ordered = sorted(self.ranks, key=self.ranks.__getitem__)
        has_extras = self.extras != only(self.eot) or self.eot != len(self.ranks)
        content: dict[str, Any] = {
            "format": FORMAT_WITH_EXTRAS if has_extras else FORMAT,
            "name": self.name,
            "pattern": self.pattern,
            "eot": self.eot,
            "tokens": [base64.b64encode(token).decode() for token in ordered],
        }
        if has_extras:
            content["extras"] = dataclasses.asdict(self.extras)
        return json.dumps(content, indent=0).encode()

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.serialized).hexdigest()


@dataclasses.dataclass(frozen=True)
class _File:
    """The content of an encoding.json: `Tokenizer.serialized`."""

    format: str
    name: str
    pattern: str
    eot: Natural
    tokens: list[str]
    extras: Extras | None = None


def load(path: str, error: type[MantaError] = DataError) -> Tokenizer:
    """The tokenizer saved at `path`. Raises `error` when it is missing or damaged."""
    data = foreign.read_bytes(path, error)
    try:
        return from_bytes(data)
    except ValueError as e:
        raise error(f"{path}: not a tokenizer of Manta's ({e}); restore the file") from None


@functools.lru_cache(maxsize=4)  # each task of a worker asks again
def from_bytes(data: bytes) -> Tokenizer:
    """Makes a tokenizer from `Tokenizer.serialized`. Raises ValueError if it is none."""
    content = foreign.parse(data, _File)
    expected = FORMAT if content.extras is None else FORMAT_WITH_EXTRAS
    if content.format != expected:
        raise ValueError(f"format={foreign.line(content.format)}: should be {expected}")
    ranks: dict[bytes, int] = {}
    taken = {token.id for token in content.extras.added} if content.extras else set()
    free = (rank for rank in itertools.count() if rank not in taken)
    for rank, text in zip(free, content.tokens, strict=False):
        try:
            token = base64.b64decode(text, validate=True)
        except ValueError:
            raise ValueError(f"tokens.{rank}={foreign.line(text)}: not base64") from None
        if token in ranks:
            raise ValueError(
                f"tokens.{rank}={foreign.line(text)}: the same as token {ranks[token]}"
            )
        ranks[token] = rank
    return checked(content.name, content.pattern, ranks, content.eot, content.extras)


def checked(
    name: str, pattern: str, ranks: dict[bytes, int], eot: int, extras: Extras | None = None
) -> Tokenizer:
    """A tokenizer from values that somebody else may have written.

    Raises:
        ValueError: there is no such tokenizer, or it cannot encode every text and decode it again
            (without bytes that it lacks, and normalized).
    """
    if b"" in ranks:
        raise ValueError(f"token {ranks[b'']} is empty")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing and (extras is None or not set(missing).isdisjoint(ESSENTIAL)):
        raise ValueError(f"no token for byte {missing[0]} (and {len(missing) - 1} other bytes)")
    if extras is None and eot != len(ranks):
        what = "also the id of a token" if eot < len(ranks) else "beyond the ids of the tokens"
        raise ValueError(f"eot={eot}: {what}; it should be {len(ranks)}, the next id")
    if extras is not None and (problems := extras.problems(len(ranks), eot)):
        raise ValueError(problems[0])
    said = f"pattern={foreign.line(repr(pattern))}"
    try:
        with without_stderr():  # where Rust writes its panics
            made = Tokenizer(name, pattern, ranks, eot, extras)
            probe = nfc(PROBE) if made.extras.normalization else PROBE
            probe = probe.encode().translate(None, made.lacking).decode(errors="replace")
            back = made.decode(made.encode(PROBE))
    except BaseException as e:
        # tiktoken is written in Rust, whose panics are not of the class Exception.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise ValueError(f"{said}: tiktoken refuses it ({foreign.line(str(e))})") from None
    if back != probe:
        raise ValueError(f"{said}: it loses parts of a text")
    return made


def train(texts: Iterable[str], vocab_size: int, reserved: Sequence[str] = ()) -> Tokenizer:
    """Trains a byte-level BPE with at most `vocab_size` ids, end-of-text and the special tokens
    `reserved` included. It has fewer if the text does not have enough pairs to merge.

    It splits text as r50k_base does. The first 256 ids are bytes; merges follow in the order in
    which they were learned, so that rank order is merge order and tiktoken encodes as the trainer
    would.
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainee

    trainee = Trainee(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r50k_pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1 - len(reserved),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trainee.train_from_iterator(_pieces(texts), trainer)
    byte_of = byte_of_character()
    ranks = {
        bytes(byte_of[character] for character in token): rank
        for token, rank in trainee.get_vocab().items()
    }
    eot, size = len(ranks), len(ranks) + 1 + len(reserved)
    names = enumerate((END_OF_TEXT, *reserved), eot)
    extras = Extras(tuple(Added(name, token) for token, name in names))
    return Tokenizer(f"bpe-{size}", r50k_pat_str, ranks, eot, extras)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Yields the texts in pieces for the trainer, without words so long that they take hours."""
    for text in texts:
        start = 0
        for word in _LONG_WORD.finditer(text):
            for end in range(word.start() + TRAINED_WORD, word.end(), TRAINED_WORD):
                yield from _in_pieces(text[start:end])
                start = end
        yield from _in_pieces(text[start:])


def _in_pieces(text: str) -> Iterator[str]:
    """Yields the text in pieces, cut where a word ends, which is where the pattern would cut."""
    start = 0
    while found := _WORD_END.search(text, start + TRAINED_TEXT):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def byte_of_character() -> dict[str, int]:
    """The byte that each character of ByteLevel stands for. ByteLevel shows a byte as itself if
    Latin-1 can print it, else as the next free character from U+0100 (GPT-2's bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(0x100 + i): byte for i, byte in enumerate(others)}
