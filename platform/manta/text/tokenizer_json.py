"""Converts tokenizers to and from the tokenizer.json of Hugging Face's libraries."""

import itertools
import json
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from manta.errors import DataError
from manta.text.tokenizer import END_OF_TEXT, Tokenizer, byte_of_character, r50k_pat_str


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
    all earlier merges."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        assert pairs[at] < ranks[token], "a token that no merges make"
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def from_json(data: bytes, where: str) -> Tokenizer:
    """Reads a tokenizer.json that is a byte-level BPE whose ids are in the order of its merges (as
    GPT-2's is, and those that Manta writes).

    Raises:
        DataError: it is not such a tokenizer; the message says why.
    """
    try:
        content = json.loads(data)
        model = content["model"]
        vocabulary: dict[str, int] = model["vocab"]
        added = content.get("added_tokens") or []
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{where}: not a tokenizer.json ({e!r}); restore the file") from None
    kind = model.get("type", "BPE")
    byte_of = byte_of_character()
    special = {token["content"]: token["id"] for token in added}
    plain = {name: rank for name, rank in vocabulary.items() if name not in special}
    if kind != "BPE" or not all(set(name) <= byte_of.keys() for name in plain):
        raise DataError(
            f"{where}: a {kind} tokenizer that is not byte-level; Manta reads byte-level BPE "
            "(GPT-2's, and those that Manta writes)"
        )
    if content.get("normalizer") is not None:
        raise DataError(f"{where}: it normalizes text; Manta reads only tokenizers that do not")
    ranks = {bytes(map(byte_of.__getitem__, name)): rank for name, rank in plain.items()}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{where}: its {len(ranks)} ids are not 0 to {len(ranks) - 1}")
    if [special.get(END_OF_TEXT)] != list(special.values()) or special[END_OF_TEXT] != len(ranks):
        raise DataError(
            f"{where}: its special tokens are {special}; Manta needs exactly one, {END_OF_TEXT}, "
            "with the last id"
        )
    pattern = _pattern(content.get("pre_tokenizer"))
    if pattern is None:
        raise DataError(f"{where}: it splits text in a way that Manta does not know")
    name = "r50k_base" if len(ranks) == 50256 else f"bpe-{len(ranks) + 1}"
    return Tokenizer(name, pattern, ranks, len(ranks))


def _pattern(splitter: Any) -> str | None:
    """The regular expression that splits text into words; None if Manta does not know the rule."""
    if splitter is None:
        return None
    if splitter["type"] == "Sequence":
        patterns = [_pattern(part) for part in splitter["pretokenizers"]]
        return next((p for p in patterns if p is not None), None)
    if splitter["type"] == "ByteLevel" and not splitter.get("add_prefix_space"):
        return r50k_pat_str if splitter.get("use_regex", True) else None  # GPT-2's is built in
    if splitter["type"] == "Split" and splitter.get("behavior") == "Isolated":
        return splitter["pattern"].get("Regex")
    return None
