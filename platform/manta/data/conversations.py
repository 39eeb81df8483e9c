"""Conversations as ids, and which of these are trained, found in the ids alone.

A dataset of conversations (`data.kind=chat`) has no column for its mask. Each row of `row_tokens`
ids holds whole conversations, each opened by the start token, and start tokens as padding. The mask
follows from the ids and from a rule, which the chat template decides. Preparation refuses or leaves
out every conversation for which the rule does not find what the template marks.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from manta.data import shards
from manta.data.manifest import Manifest, Shard
from manta.data.recipe import CHATS, Chat
from manta.errors import DataError
from manta.text.conversations import turns_of
from manta.text.rows import BadRow
from manta.text.templates import Encoded, Template
from manta.text.tokenizer import Tokenizer

KIND = "chat"
Trained = Literal["assistant", "all", "last"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tells the trained tokens of a conversation from its ids.

    An answer begins after its header and goes on to the end token, which is trained too: otherwise
    a model never stops.
    """

    header: tuple[int | bytes, ...]
    """What is before an answer: ids of special tokens, and bytes of text. Text before the first
    special token does not occur; the header is one text where the template has no special token."""
    end: int
    """Id of the token that ends an answer."""
    start: int
    """Id of the token that opens a conversation, which is the padding of rows too."""
    eot: int
    """Id of the token that ends a document."""
    tokens: tuple[bytes, ...] = dataclasses.field(repr=False)
    """The bytes of each id; none for special tokens."""
    train_on: Trained = "assistant"
    """`assistant`: answers; `last`: the last answer of each conversation; `all`: everything but
    what is between conversations."""

    def documents(self, inputs: Any) -> Any:
        """(B, T) the number of the conversation that each input (B, T) belongs to, counted within
        its row; an array or a tensor, as `inputs` is."""
        return (inputs == self.start).cumsum(1)


def rule_of(manifest: Manifest) -> Rule:
    """The rule of a dataset of conversations.

    Raises:
        DataError: it is another kind of dataset, or its tokenizer is missing or damaged.
    """
    if not is_of_conversations(manifest):
        raise DataError(
            f"{manifest.path}: not a dataset of conversations; prepare it with data.kind=chat"
        )
    return rule(manifest.load_tokenizer(), manifest.recipe["train_on"])


def is_of_conversations(manifest: Manifest) -> bool:
    """Whether a dataset has rows of whole conversations, be they pairs or not."""
    return manifest.recipe.get("kind") in CHATS


def conversations_of(manifest: Manifest, shard: Shard) -> Iterator[np.ndarray]:
    """Yields the ids of each conversation of a shard, from the start token on, without padding.

    Raises:
        DataError: the shard, or the dataset's tokenizer, is missing or damaged.
    """
    made = manifest.load_tokenizer()
    start, has_end = made.start, Template.of(made).end == made.start
    tokens = shards.tokens_of(manifest, shard)
    pieces = iter(np.split(tokens, np.flatnonzero(tokens == start))[1:])
    for piece in pieces:
        if len(piece) > 1:
            yield np.append(piece, next(pieces)) if has_end else piece


def rule(tokenizer: Tokenizer, train_on: Trained = "assistant") -> Rule:
    """The rule of the chat template that a tokenizer has. Raises DataError if it has none."""
    template = Template.of(tokenizer)
    start, eot, tokens = tokenizer.start, tokenizer.eot, tokens_of(tokenizer)
    return Rule(template.header, template.end, start, eot, tokens, train_on)


