"""Converts tokenizers to and from the tokenizer.json of Hugging Face's libraries."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.normalizers import NFC

from manta import foreign
from manta.config import Natural
from manta.errors import DataError
from manta.text.tokenizer import Tokenizer, byte_of_character, checked, r50k_pat_str
from manta.text.tokenizer_extras import (
    END_OF_TEXT,
    GPT2_DIGITS,
    Added,
    Extras,
    only,
    usual_ids,
    usual_names,
)

# The names of tokens that end a document in published models, where their configs name another
# one, which ends a turn of a chat: GPT-2, Qwen and SmolLM2; Llama 3.
END_OF_DOCUMENT = (END_OF_TEXT, "<|end_of_text|>")


def to_json(tokenizer: Tokenizer) -> str:
    """Writes the same encoding as a tokenizer.json."""
    extras, ranks = tokenizer.extras, tokenizer.ranks
    names = shown(tokenizer)
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    last = max(ranks.values())
    vocabulary |= {token.content: token.id for token in extras.added if token.id < last}
    found = merges(tokenizer)
    # ignore_merges: tiktoken checks whether a whole word is a token before it merges anything. That
    # makes a difference for tokens that no merges make, and otherwise only for a word that spells
    # a special token.
    by_itself = len(found) < sum(len(token) > 1 for token in ranks)
    made = FastTokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(names[left], names[right]) for left, right in found],
            ignore_merges=by_itself or len(vocabulary) == len(ranks),
        )
    )
    if extras.normalization is not None:
        made.normalizer = NFC()
    if tokenizer.pattern == GPT2_DIGITS:
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        first = pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated")
        second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([first, second])
    made.decoder = decoders.ByteLevel()
    for special, group in itertools.groupby(extras.added, lambda token: token.special):
        tokens = [
            AddedToken(token.content, normalized=token.normalized, special=special)
            for token in group
        ]
        (made.add_special_tokens if special else made.add_tokens)(tokens)
    for token in extras.added:
        assert made.token_to_id(token.content) == token.id, token
    if extras.bos is not None:
        bos = next(token.content for token in extras.added if token.id == extras.bos)
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, extras.bos)]
        )
    return made.to_str()


def shown(tokenizer: Tokenizer) -> dict[bytes, str]:
    """The name of each token that merges make, as ByteLevel shows it, in the order of the ids."""
    characters = {byte: character for character, byte in byte_of_character().items()}
    ordered = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    return {token: "".join(characters[byte] for byte in token) for token in ordered}


def merges(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """The merges, in the order of the ids of what they make. Some tokenizers have tokens that no
    merges make (Llama 3), which only a whole word becomes."""
    ranks = tokenizer.ranks
    ordered = sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__)
    return [pair for token in ordered if (pair := halves(token, ranks)) is not None]


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens whose merge makes this one: the result of byte-pair encoding on its bytes with
    all earlier merges. None if these do not come to two tokens."""
    parts = [token[i : i + 1] for i in range(len(token))]
    if any(part not in ranks for part in parts):
        return None
    rank = ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[at] >= rank:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@dataclasses.dataclass
class _Model:
    vocab: dict[str, Natural]
    type: str = "BPE"
    merges: list[str | tuple[str, str]] = dataclasses.field(default_factory=list)
    dropout: float | None = None
    unk_token: str | None = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


@dataclasses.dataclass
class _Added:
    id: Natural
    content: str
    special: bool = True
    normalized: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclasses.dataclass
class _File:
    """The parts of a tokenizer.json that decide its tokens."""

    model: _Model
    added_tokens: list[_Added] | None = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Roles:
    """What the files next to a tokenizer.json say of its tokens (`Extras` has the same fields)."""

    names: dict[str, str] = dataclasses.field(default_factory=dict)
    ids: dict[str, Natural | list[Natural]] = dataclasses.field(default_factory=dict)
    generation_ids: dict[str, Natural | list[Natural]] = dataclasses.field(default_factory=dict)
    chat_template: str | dict[str, str] | None = None
    add_bos: bool | None = None
    """Whether a text begins with the token bos; None: as tokenizer.json says."""


NO_ROLES = Roles()


