"""Converts tokenizers to and from the tokenizer.json of Hugging Face's libraries."""

import dataclasses
import itertools
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from manta import foreign
from manta.config import Natural
from manta.errors import CheckpointError, DataError
from manta.text.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    byte_of_character,
    checked,
    r50k_pat_str,
)


def to_json(tokenizer: Tokenizer) -> str:
    """Writes the same encoding as a tokenizer.json."""
    shown = {byte: character for character, byte in byte_of_character().items()}
    names = {token: "".join(shown[byte] for byte in token) for token in tokenizer.ranks}
    vocabulary = {names[token]: rank for token, rank in tokenizer.ranks.items()}
    merges = []
    for token in sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__):
        if len(token) > 1:
            left, right = halves(token, tokenizer.ranks)
            merges.append((names[left], names[right]))
    # ignore_merges: tiktoken checks whether a whole word is a token before it merges anything.
    made = FastTokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    assert made.token_to_id(END_OF_TEXT) == tokenizer.eot
    return made.to_str()


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes this one: the result of byte-pair encoding on its bytes with
    all earlier merges. Raises CheckpointError if there is no such merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[at] >= ranks[token]:
            raise CheckpointError(
                f"the tokenizer's token {ranks[token]} is not made of two earlier ones, and other "
                "software has no such token; train with a tokenizer of another origin"
            )
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@dataclasses.dataclass
class _Model:
    vocab: dict[str, Natural]
    type: str = "BPE"
    merges: list[str | tuple[str, str]] = dataclasses.field(default_factory=list)
    dropout: float | None = None
    byte_fallback: bool | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


@dataclasses.dataclass
class _Added:
    id: Natural
    content: str


@dataclasses.dataclass
class _File:
    """The parts of a tokenizer.json that decide its tokens."""

    model: _Model
    added_tokens: list[_Added] | None = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


def from_json(data: bytes, where: str) -> Tokenizer:
    """Reads a tokenizer.json that is a byte-level BPE whose ids are in the order of its merges (as
    GPT-2's is, and those that Manta writes).

    Raises:
        DataError: it is not such a tokenizer; the message says why.
    """
    try:
        content = foreign.parse(data, _File)
    except ValueError as e:
        raise DataError(f"{where}: not a tokenizer.json ({e}); restore the file") from None
    model = content.model
    byte_of = byte_of_character()
    special = {token.content: token.id for token in content.added_tokens or []}
    plain = {name: rank for name, rank in model.vocab.items() if name not in special}
    if model.type != "BPE" or not all(set(name) <= byte_of.keys() for name in plain):
        raise DataError(
            f"{where}: a {foreign.line(model.type)} tokenizer that is not byte-level; Manta reads "
            "byte-level BPE (GPT-2's, and those that Manta writes)"
        )
    for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if value := getattr(model, key):
            raise DataError(
                f"{where}: model.{key}={foreign.line(repr(value))}; Manta reads only tokenizers "
                "without it"
            )
    if content.normalizer is not None:
        raise DataError(f"{where}: it normalizes text; Manta reads only tokenizers that do not")
    ranks = {bytes(map(byte_of.__getitem__, name)): rank for name, rank in plain.items()}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{where}: its {len(ranks)} ids are not 0 to {len(ranks) - 1}")
    if [special.get(END_OF_TEXT)] != list(special.values()) or special[END_OF_TEXT] != len(ranks):
        raise DataError(
            f"{where}: its special tokens are {foreign.line(str(special))}; Manta needs exactly "
            f"one, {END_OF_TEXT}, with the last id"
        )
    # Two merges may make the same token; the first one gives it its id.
    pairs = [pair.partition(" ")[::2] if isinstance(pair, str) else pair for pair in model.merges]
    merged = list(dict.fromkeys(left + right for left, right in pairs))
    in_order = sorted((name for name in plain if len(name) > 1), key=plain.__getitem__)
    if merged != in_order:
        raise DataError(
            f"{where}: its {len(merged)} merges do not make its {len(in_order)} tokens of several "
            "bytes in the order of their ids; Manta reads only tokenizers whose merges do"
        )
    patterns = _patterns(content.pre_tokenizer)
    if len(patterns) != 1 or patterns[0] is None:
        raise DataError(f"{where}: it splits text in a way that Manta does not know")
    name = "r50k_base" if len(ranks) == 50256 else f"bpe-{len(ranks) + 1}"
    try:
        return checked(name, patterns[0], ranks, len(ranks))
    except ValueError as e:
        raise DataError(f"{where}: Manta cannot use this tokenizer ({e})") from None


def _patterns(splitter: Any) -> list[str | None]:
    """The regular expressions that split text into words, one after the other; None for a rule that
    Manta does not know."""
    match splitter:
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return [pattern for part in parts for pattern in _patterns(part)]
        case {"type": "ByteLevel"} if not splitter.get("add_prefix_space"):
            # GPT-2's expression is built in.
            return [r50k_pat_str] if splitter.get("use_regex", True) else []
        case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(pattern)}}:
            return [None if splitter.get("invert") else pattern]
    return [None]
