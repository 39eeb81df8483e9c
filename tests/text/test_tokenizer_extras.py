"""Splitting, normalization and special tokens of published models' tokenizers.

Parity with transformers is in tests/export/test_families.py.
"""

import dataclasses
import json
import pickle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from tokenizers import pre_tokenizers as splits

from manta.text import tokenizer, tokenizer_extras
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import GPT2_DIGITS, LLAMA3, QWEN, Added, Extras, Splitter, nfc

few = settings(deadline=None, max_examples=150)
PATTERNS = {"llama3": LLAMA3, "qwen": QWEN, "digits": GPT2_DIGITS, "unknown": r"\d{1,3}|\D+"}
WORDS = [
    "a",
    "ab",
    "é",
    "東",
    " ",
    "\n",
    "\r\n",
    " \t",
    "1",
    "12",
    "'s",
    "'ll",
    "-",
    ".\n\n",
    " the",
]
TEXTS = st.lists(
    st.builds(lambda word, count: word * count, st.sampled_from(WORDS), st.integers(1, 40)),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    text = "the 123 1234 dog's  \n\n\t--- .\n\n 12 the12 ab abab aa é 東東\r\n   x" * 20
    return tokenizer.train([text, "".join(WORDS) * 9], 340).ranks


@pytest.mark.parametrize("name", PATTERNS)
@given(text=TEXTS | st.text(), window=st.sampled_from([1, 16, 40]))
@example(text="1234567" * 30, window=16)
@example(text="x" + ".\n\n  \n" * 20 + "abc" * 60, window=40)
@few
def test_windows_change_no_id_whatever_splits_the_text(
    ranks: dict[bytes, int], name: str, text: str, window: int
) -> None:
    made = Tokenizer("made", PATTERNS[name], ranks, len(ranks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "WINDOW", window)
        assert made.encode(text) == made.tiktoken.encode_ordinary(text)


def test_a_long_text_is_encoded_in_windows_where_that_is_known_to_change_no_id(
    ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "WINDOW", 64)
    for name, pattern in PATTERNS.items():
        made, text = Tokenizer("made", pattern, ranks, len(ranks)), "the dog saw ab " * 60
        windows = list(made._windows(text))
        assert (len(windows) > 5) == (name != "unknown")


@given(
    st.text()
    | st.lists(st.sampled_from(["1", "٣", "½", "\U00011de1", " ", "\t", "a", ",", "'s"])).map(
        "".join
    )
)
@few
def test_each_digit_is_a_word_as_in_the_tokenizers_library(text: str) -> None:
    peer = splits.Sequence([splits.Digits(True), splits.ByteLevel(add_prefix_space=False)])
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    expected = [text[a:b] for _, (a, b) in peer.pre_tokenize_str(text)]
    one = {bytes([byte]): byte for byte in range(256)}
    found = Tokenizer(
        "bytes",
        GPT2_DIGITS,
        one
        | {
            word.encode(): 256 + i
            for i, word in enumerate(sorted({w for w in expected if len(w.encode()) > 1}))
        },
        256 + len({w for w in expected if len(w.encode()) > 1}),
    )
    assert [found.decode([i]) for i in found.encode(text)] == expected


@given(
    st.text()
    | st.lists(st.sampled_from(["e", "\u0301", "\u0338", ">", "\u1100", "\u1161", "a"])).map(
        "".join
    ),
    st.sampled_from([1, 3, 1 << 16]),
)
@few
def test_normalization_in_pieces_is_that_of_the_whole(text: str, size: int) -> None:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_extras, "NORMALIZED_AT_ONCE", size)
        assert nfc(text) == normalizers.NFC().normalize_str(text)


def extras_of(eot: int, **keys: Any) -> Extras:
    added = (
        Added("<|endoftext|>", eot),
        Added("<|im_end|>", eot + 1),
        Added("<think>", eot + 2, special=False),
        Added("<think>er", eot + 3, special=False),
        Added("e\u0301", eot + 4, special=False, normalized=True),
    )
    return dataclasses.replace(Extras(added, "NFC"), **keys)


def test_words_are_found_the_longest_first_and_special_tokens_are_not() -> None:
    split = Splitter(extras_of(100))
    text = "a<think>erb<think> <|im_end|>"
    assert list(split(text)) == ["a", 103, "b", 102, " <|im_end|>"]
    assert list(split("<think>\u0338caf\u00e9")) == [102, "\u0338caf", 104]
    assert list(split("")) == [""] or list(split("")) == []


def test_extras_are_kept_in_the_file_and_by_pickle(ranks: dict[bytes, int]) -> None:
    extras = extras_of(
        len(ranks), bos=len(ranks) + 1, ends=(len(ranks) + 1,), names={"eos_token": "<|im_end|>"},
        ids={"eos_token_id": [len(ranks)]}, chat_template="{{ messages }}",
    )  # fmt: skip
    made = Tokenizer("made", QWEN, ranks, len(ranks), extras)
    for back in (tokenizer.from_bytes(made.serialized), pickle.loads(pickle.dumps(made))):
        assert back.extras == extras and back.sha256 == made.sha256
        assert back.encode("x<think>1") == made.encode("x<think>1")
    assert json.loads(made.serialized)["format"] == "manta-bpe-2"
    plain = Tokenizer("made", QWEN, ranks, len(ranks))
    assert json.loads(plain.serialized)["format"] == "manta-bpe-1"
    assert "extras" not in json.loads(plain.serialized)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format="manta-bpe-1"), "format=manta-bpe-1: should be manta-bpe-2"),
        (lambda c: c["extras"]["added"].pop(0), "rise, and stay below|not the id of a special"),
        (lambda c: c["extras"]["added"][1].update(content="<|endoftext|>"), "that of another one"),
        (lambda c: c["extras"]["added"][1].update(content=""), "no content"),
        (lambda c: c["extras"]["added"][0].update(special=False), "not the id of a special token"),
        (lambda c: c["extras"].update(bos=1 << 40), "there is no id 1099511627776"),
        (lambda c: c["extras"].update(ends=[-1]), "extras.ends.0=-1"),
        (lambda c: c["extras"].update(names={"eos_token": "x"}), "names: eos_token is no added"),
        (lambda c: c["extras"].update(normalization="NFKC"), "extras.normalization='NFKC'"),
        (lambda c: c.update(eot=5), "eot=5: not the id of a special token"),
        (lambda c: c["tokens"].remove("YQ=="), "no token for byte 97"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_refused(ranks: dict[bytes, int], change: Any, words: str) -> None:
    made = Tokenizer("made", QWEN, ranks, len(ranks), extras_of(len(ranks)))
    content = json.loads(made.serialized)
    change(content)
    with pytest.raises(ValueError, match=words) as caught:
        tokenizer.from_bytes(json.dumps(content).encode())
    assert "\n" not in str(caught.value)


def test_bytes_without_a_token_are_lost_and_all_else_is_kept(ranks: dict[bytes, int]) -> None:
    some = [token for token in ranks if b"\0" not in token and b"\xf0" not in token]
    fewer = {token: place for place, token in enumerate(some)}
    eot = len(fewer)
    made = Tokenizer(
        "fewer", GPT2_DIGITS, fewer, eot, Extras((Added("<|endoftext|>", eot),), "NFC")
    )
    assert set(made.lacking) == {0, 0xF0}
    assert made.vocab_size == eot + 1
    assert max(made.encode("a\0b \U0001f41f c")) < made.vocab_size
    assert made.decode(made.encode("a\0b c")) == "ab c"
    assert tokenizer.from_bytes(made.serialized).encode("a\0b") == made.encode("a\0b")
