"""Tokenizers: any text comes back from its tokens; windows and pieces change no id; r50k_base."""

import base64
import hashlib
import itertools
import json
import os
import random
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from manta import layout
from manta.errors import DataError
from manta.text import tokenizer, tokenizer_r50k
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import END_OF_TEXT

few = settings(deadline=None, max_examples=25)
HOSTILE = (
    "<|endoftext|> ﷺ 👩‍👩‍👧 e\u0301 \0\x7f\t\r\n \u00a0\u2003\u3000 \ufffd\U0010ffff it's 1234"
)

# --- tokenizers ----------------------------------------------------------------------------------

CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 20,
    "def read(path):\n    return open(path).read()\n\n" * 20,
    "Größe, naïve café, 東京 and 🦊🦊🦊; it's 1234 and 12.5\n" * 20,
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tokenizer.train(CORPUS, 340)


@few
@given(st.text())
@example("")
@example(HOSTILE)
@example("<|endoftext|>")
@example("<|endoftext|>" * 3)
@example(" " * 100_000 + "x")
@example("\n" * 100_000)
@example("\0" * 1000)
@example("a" * 100_000)
@example("🦊" * 1000)
def test_any_text_comes_back_from_its_tokens(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.eot not in ids
    assert int(trained.token_bytes()[ids].sum()) == len(text.encode())
    assert "".join(trained.stream(ids)) == text


WORD = [
    "a",
    "ab",
    "é",
    "東",
    "🦊",
    " ",
    "\n",
    " \t",
    "1",
    "-",
    "'",
    "'s",
    "'ll",
    "--'",
    " the",
    "\u3000",
]
WORDS = st.lists(
    st.builds(lambda word, count: word * count, st.sampled_from(WORD), st.integers(1, 60)),
    max_size=12,
).map("".join)


@settings(few, max_examples=200)
@given(WORDS | st.text(), st.sampled_from([1, 16, 40]))
@example("<|endoftext|>" * 20, 16)
@example("-" * 32 + "'s-'s" * 20, 40)
@example("x" + " " * 37 + "word", 40)
def test_windows_change_no_id(trained: Tokenizer, text: str, window: int) -> None:
    whole = trained.encode_array(text)
    assert whole.dtype == trained.dtype == np.uint16
    assert whole.tolist() == trained.encode(text) == trained._encoding.encode_ordinary(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "WINDOW", window)
        assert trained.encode(text) == whole.tolist()


@pytest.mark.parametrize("window", range(20, 125, 3))
def test_windows_change_no_id_where_an_end_decides_all_before_it(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = string.ascii_letters  # from the right, two by two: an odd window shifts all pairs
    pairs = ["".join(pair) for pair in itertools.pairwise(letters)][::-1]
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {pair.encode(): 256 + i for i, pair in enumerate(pairs)}
    made = Tokenizer("pairs", r50k_pat_str, ranks, eot=len(ranks))
    text = letters * 9
    whole = made.encode(text)
    monkeypatch.setattr(tokenizer, "WINDOW", window)
    assert made.encode(text) == whole


@pytest.mark.parametrize("word", ["a", "\0", "\n", "-", "1", "ab ", "東"])
def test_a_long_word_has_the_ids_it_has_in_one_piece(trained: Tokenizer, word: str) -> None:
    text = "the " + word * 300_000
    assert trained.encode(text) == trained._encoding.encode_ordinary(text)


def test_half_of_a_surrogate_pair_is_encoded_as_replaced(trained: Tokenizer) -> None:
    assert trained.encode("a\ud83db") == trained.encode("a\ufffdb")


def test_the_largest_uint16_is_never_an_id() -> None:
    tokens = [bytes([i]) for i in range(256)] + [bytes(pair) for pair in np.ndindex(255, 256)]
    ranks = {token: rank for rank, token in enumerate(tokens[:65535])}
    large = Tokenizer("large", "a", ranks, eot=65535)
    assert (large.vocab_size, large.dtype) == (65536, np.uint32)
    del ranks[tokens[65534]]
    small = Tokenizer("small", "a", ranks, eot=65534)
    assert (small.vocab_size, small.dtype) == (65535, np.uint16)


def test_a_million_spaces_before_a_word_come_back(trained: Tokenizer) -> None:
    text = " " * 1_000_001 + "word"
    assert trained.decode(trained.encode(text)) == text


@few
@given(st.lists(st.integers(0, 339)))
def test_streamed_text_joins_to_the_decoded_whatever_the_ids(
    trained: Tokenizer, ids: list[int]
) -> None:
    pieces = list(trained.stream(ids))
    assert "".join(pieces) == trained.decode(ids)
    assert len(pieces) == len(ids) + 1


def test_streamed_text_has_whole_characters_only(trained: Tokenizer) -> None:
    ids = trained.encode("x🐟")  # the corpus has no fish, so its bytes are separate tokens
    assert len(ids) > 3
    assert [piece for piece in trained.stream(ids) if piece] == ["x", "🐟"]


def test_end_of_text_is_the_last_id_and_stands_for_no_bytes(trained: Tokenizer) -> None:
    assert trained.eot == trained.vocab_size - 1 == 339
    assert trained.token_bytes()[trained.eot] == 0
    assert trained.token_bytes()[: trained.eot].min() == 1
    assert trained.decode([trained.eot]) == END_OF_TEXT


def test_training_twice_gives_the_same_tokenizer(trained: Tokenizer) -> None:
    assert tokenizer.train((text for text in CORPUS), 340).sha256 == trained.sha256
    assert tokenizer.train(CORPUS, 339).sha256 != trained.sha256
    # in another process, with one thread and another order of sets
    code = (
        "import json, sys; from manta.text import tokenizer; "
        "print(tokenizer.train(json.load(sys.stdin), 340).sha256)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
        | {"PYTHONPATH": str(Path(tokenizer.__file__).parents[2])},
        input=json.dumps(CORPUS),
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert done.stdout.strip() == trained.sha256


@few
@given(st.sampled_from(["ab", "ab ", "a \n", "aé😀", "a1'"]), st.integers(0, 2**32), st.data())
def test_tokens_are_those_of_the_trainers_own_encoding(
    alphabet: str, seed: int, data: st.DataObject
) -> None:
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Peer
    from tokenizers.decoders import ByteLevel

    text = "".join(random.Random(seed).choices(alphabet, k=data.draw(st.integers(1, 400))))
    vocab_size = data.draw(st.integers(257, 420))
    peer = Peer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r50k_pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    peer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    peer.train_from_iterator([text], trainer)

    made = tokenizer.train([text], vocab_size)
    assert made.vocab_size == peer.get_vocab_size() + 1 <= vocab_size
    assert made.encode(text) == peer.encode(text).ids
    for token in range(peer.get_vocab_size()):
        assert made.decode([token]) == peer.decode([token])


@few
@given(WORDS, st.integers(1, 30))
def test_the_trainer_gets_the_words_of_a_long_text(text: str, size: int) -> None:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r50k_pat_str), "isolated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "TRAINED_TEXT", size)
        pieces = list(tokenizer._pieces([text]))
    words = [word for piece in pieces for word, _ in split.pre_tokenize_str(piece)]
    assert words == [word for word, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize("word", ["a", "\n", "-", "ab"])
def test_a_trainer_is_given_long_words_in_pieces(word: str) -> None:
    text = "the quick " + word * 500_000 + " fox "
    pieces = list(tokenizer._pieces([text, "x"]))
    assert "".join(pieces) == text + "x"
    assert max(map(len, pieces)) < 1100
    assert tokenizer.train([text], 300).vocab_size > 257


def test_a_vocabulary_is_no_larger_than_the_text_allows() -> None:
    assert tokenizer.train(["ab"], 4096).vocab_size == 258
    assert tokenizer.train([], 4096).vocab_size == 257


def test_a_tokenizer_comes_back_from_its_file(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / layout.ENCODING
    file.write_bytes(trained.serialized)
    for back in (tokenizer.from_bytes(trained.serialized), tokenizer.load(str(file))):
        assert back.serialized == trained.serialized
        assert back.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert (back.name, back.eot, back.vocab_size) == ("bpe-340", 339, 340)
        assert back.encode(HOSTILE) == trained.encode(HOSTILE)
        assert (back.token_bytes() == trained.token_bytes()).all()


def test_a_tokenizer_is_made_once(trained: Tokenizer) -> None:
    data = trained.serialized
    assert tokenizer.from_bytes(bytes(bytearray(data))) is tokenizer.from_bytes(data)


def test_a_missing_or_damaged_tokenizer_is_named(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "encoding.json"
    with pytest.raises(DataError, match=r"encoding\.json: no such file"):
        tokenizer.load(str(file))
    for content in (b"", b"{}", b"[]", b"3", b"\xff", trained.serialized[:-5]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"encoding\.json: not a tokenizer of Manta's"):
            tokenizer.load(str(file))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eot": 5}, "eot=5: also the id of a token; it should be 339"),
        ({"eot": 1 << 40}, "eot=1099511627776: beyond the ids"),
        ({"eot": "x"}, "eot='x': should be a valid integer"),
        ({"pattern": "zzz"}, "pattern='zzz': it loses parts of a text"),
        ({"pattern": r"\S+|\s+(?=\s)| "}, "it loses parts of a text"),  # a line end before a word
        ({"pattern": "("}, "tiktoken refuses it"),
        ({"tokens": ["*"]}, "not base64"),
        ({"tokens": ["IQ==", "IQ=="]}, "the same as token 0"),
        ({"tokens": ["IQ=="]}, "no token for byte 0"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused(
    change: dict[str, Any], words: str, trained: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "encoding.json"
    file.write_text(json.dumps({**json.loads(trained.serialized), **change}))
    with pytest.raises(DataError, match=r"encoding\.json: not a tokenizer of Manta's") as caught:
        tokenizer.load(str(file))
    assert words in str(caught.value)


def test_a_tokenizer_of_another_format_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "encoding.json"
    file.write_bytes(trained.serialized.replace(b"manta-bpe-1", b"manta-bpe-2"))
    with pytest.raises(DataError, match=r"encoding\.json: not a tokenizer of Manta's"):
        tokenizer.load(str(file))


# --- r50k_base -----------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tiktoken cache, and a proxy at which nothing answers."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def test_without_network_or_file_r50k_base_says_how_to_provide_it(offline: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer_file=PATH/r50k_base\.tiktoken"):
        tokenizer_r50k.named(tokenizer.R50K)


def test_a_wrong_or_missing_file_is_not_r50k_base(offline: Path, tmp_path: Path) -> None:
    file = tmp_path / "r50k_base.tiktoken"
    with pytest.raises(DataError, match="no such file"):
        tokenizer_r50k.named(tokenizer.R50K, str(file))
    file.write_bytes(base64.b64encode(b"a") + b" 0\n")
    with pytest.raises(DataError, match=r"not r50k_base\.tiktoken"):
        tokenizer_r50k.named(tokenizer.R50K, str(file))


def test_the_file_that_is_asked_for_is_the_one_that_tiktoken_checks() -> None:
    from tiktoken_ext.openai_public import r50k_base

    assert tokenizer_r50k.R50K_SHA256 in r50k_base.__code__.co_consts
    assert tokenizer_r50k._r50k_address().startswith("https://")


@few
@given(st.text())
@example(HOSTILE)
@example(" " * 1000 + "x\n\n\n  y")
@example("\n".join(CORPUS))
def test_r50k_base_is_tiktokens_own(r50k: tuple[Tokenizer, tiktoken.Encoding], text: str) -> None:
    ours, theirs = r50k
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


def test_r50k_base_has_gpt2s_ids(r50k: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, theirs = r50k
    assert (ours.vocab_size, ours.eot) == (theirs.n_vocab, theirs.eot_token) == (50257, 50256)
    assert ours.encode("Hello world") == [15496, 995]
    assert tokenizer.from_bytes(ours.serialized).encode(HOSTILE) == theirs.encode_ordinary(HOSTILE)


@pytest.fixture(scope="module")
def r50k(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tiktoken.Encoding]:
    """Our r50k_base from the file, and tiktoken's, which finds the file in its cache."""
    file = os.environ.get("MANTA_TEST_R50K")
    if not file:
        pytest.skip("MANTA_TEST_R50K does not name the file r50k_base.tiktoken")
    cache = tmp_path_factory.mktemp("cache")
    shutil.copy(file, cache / hashlib.sha1(tokenizer_r50k._r50k_address().encode()).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        theirs = tiktoken.get_encoding("r50k_base")
        ours = tokenizer_r50k.named(tokenizer.R50K, file)
        assert tokenizer_r50k.named(tokenizer.R50K).sha256 == ours.sha256
    return ours, theirs
