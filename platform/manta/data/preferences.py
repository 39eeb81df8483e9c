"""Pairs of conversations as ids, and which answer each of their tokens belongs to.

A dataset of pairs (`data.kind=preference`) is one of conversations in whose rows two that follow
each other are a pair, the one with the chosen answer first. So the ids tell the pairs, too.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from manta.data import conversations
from manta.data.conversations import Rule, Unlabelled
from manta.data.manifest import Manifest, Shard
from manta.data.recipe import Chat
from manta.text import preferences
from manta.text.rows import BadRow
from manta.text.templates import Template
from manta.text.tokenizer import Tokenizer

KIND = "preference"
KEY = np.dtype("<u8")


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """The answers in some rows (B, T + 1): 2P of P pairs. Answer 2i is the chosen one of pair i,
    answer 2i + 1 the rejected one."""

    of_target: np.ndarray
    """(B, T) int64: the number of the answer that each target belongs to; -1 if to none."""
    keys: np.ndarray
    """(2P,) uint64: a digest of the conversation of each answer."""

    @property
    def pairs(self) -> int:
        return len(self.keys) // 2


def answers_in(rule: Rule, rows: np.ndarray) -> Answers:
    """The answers in rows of ids (B, T + 1); those below 0 could not be read, and have none."""
    assert rule.train_on == "last"
    mask = conversations.trained(rule, rows)
    of_target = np.full(mask.shape, -1, dtype=np.int64)
    keys: list[int] = []
    for row, flags, numbers in zip(rows, mask, of_target, strict=True):
        for start, stop in conversations.places_of(rule, row):
            # Target t is the id t + 1.
            place = slice(max(start - 1, 0), stop - 1)
            numbers[place][flags[place]] = len(keys)
            keys.append(_key(row[start:stop]))
        assert len(keys) % 2 == 0, "a row has whole pairs"
    return Answers(of_target, np.array(keys, dtype=KEY))


def _key(ids: np.ndarray) -> int:
    digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=KEY.itemsize).digest()
    return int.from_bytes(digest, "little")


def pairs_of(manifest: Manifest, shard: Shard) -> Iterator[np.ndarray]:
    """Yields the ids of each pair of a shard, those of its two conversations joined.

    Raises:
        DataError: the shard, or the dataset's tokenizer, is missing or damaged.
    """
    each = conversations.conversations_of(manifest, shard)
    for chosen, rejected in zip(each, each, strict=True):
        yield np.concatenate([chosen, rejected])


class PairEncoder:
    """Encodes pairs with the chat template of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, chat: Chat):
        self._most, self._template = chat.row_tokens, Template.of(tokenizer)
        self._rule = conversations.rule(tokenizer)

    def __call__(self, text: str) -> tuple[np.ndarray, bool]:
        """The ids of a pair (`text.preferences`), its two conversations joined, and False: a pair
        is never cut.

        Raises:
            Unlabelled: the pair does not fit in a row.
            BadRow: the template refuses it, the rule finds other answers in it, or both answers
                have the same ids.
        """
        both = []
        for turns in preferences.pair_of(text):
            found = self._template.encode(turns)
            conversations.refuse_ambiguous(self._rule, found)
            both.append(found.ids)
        chosen, rejected = both
        if np.array_equal(chosen, rejected):
            what = "'chosen' and 'rejected' have the same tokens"
            raise BadRow("equal answers", what, "fix the row")
        if len(chosen) + len(rejected) > self._most:
            raise Unlabelled(
                f"its {len(chosen):,} and {len(rejected):,} tokens do not fit in a row of "
                f"{self._most:,}",
                "raise data.row_tokens (in jobs/finetune.py: seq_len)",
                "longer than a row",
            )
        return np.concatenate(both), False