def tokens_of(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """The bytes of each id, as `Rule.tokens` has them."""
    special = {token.id for token in tokenizer.extras.added if token.special}
    decode = tokenizer.tiktoken.decode_single_token_bytes
    return tuple(b"" if i in special else decode(i) for i in range(tokenizer.vocab_size))


def trained(rule: Rule, ids: np.ndarray) -> np.ndarray:
    """(B, T) bool: whether each target of ids (B, T + 1) is trained. Target t is the id t + 1.

    An id below 0 (a token that could not be read) is not trained, and ends the answer that it is
    in. A token that has bytes of both a header and the answer belongs to the answer.
    """
    if rule.train_on == "all":
        before, after = ids[:, :-1], ids[:, 1:]
        found = (after != rule.start) & (after >= 0)
        if rule.end == rule.start:  # it is the end of a conversation unless another one precedes it
            found |= (after == rule.start) & (before != rule.start) & (before >= 0)
        return found
    mask = np.zeros(ids.shape, dtype=bool)
    for row, out in zip(ids, mask, strict=True):
        for start, stop in places_of(rule, row):
            answers = list(_answers(rule, row[start:stop]))
            for first, last in answers[-1:] if rule.train_on == "last" else answers:
                out[start + first : start + last] = True
    return mask[:, 1:]


def places_of(rule: Rule, row: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields the place of each conversation in a row, with one start token after it, if that one
    may be its end token."""
    is_border = (row == rule.start) | (row < 0)
    borders = np.flatnonzero(is_border)
    starts = [0, *(borders + 1).tolist()]
    stops = [*borders.tolist(), len(row)]
    for start, stop in zip(starts, stops, strict=True):
        if start < stop:
            is_end = rule.end == rule.start and stop < len(row) and row[stop] == rule.end
            yield start, stop + is_end


def _answers(rule: Rule, ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields the place of each answer in a conversation, its end token included."""
    ends = np.flatnonzero(ids == rule.end)
    find = _after_special if isinstance(rule.header[0], int) else _after_text
    done = 0
    for first in find(rule, ids):
        if first < done:
            continue  # the header is spelled in an answer
        at = np.searchsorted(ends, first)
        done = int(ends[at]) + 1 if at < len(ends) else len(ids)
        yield first, done


def _after_special(rule: Rule, ids: np.ndarray) -> Iterator[int]:
    """Yields the index of the token after each header that begins with a special token."""
    for at in np.flatnonzero(ids == rule.header[0]).tolist():
        place: int | None = at + 1
        for number, part in enumerate(rule.header[1:], 2):
            if isinstance(part, bytes):
                is_last = number == len(rule.header)
                place = _after_bytes(rule, ids, place or 0, part, is_last)
            elif place is not None:
                is_there = place < len(ids) and ids[place] == part
                place = place + 1 if is_there else None
            if place is None:
                break
        else:
            assert place is not None
            yield place


def _after_bytes(
    rule: Rule, ids: np.ndarray, place: int, text: bytes, may_go_on: bool
) -> int | None:
    """The index of the token after a text that begins at `place`, or of the token that has bytes of
    both the text and what follows it; None if another text is there."""
    found = b""
    while len(found) < len(text) and place < len(ids):
        token = rule.tokens[ids[place]]
        if not token:
            return None
        if len(found) + len(token) > len(text):
            return place if may_go_on and (found + token).startswith(text) else None
        found += token
        place += 1
    return place if found == text else None


def _after_text(rule: Rule, ids: np.ndarray) -> Iterator[int]:
    """Yields the index of the token after each header that is a text."""
    header = rule.header[0]
    assert isinstance(header, bytes)
    pieces = [rule.tokens[token] for token in ids]
    text = b"".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])
    at = text.find(header)
    while at >= 0:
        stop = at + len(header)
        last = int(np.searchsorted(ends, stop))
        yield last + int(ends[last] == stop)
        at = text.find(header, stop)


# --- preparation ---------------------------------------------------------------------------------


class Unlabelled(BadRow):
    """A conversation without a trained token, or a pair that has none for its length."""

    def __init__(self, what: str, remedy: str, kind: str = "without a trained token"):
        super().__init__(kind, what, remedy)


def refuse_ambiguous(rule: Rule, found: Encoded) -> None:
    """Raises BadRow unless the rule, which has to be for all answers, finds in the ids of a
    conversation what the template marks."""
    followed = np.append(found.ids.astype(np.int64), rule.start)
    mask = trained(rule, followed[None])[0]
    if found.trained[0] or mask[-1] or (mask[:-1] != found.trained[1:]).any():
        raise BadRow(
            "ambiguous",
            "its text has what the template writes around an answer, so that its answers cannot be "
            "told from its ids",
            "change its text, or give another data.template",
        )


class Encoder:
    """Encodes conversations with the chat template of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, chat: Chat):
        self._chat, self._template = chat, Template.of(tokenizer)
        # Answers must be there, and be found, whatever is trained.
        self._rule = rule(tokenizer)

    def __call__(self, text: str) -> tuple[np.ndarray, bool]:
        """The ids of a conversation (`text.conversations`), at most `row_tokens`, and whether turns
        at its end were cut off for that.

        Raises:
            Unlabelled: there is no answer, or the first one does not fit.
            BadRow: the template refuses the conversation, or the rule finds other answers in it.
        """
        turns, most = turns_of(text), self._chat.row_tokens
        found, is_cut = self._template.encode(turns), False
        if len(found.ids) > most:
            found, is_cut = self._cut(text, len(found.ids)), True
        if not found.trained.any():
            raise Unlabelled("no turn of the assistant, so nothing would be trained", "add one")
        refuse_ambiguous(self._rule, found)
        return found.ids, is_cut

    def _cut(self, text: str, length: int) -> Encoded:
        """The most turns that end with an answer and fit in a row."""
        turns, most = turns_of(text), self._chat.row_tokens
        counts = [n for n, turn in enumerate(turns, 1) if turn.role == "assistant"]
        best, low, high = None, 0, len(counts)
        while low < high:
            middle = (low + high) // 2
            found = self._template.encode(turns[: counts[middle]])
            if len(found.ids) <= most:
                best, low = found, middle + 1
            else:
                high = middle
        if best is None:
            raise Unlabelled(
                f"its {length:,} tokens do not fit in a row of {most:,}, nor do those up to its "
                "first answer",
                "raise data.row_tokens",
            )
        return best