def from_json(data: bytes, where: str, roles: Roles = NO_ROLES) -> Tokenizer:
    """Reads a tokenizer.json that is a byte-level BPE whose ids are in the order of its merges:
    GPT-2's, Llama 3's, Qwen's, SmolLM2's, and those that Manta writes.

    Raises:
        DataError: it is not such a tokenizer; the message says why.
    """
    try:
        content = foreign.parse(data, _File)
    except ValueError as e:
        raise DataError(f"{where}: not a tokenizer.json ({e}); restore the file") from None
    added = sorted(content.added_tokens or [], key=lambda token: token.id)
    ranks = _ranks(content.model, {token.content for token in added}, where)
    for key, value in _unknown(content, len(ranks)):
        raise DataError(
            f"{where}: {key}={foreign.line(repr(value))}; Manta reads only tokenizers without it"
        )
    if sorted([*ranks.values(), *(token.id for token in added)]) != list(
        range(len(ranks) + len(added))
    ):
        raise DataError(
            f"{where}: the ids of its {len(ranks)} tokens and {len(added)} added tokens are not 0 "
            f"to {len(ranks) + len(added) - 1}, each once"
        )
    _check_merges(content.model, ranks, where)
    patterns = _patterns(content.pre_tokenizer)
    if len(patterns) != 1 or patterns[0] is None:
        raise DataError(f"{where}: it splits text in a way that Manta does not know")
    eot = _end_of_document(added, roles, where)
    extras = _extras(content, added, eot, roles, where)
    size = len(ranks) + len(added)
    name = "r50k_base" if extras is None and size == 50257 else f"bpe-{size}"
    try:
        return checked(name, patterns[0], ranks, eot, extras)
    except ValueError as e:
        raise DataError(f"{where}: Manta cannot use this tokenizer ({e})") from None


def _ranks(model: _Model, added: set[str], where: str) -> dict[bytes, int]:
    """The ids of the tokens that are not added ones."""
    byte_of = byte_of_character()
    plain = {name: rank for name, rank in model.vocab.items() if name not in added}
    if model.type != "BPE" or not all(set(name) <= byte_of.keys() for name in plain):
        raise DataError(
            f"{where}: a {foreign.line(model.type)} tokenizer that is not byte-level; Manta reads "
            "byte-level BPE (GPT-2's, Llama 3's, Qwen's, SmolLM2's, and those that Manta writes)"
        )
    return {bytes(map(byte_of.__getitem__, name)): rank for name, rank in plain.items()}


def _unknown(content: _File, tokens: int) -> list[tuple[str, Any]]:
    """The settings that Manta does not have, and their values."""
    model, found = content.model, []
    for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if value := getattr(model, key):
            found.append((f"model.{key}", value))
    if model.unk_token is not None and tokens and not _has_all_bytes(model):
        found.append(("model.unk_token", model.unk_token))
    if content.normalizer not in (None, {"type": "NFC"}):
        found.append(("normalizer", content.normalizer))
    for token in content.added_tokens or []:
        for key in ("single_word", "lstrip", "rstrip"):
            if not token.special and getattr(token, key):
                found.append((f"added_tokens: {token.content!r} with {key}", True))
    return found


def _has_all_bytes(model: _Model) -> bool:
    return byte_of_character().keys() <= model.vocab.keys()


def _check_merges(model: _Model, ranks: dict[bytes, int], where: str) -> None:
    """Raises DataError unless tiktoken, which merges whatever gives a token, lowest id first, gives
    the tokens that these merges give.

    That is so if each token is made by one of them, in the order of the ids: the one that is left
    when all earlier ones have been applied to the token's bytes. (Others that make the same token
    then never find their two parts side by side.) A token that none makes is for whole words only,
    which both look up first if `ignore_merges` is set.
    """
    byte_of = byte_of_character()
    places: dict[tuple[bytes, bytes], int] = {}
    for place, merge in enumerate(model.merges):
        left, right = merge.partition(" ")[::2] if isinstance(merge, str) else merge
        if set(left + right) <= byte_of.keys():
            pair = (bytes(map(byte_of.__getitem__, left)), bytes(map(byte_of.__getitem__, right)))
            places.setdefault(pair, place)
    wrong = sum(left + right not in ranks for left, right in places)
    wrong += len({merge if isinstance(merge, str) else " ".join(merge) for merge in model.merges})
    wrong -= len(places)
    last = -1
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = halves(token, ranks)
        if parts is None and model.ignore_merges:
            continue
        place = places.get(parts, -1) if parts else -1
        wrong += place <= last
        last = max(place, last)
    if wrong:
        raise DataError(
            f"{where}: its {len(model.merges)} merges do not make its tokens of several bytes in "
            f"the order of their ids ({wrong} do not); Manta reads only tokenizers whose merges do"
        )


def _patterns(splitter: Any) -> list[str | None]:
    """The regular expressions that split text into words, one after the other; None for a rule that
    Manta does not know."""
    match splitter:
        case {"type": "Sequence", "pretokenizers": [{"type": "Digits"} as digits, second]}:
            known = digits.get("individual_digits") and _patterns(second) == [r50k_pat_str]
            return [GPT2_DIGITS if known else None]
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return [pattern for part in parts for pattern in _patterns(part)]
        case {"type": "ByteLevel"} if not splitter.get("add_prefix_space"):
            # GPT-2's expression is built in.
            return [r50k_pat_str] if splitter.get("use_regex", True) else []
        case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(pattern)}}:
            return [None if splitter.get("invert") else pattern]
    return [None]


