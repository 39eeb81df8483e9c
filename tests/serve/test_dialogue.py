"""Conversations as ids: nothing is left out without a word, and ids that were generated stay."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pairs import chat_tokenizer
from manta.evaluate.chat import ByTemplate, ByTranscript
from manta.serve.dialogue import Answers, Dialogue, Exchange, split
from manta.serve.refusal import Refusal
from manta.text import tokenizer as tokenizers
from manta.text.conversations import Turn
from manta.text.tokenizer import Tokenizer

CHAT = chat_tokenizer()
PLAIN = tokenizers.train(["the cat and the dog\n", "User: Assistant:\n"] * 20, 270)


def dialogue(tokenizer: Tokenizer = CHAT, context: int = 256) -> Dialogue:
    form = ByTranscript(tokenizer) if tokenizer is PLAIN else ByTemplate(tokenizer, [])
    return Dialogue(form, tokenizer, context, Answers())


def talk(count: int, system: str = "", words: int = 3) -> list[Turn]:
    """A conversation of `count` questions, the last of which has no answer yet."""
    turns = [Turn("system", system)] if system else []
    for n in range(count):
        turns += [Turn("user", f"question {n} " + "cat " * words), Turn("assistant", f"answer {n}")]
    return turns[:-1]


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["template", "transcript"])
@pytest.mark.parametrize("system", ["", "Be kind."])
def test_the_ids_are_those_of_the_whole_text(tokenizer: Tokenizer, system: str) -> None:
    """Put together turn by turn, they are what the form makes of all turns at once."""
    made = dialogue(tokenizer, 4096)
    turns = talk(4, system)
    found = tokenizer.decode(made.prompt(turns, 16, "error").ids)
    form = ByTranscript(tokenizer) if tokenizer is PLAIN else ByTemplate(tokenizer, [])
    assert found == tokenizer.decode(form.whole(turns))


def test_ids_that_were_generated_are_not_encoded_again() -> None:
    made = dialogue()
    turns = [Turn("user", "Hi")]
    ids = [CHAT.encode(character)[0] for character in "x ray sea"]  # one by one: other ids
    text = CHAT.decode(ids)
    assert CHAT.encode(text) != ids
    made.keep(turns, text, ids)
    asked = [
        *turns,
        Turn("assistant", f"{text} "),
        Turn("user", "And?"),
    ]  # a client strips, or pads
    prompt = made.prompt(asked, 8, "error").ids
    before = made.prompt(turns, 8, "error").ids
    assert prompt[: len(before) + len(ids)] == (*before, *ids)
    edited = [*turns, Turn("assistant", f"{text}s"), Turn("user", "And?")]
    assert made.prompt(edited, 8, "error").ids[: len(before) + len(ids)] != (*before, *ids)


def test_answers_are_forgotten_in_order() -> None:
    answers = Answers(most=2)
    for n in range(3):
        answers.keep([Turn("user", str(n)), Turn("assistant", "a")], [n])
    assert answers.get([Turn("user", "0"), Turn("assistant", "a")]) is None
    assert answers.get([Turn("user", "2"), Turn("assistant", "a")]) == (2,)


@pytest.mark.parametrize("overflow", ["slide", "summarise"])
def test_a_chat_of_300_turns_with_a_small_context(overflow: str) -> None:
    """Every prompt fits, and each turn is in it or is named as left out."""
    made = dialogue(context=256)
    seen = set()
    for count in range(1, 301):
        turns = talk(count)
        prompt = made.prompt(turns, 32, overflow, lambda *_: "they talked")  # type: ignore[arg-type]
        assert len(prompt.ids) < 256
        text = CHAT.decode(prompt.ids)
        dropped = {each.turn for each in prompt.dropped}
        assert dropped == set(range(1, len(dropped) + 1))  # whole turns, the oldest first
        for number in range(1, count):
            assert (number in dropped) != (f"question {number - 1} " in text)
        assert bool(prompt.dropped) == bool(prompt.why)
        fresh = {each.turn for each in prompt.dropped if each.is_new}
        assert not fresh & seen  # a turn is said to be new once
        seen |= fresh
        if overflow == "summarise" and dropped:
            assert "they talked" in text and prompt.note
    assert seen == dropped


def test_a_chat_of_300_turns_is_refused_where_that_was_asked_for() -> None:
    made = dialogue(context=256)
    refused = 0
    for count in range(1, 301, 7):
        try:
            assert len(made.prompt(talk(count), 32, "error").ids) < 256
        except Refusal as e:
            refused += 1
            assert e.code == "context_length_exceeded" and "256" in e.message
    assert refused > 30


@pytest.mark.parametrize("overflow", ["slide", "summarise"])
def test_a_needle_is_read_or_named(overflow: str) -> None:
    """A fact in the first turn is in the prompt, or the answer says that it is not. One in the
    system's message is always there."""
    made = dialogue(context=256)
    turns = [
        Turn("system", "The word is swordfish."),
        Turn("user", "My name is Ada."),
        Turn("assistant", "Hello."),
        *talk(60),
    ]
    prompt = made.prompt(turns, 32, overflow, lambda *_: "a summary")  # type: ignore[arg-type]
    text = CHAT.decode(prompt.ids)
    assert "swordfish" in text
    assert "My name is Ada." not in text
    assert prompt.dropped[0].turn == 1 and prompt.dropped[0].question == "My name is Ada."


