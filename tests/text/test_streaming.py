"""Text that comes bit by bit ends where it would end as a whole, wherever it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.text import tokenizer as tokenizers
from manta.text.streaming import TextStream, first, ids_before, until
from manta.text.tokenizer import Tokenizer

STOPS = ["", "\nUser:", "::", "x", "x\n", "ab", "abc", "b"]


@pytest.fixture(scope="module")
def made() -> Tokenizer:
    return tokenizers.train(["\nUser: abc x\n", "naïve 🐟 User: abc\n"] * 20, 300)


def ended(text: str, stops: list[str]) -> str:
    """The text before the stop that is complete after the fewest characters."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(
    texts=st.lists(st.text("\nUser: xabc", max_size=4), max_size=12),
    stops=st.lists(st.sampled_from(STOPS), max_size=4),
)
def test_text_ends_before_a_stop_wherever_it_is_cut(texts: list[str], stops: list[str]) -> None:
    assert "".join(until(iter(texts), stops)) == ended("".join(texts), stops)


@given(text=st.text("xab:\n", max_size=20), stops=st.lists(st.sampled_from(STOPS), max_size=4))
def test_what_is_told_is_never_taken_back_and_waits_only_for_a_stop(
    text: str, stops: list[str]
) -> None:
    told = ""
    for character, piece in zip(text, until(text, stops), strict=False):
        told += piece
        assert character is not None
    at = first(text, stops if "" not in stops else [s for s in stops if s])
    assert text.startswith(told)
    assert at is None or len(told) == at


@given(data=st.data())
def test_a_stream_of_ids_is_the_text_before_a_stop_and_its_ids_too(
    made: Tokenizer, data: st.DataObject
) -> None:
    """Ids of one character each, of words, and of parts of a character."""
    words = data.draw(st.lists(st.sampled_from([*"abcx:\n ", "naïve", "🐟", "User"]), max_size=12))
    stops = data.draw(st.lists(st.sampled_from([*STOPS, "🐟", "ï"]), max_size=3))
    ids = [id for word in words for id in made.encode(word)]
    stream, told = TextStream(made, stops), ""
    for id in ids:
        told += stream.add(id)
        if stream.is_over:
            break
    else:
        told += stream.end()
    expected = ended("".join(words), stops)
    assert told == expected
    kept = ids_before(made, ids, stops)
    assert made.decode(kept) == expected
    whole = next((n for n, (a, b) in enumerate(zip(ids, kept, strict=False)) if a != b), None)
    assert whole is None or whole >= len(kept) - len(made.encode("abc"))


def test_a_character_in_two_tokens_before_a_stop_stays_whole() -> None:
    """The second of them has the stop too."""
    whole = "桯".encode()
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {whole[:2]: 256, whole[2:] + b"ve": 257}
    tokenizer = Tokenizer("made", r"(?s:.+)", ranks, 258)
    kept = ids_before(tokenizer, [65, 256, 257], ["e"])
    assert tokenizer.decode(kept) == "A桯v"
    half = ids_before(tokenizer, [65, 257], ["e"])  # no token has the other half
    assert tokenizer.decode(half) == "A\ufffdv"


def test_half_a_character_waits_and_comes_in_the_end(made: Tokenizer) -> None:
    fish = made.encode("🐟")
    stream = TextStream(made)
    assert [stream.add(id) for id in fish[:-1]] == [""] * (len(fish) - 1)
    assert stream.end() == "�"
