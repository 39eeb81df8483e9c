"""What the tokenizers of published models have next to their merges: special tokens, words that no
merge makes, a Unicode normalization, and the parts that these tokens play.

A special token (`<|im_start|>`) is kept apart from text: text that spells it is plain text, as a
person's text must not be able to end a document or to speak for somebody else in a chat. (It is
what transformers does with `split_special_tokens=True`, and not what it does by default.) An added
token that is not special (Qwen3's `<think>`) is a word: text that spells it has its id.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Literal

from tiktoken_ext.openai_public import r50k_pat_str

from manta.config import Natural

END_OF_TEXT = "<|endoftext|>"
# The tokens around a turn of a chat (ChatML), and some for later uses.
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
RESERVED = (*CHAT_TOKENS, *(f"<|reserved_{i}|>" for i in range(4)))

# How Llama 3 and Qwen split text into words.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
# The digits of the tokenizers library: it knows some newer ones than the regular expressions do.
_DIGIT = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
# Each digit by itself, and what is between digits as GPT-2 splits it (SmolLM2, StarCoder 2).
GPT2_DIGITS = (
    rf"[{_DIGIT}]|'(?:[sdmt]|ll|ve|re)| ?\p{{L}}++| ?[^\s\p{{L}}{_DIGIT}]++|\s++(?=[{_DIGIT}]|$)"
    r"|\s+(?!\S)|\s"
)
NORMALIZED_AT_ONCE = 1 << 16  # characters: the normalizer takes 30 times their size in memory


@dataclasses.dataclass(frozen=True)
class Added:
    """A token that no merges make."""

    content: str
    id: Natural
    special: bool = True
    """Whether it is kept apart from text; False: a word of the text."""
    normalized: bool = False
    """Whether such a word is looked for after normalization; False: before."""


@dataclasses.dataclass(frozen=True)
class Extras:
    """All that a tokenizer has next to a pattern, its merges and the id of end-of-text."""

    added: tuple[Added, ...]
    """All tokens that no merges make, in the order of their ids, end-of-text included."""
    normalization: Literal["NFC"] | None = None
    """The form of Unicode into which text is brought before it is encoded."""
    bos: Natural | None = None
    """Id of the token that opens every document (Llama 3's <|begin_of_text|>); None: none does."""
    ends: tuple[Natural, ...] = ()
    """Ids, other than that of end-of-text, at which generation ends."""
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    """Tokens by their part in transformers, as in a tokenizer_config.json: bos_token, pad_token."""
    ids: dict[str, Natural | list[Natural]] = dataclasses.field(default_factory=dict)
    """The same as ids, as in a config.json: bos_token_id, eos_token_id, pad_token_id."""
    generation_ids: dict[str, Natural | list[Natural]] = dataclasses.field(default_factory=dict)
    """The same, as in a generation_config.json."""
    chat_template: str | dict[str, str] | None = None
    """The template of a chat, or several by name, in Jinja (`templates`)."""

    def problems(self, plain: int, eot: int) -> list[str]:
        """Lists what contradicts itself, for a vocabulary with `plain` tokens that merges make."""
        size = plain + len(self.added)
        ids = [token.id for token in self.added]
        found = []
        if len({token.content for token in self.added} - {""}) < len(ids):
            found.append("added: a token has no content, or that of another one")
        if len(set(ids)) < len(ids) or ids != sorted(ids) or max(ids, default=0) >= size:
            found.append(f"added: its ids should rise, and stay below {size}")
        if eot not in [token.id for token in self.added if token.special]:
            found.append(f"eot={eot}: not the id of a special token")
        used = [*self.ends] if self.bos is None else [self.bos, *self.ends]
        found += [f"bos, ends: there is no id {token}" for token in used if token >= size]
        contents = {token.content for token in self.added}
        found += [
            f"names: {key} is no added token" for key, n in self.names.items() if n not in contents
        ]
        return found


def only(eot: int) -> Extras:
    """The extras of a tokenizer with one special token, <|endoftext|>."""
    return Extras((Added(END_OF_TEXT, eot),))


def usual_names(extras: Extras, eot: int) -> dict[str, str]:
    """The tokens by their part that Manta writes where no `Extras.names` are."""
    content = {token.id: token.content for token in extras.added}
    start = eot if extras.bos is None else extras.bos
    return {"bos_token": content[start], "eos_token": content[eot], "pad_token": content[eot]}


def usual_ids(extras: Extras, eot: int) -> dict[str, int | list[int]]:
    """The same as ids of a config.json; that of padding is in generation_config.json alone."""
    start = eot if extras.bos is None else extras.bos
    return {"bos_token_id": start, "eos_token_id": [eot, *extras.ends] if extras.ends else eot}


class Splitter:
    """Splits a text into its words that are tokens of their own, and normalized text between."""

    def __init__(self, extras: Extras):
        words = [token for token in extras.added if not token.special]
        self._normalization = extras.normalization
        self._ids = {}
        for token in words:
            content = token.content
            if token.normalized and extras.normalization is not None:
                content = nfc(content)
            self._ids[content] = token.id
        self._before = _any_of([t.content for t in words if not t.normalized])
        self._after = _any_of([c for c, t in zip(self._ids, words, strict=True) if t.normalized])

    def __call__(self, text: str) -> Iterator[str | int]:
        """Yields texts and ids of words; it joins nothing and leaves nothing out."""
        for part in self._words(text, self._before):
            if isinstance(part, int):
                yield part
            else:
                yield from self._words(nfc(part) if self._normalization else part, self._after)

    def _words(self, text: str, words: re.Pattern[str] | None) -> Iterator[str | int]:
        if words is None:
            yield text
            return
        for index, part in enumerate(words.split(text)):
            if index % 2:
                yield self._ids[part]
            elif part:
                yield part


def _any_of(words: list[str]) -> re.Pattern[str] | None:
    """Finds the first of the words, and the longest of those that begin there."""
    if not words:
        return None
    return re.compile(f"({'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})")


def nfc(text: str) -> str:
    """The text in Unicode's form NFC, as the tokenizers library makes it. (Python's own tables may
    be of another version of Unicode.)"""
    if text.isascii():
        return text
    normalize = _nfc()
    return "".join(normalize(piece) for piece in _pieces(text))


@functools.cache
def _nfc():  # type: ignore[no-untyped-def]
    from tokenizers import normalizers

    return normalizers.NFC().normalize_str


def _pieces(text: str) -> Iterator[str]:
    """Yields the text in pieces that begin with ASCII, which never joins what is before it."""
    start = 0
    while found := _ASCII.search(text, start + NORMALIZED_AT_ONCE):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


_ASCII = re.compile(r"[\x00-\x7f]")


def can_cut(pattern: str, text: str, at: int) -> bool:
    """Whether the words of `text` from index `at` on are those of its rest alone. False where that
    is not known.

    No place at an apostrophe is one: "'s" is a word at the start of a text, but not after other
    marks. Of patterns other than GPT-2's, only places after a letter and before a letter, or before
    a space and a letter, are known (Llama 3 counts digits from the left, three by three).
    """
    if "'" in text[max(0, at - 2) : at + 1]:
        return False
    if pattern == r50k_pat_str:
        return True
    after = text[at + 1 : at + 2] if text[at : at + 1] == " " else text[at : at + 1]
    return pattern in (LLAMA3, QWEN, GPT2_DIGITS) and text[at - 1].isalpha() and after.isalpha()