def test_the_window_stays_for_some_turns() -> None:
    """What is left out changes now and then, not with each turn: the beginning of the prompt is
    mostly that of the turn before, which is in the cache."""
    made = dialogue(context=256)
    starts = [len(made.prompt(talk(n), 32, "slide").dropped) for n in range(1, 101)]
    moves = sum(a != b for a, b in itertools.pairwise(starts))
    assert 5 < moves < 50
    assert starts == sorted(starts)


def test_summaries_build_on_each_other() -> None:
    made = dialogue(context=256)
    asked: list[tuple[int, ...]] = []

    def summary(starts: list[int], exchanges: list[Exchange], system: list[Turn]) -> str:
        asked.append(tuple(starts))
        return "all of it"

    made.prompt(talk(60), 32, "summarise", summary)  # type: ignore[arg-type]
    made.prompt(talk(61), 32, "summarise", summary)  # type: ignore[arg-type]
    assert asked[0][0] == 0 and len(asked[0]) > 2
    assert asked[1][: len(asked[0])] == asked[0]


def test_a_question_that_is_too_long_alone_is_refused() -> None:
    made = dialogue(context=64)
    turns = [*talk(2), Turn("assistant", "a"), Turn("user", "cat " * 200)]
    for overflow in ("error", "slide", "summarise"):
        with pytest.raises(Refusal) as found:
            made.prompt(turns, 8, overflow, lambda *_: "x")  # type: ignore[arg-type]
        assert found.value.code == "context_length_exceeded"


roles = st.lists(st.sampled_from(["system", "user", "assistant", "tool", "\x1b[2J"]), max_size=8)


@settings(max_examples=200)
@given(roles=roles)
def test_roles_are_in_order_or_are_refused(roles: list[str]) -> None:
    turns = [Turn(role, "x") for role in roles]
    rest = roles[1:] if roles[:1] == ["system"] else roles
    is_right = len(rest) % 2 == 1 and all(
        role == ("assistant" if n % 2 else "user") for n, role in enumerate(rest)
    )
    try:
        system, pairs, question = split(turns)
        assert is_right and question == "x" and len(system) + 2 * len(pairs) + 1 == len(turns)
    except Refusal as e:
        assert not is_right and "\x1b" not in e.message


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, max_tokens=st.integers(1, 300))
def test_what_fits_is_never_dropped(sizes: list[int], max_tokens: int) -> None:
    made = dialogue(context=256)
    turns: list[Turn] = []
    for n, size in enumerate(sizes):
        turns += [Turn("user", f"{n} " + "cat " * size), Turn("assistant", "yes")]
    turns = turns[:-1]
    prompt = made.prompt(turns, max_tokens, "slide")
    assert (
        len(prompt.ids) <= made.limit(max_tokens)
        or not prompt.dropped
        or len(prompt.dropped) == len(sizes) - 1
    )
    if not prompt.dropped:
        assert CHAT.decode(prompt.ids).count("cat") == sum(sizes)