def _end_of_document(added: list[_Added], roles: Roles, where: str) -> int:
    """The id of the token that ends a document."""
    special = {token.content: token.id for token in added if token.special}
    for name in END_OF_DOCUMENT:
        if name in special:
            return special[name]
    named = roles.names.get("eos_token", "")
    ids = roles.ids.get("eos_token_id")
    if named in special or (isinstance(ids, int) and ids in special.values()):
        return special.get(named, ids if isinstance(ids, int) else 0)
    listed = ", ".join(list(special)[:8]) or "none"
    raise DataError(
        f"{where}: no token that ends a document: its special tokens ({foreign.line(listed)}) have "
        f"none of {', '.join(END_OF_DOCUMENT)}, and eos_token in tokenizer_config.json names none"
    )


def _extras(
    content: _File, added: list[_Added], eot: int, roles: Roles, where: str
) -> Extras | None:
    """All that the tokenizer has next to its merges; None if that is one special token alone."""
    tokens = tuple(
        Added(token.content, token.id, token.special, token.normalized and not token.special)
        for token in added
    )
    ids = {token.content: token.id for token in tokens}
    lacking = [f"{key}={name!r}" for key, name in roles.names.items() if name not in ids]
    if lacking:
        raise DataError(
            f"{where}: {foreign.line(', '.join(lacking))} in tokenizer_config.json is none of its "
            "added tokens; get the files again"
        )
    ends = {ids[roles.names["eos_token"]]} if "eos_token" in roles.names else set()
    given = [_of_added(kept, set(ids.values())) for kept in (roles.ids, roles.generation_ids)]
    for kept in given:
        end = kept.get("eos_token_id", [])
        ends |= {end} if isinstance(end, int) else set(end)
    found = Extras(
        tokens,
        None if content.normalizer is None else "NFC",
        _bos(content.post_processor, ids, roles, where),
        tuple(sorted(ends - {eot})),
        roles.names,
        given[0],
        given[1],
        roles.chat_template,
    )
    parts = {*roles.names.values(), END_OF_TEXT}
    numbers = [number for kept in given for number in kept.values()]
    is_plain = len(parts) == 1 and all(number in (eot, [eot]) for number in numbers)
    bare = dataclasses.replace(found, names={}, ids={}, generation_ids={})
    usual = usual_ids(bare, eot)
    padded = {**usual, "pad_token_id": eot}
    if [found.names, *given] == [usual_names(bare, eot), usual, padded]:  # Manta wrote it
        found = bare
    is_last = eot == len(content.model.vocab.keys() - ids.keys())
    return None if is_plain and is_last and bare == only(eot) else found


def _of_added(ids: Mapping[str, int | list[int]], known: set[int]) -> dict[str, int | list[int]]:
    """The ids of added tokens among these. Configs that were made without a tokenizer have others
    (transformers' Llama has 1 and 2)."""
    found: dict[str, int | list[int]] = {}
    for key, given in ids.items():
        kept = [token for token in ([given] if isinstance(given, int) else given) if token in known]
        if kept:
            found[key] = kept[0] if isinstance(given, int) else kept
    return found


def _bos(processor: Any, ids: Mapping[str, int], roles: Roles, where: str) -> int | None:
    """The id of the token that is put before a text, if any."""
    if roles.add_bos is not None:  # transformers then makes a processor of its own
        return ids.get(roles.names.get("bos_token", "")) if roles.add_bos else None
    before, after = _around(processor)
    unknown = [name for name in before if name not in ids]
    if unknown or after or len(before) > 1:
        shown = " ".join([*map(str, before), "TEXT", *map(str, after)])
        raise DataError(
            f"{where}: post_processor makes {foreign.line(shown)} of a text; Manta reads "
            "tokenizers that put at most one special token before a text"
        )
    return ids[before[0]] if before else None


def _around(processor: Any) -> tuple[list[str], list[str]]:
    """The names of the tokens that are put before and after a text."""
    match processor:
        case None | {"type": "ByteLevel"}:
            return [], []
        case {"type": "Sequence", "processors": list(parts)}:
            found = [_around(part) for part in parts]
            # A later one puts its tokens around those of an earlier one.
            before = [name for names, _ in reversed(found) for name in names]
            return before, [name for _, names in found for name in names]
        case {"type": "TemplateProcessing", "single": list(pieces)}:
            names = [
                str(piece["SpecialToken"].get("id")) if "SpecialToken" in piece else None
                for piece in pieces
                if isinstance(piece, dict)
            ]
            if names.count(None) == 1:
                at = names.index(None)
                return [str(n) for n in names[:at]], [str(n) for n in names[at + 1 :]]
    kind = processor.get("type") if isinstance(processor, dict) else processor
    return [], [str(kind)]
