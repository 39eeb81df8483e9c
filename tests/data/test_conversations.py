"""The targets of packed conversations that are trained, against a mask that is built with them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.data.conversations import Rule, tokens_of, trained
from manta.model.targets import IGNORED
from manta.text import tokenizer
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import Added, Extras

few = settings(deadline=None, max_examples=40)
# Words that spell headers and end tokens, and words whose tokens may join a header's line end.
WORDS = ["a", "é", "\n", "  b", "assistant\n", "<|im_end|>", "### Response:\n", " 12", "user\n"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map("".join)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)


def tokenizer_with(names: list[str], bos: bool = False) -> Tokenizer:
    ranks = tokenizer.train(["assistant\nuser\n### Response:\n a b 12"] * 9, 300).ranks
    added = tuple(Added(name, len(ranks) + i) for i, name in enumerate(names))
    opening = added[-1].id if bos else None
    return Tokenizer("made", tokenizer.r50k_pat_str, ranks, added[0].id, Extras(added, bos=opening))


CHAT = tokenizer_with(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
CHAT_WITH_BOS = tokenizer_with(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"], bos=True)


def chatml(made: Tokenizer, train_on: str = "assistant") -> Rule:
    start, end = made.eot + 1, made.eot + 2
    header = (end, b"\n", start, b"assistant\n")
    tokens = tokens_of(made)
    return Rule(header, end, made.start, made.eot, tokens, train_on)  # type: ignore[arg-type]


def alpaca(made: Tokenizer, train_on: str = "assistant") -> Rule:
    header = (b"\n\n### Response:\n",)
    tokens = tokens_of(made)
    return Rule(header, made.eot, made.start, made.eot, tokens, train_on)  # type: ignore[arg-type]


def chatml_ids(made: Tokenizer, turns: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    ids, mask = [made.start], [False]
    for question, answer in turns:
        for role, content in (("user", question), ("assistant", answer)):
            header = [made.eot + 1, *made.encode(f"{role}\n")]
            text = made.encode(content)
            ids += [*header, *text, made.eot + 2, *made.encode("\n")]
            is_answer = role == "assistant"
            mask += [False] * len(header) + [is_answer] * (len(text) + 1) + [False]
    return ids, mask


def alpaca_ids(made: Tokenizer, turns: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    question, answer = (text.replace("### Response:\n", "") for text in turns[0])
    before = made.encode(f"{question}\n\n### Response:\n")
    after = made.encode(answer)
    return (
        [made.start, *before, *after, made.eot],
        [False] * (len(before) + 1) + [True] * (len(after) + 1),
    )


FORMS = {
    "chatml": (CHAT, chatml, chatml_ids),
    "chatml-bos": (CHAT_WITH_BOS, chatml, chatml_ids),
    "alpaca": (CHAT, alpaca, alpaca_ids),
    "alpaca-bos": (CHAT_WITH_BOS, alpaca, alpaca_ids),
}


@pytest.mark.parametrize("form", FORMS)
@given(rows=st.lists(st.lists(TURNS, min_size=1, max_size=3), min_size=1, max_size=3))
@few
def test_exactly_the_answers_and_their_ends_are_trained(
    form: str, rows: list[list[list[tuple[str, str]]]]
) -> None:
    made, rule_of, ids_of = FORMS[form]
    rule = rule_of(made)
    found = [[ids_of(made, turns) for turns in row] for row in rows]
    width = max(sum(len(ids) for ids, _ in row) for row in found) + 2
    ids = np.full((len(rows), width), made.start, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(found):
        joined = [token for one, _ in row for token in one]
        ids[i, : len(joined)] = joined
        mask[i, : len(joined)] = [flag for _, one in row for flag in one]
    assert (trained(rule, ids) == mask[:, 1:]).all()
    is_end = (ids == rule.end) & mask
    answers = [1 if "alpaca" in form else len(turns) for row in rows for turns in row]
    assert is_end.sum() == sum(answers)

    everything = trained(rule_of(made, "all"), ids)
    assert (everything | ~mask[:, 1:]).all()
    opens = ids[:, 1:] == made.start
    assert (everything | opens).all()
    assert not everything[:, -1].any()  # padding


@pytest.mark.parametrize("form", FORMS)
def test_a_token_that_could_not_be_read_is_not_trained(form: str) -> None:
    made, rule_of, ids_of = FORMS[form]
    ids, mask = ids_of(made, [("a", "a b a b a b")])
    at = mask.index(True) + 2
    ids[at] = IGNORED
    expected = [flag and i < at for i, flag in enumerate(mask)]
    for row in ([*ids, made.start], [IGNORED] * (len(ids) + 1)):
        found = trained(rule_of(made), np.array([row]))[0].tolist()
        assert found == ([*expected, False][1:] if row[0] >= 0 else [False] * len(ids))
        assert not trained(rule_of(made, "all"), np.array([row]))[0][at - 1]


def test_a_token_of_both_the_header_and_the_answer_is_the_answers() -> None:
    ranks = dict(CHAT.ranks)
    ranks[b"\n\n"] = len(ranks)
    made = Tokenizer("made", r"[^x]+|x", ranks, len(ranks))
    rule = alpaca(made)
    ids = [made.eot, *made.encode("a\n\n### Response:\n"), ranks[b"\n\n"], *made.encode("b")]
    straddling = [*ids[:-3], *ids[-2:], made.eot]
    mask = trained(rule, np.array([straddling]))[0]
    assert mask.tolist() == [False] * (len(straddling) - 4) + [True] * 3


def test_conversations_are_numbered_within_their_row() -> None:
    rule = chatml(CHAT)
    ids = np.array([[CHAT.eot, 5, 6, CHAT.eot, 7, CHAT.eot, CHAT.eot]])
    assert rule.documents(ids[:, :-1]).tolist() == [[1, 1, 1, 2, 2, 3]]
