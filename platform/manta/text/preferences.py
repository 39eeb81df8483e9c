"""Preference pairs, a prompt with a chosen and a rejected answer, in the forms that data sets have.

Between reading and tokenizing, a pair is one text, as a conversation is: the JSON of the prompt's
turns and of the two answers ([["user", "Hi"], ["chosen", "Hello!"], ["rejected", "What?"]]).
"""

import re
from collections.abc import Mapping
from typing import Any

from manta import foreign
from manta.text import conversations
from manta.text.conversations import Turn
from manta.text.rows import BadRow, Reading, described

ANSWERS = ("chosen", "rejected")
FORMS = (
    "prompt (or question), chosen and rejected, each a text or a list of messages",
    "instruction, input, chosen and rejected",
    "chosen and rejected, each a whole conversation: a list of messages, or a text of "
    "\\n\\nHuman: and \\n\\nAssistant: turns",
)
PROMPTS = ("prompt", "question", "instruction")
# A conversation as one text, as in the helpful-and-harmless data of Anthropic.
SPOKEN = re.compile(r"\n\n(Human|Assistant):")
ROLE_OF = {"Human": "user", "Assistant": "assistant"}


def text_of_row(row: Mapping[str, Any], reading: Reading) -> str:
    """A row's pair as one text, of which `pair_of` makes two conversations again.

    Raises:
        BadRow: the row has no pair, or one whose answers are equal or follow different prompts, or
            one with an empty turn, an unknown role, or roles out of order.
    """
    conversations.refuse_twice(row)
    prompt, *answers = _pair(row, reading)
    for name, answer in zip(ANSWERS, answers, strict=True):
        conversations.check_order([*(turn.role for turn in prompt), answer.role])
        if answer.role != "assistant":
            what = f"the last turn of '{name}' is the {answer.role}'s, not an answer"
            raise BadRow("no answer", what, "fix the row")
    if answers[0] == answers[1]:
        raise BadRow("equal answers", "'chosen' and 'rejected' are the same answer", "fix the row")
    named = [Turn(name, answer.content) for name, answer in zip(ANSWERS, answers, strict=True)]
    return conversations.joined([*prompt, *named], reading)


def pair_of(text: str) -> tuple[list[Turn], list[Turn]]:
    """The conversations with the chosen and with the rejected answer."""
    *prompt, chosen, rejected = conversations.turns_of(text)
    first, second = ([*prompt, Turn("assistant", turn.content)] for turn in (chosen, rejected))
    return first, second


def _pair(row: Mapping[str, Any], reading: Reading) -> tuple[list[Turn], Turn, Turn]:
    """The turns of the prompt, the chosen answer and the rejected one."""
    there = {key for key, value in row.items() if value is not None}
    prompts = [key for key in PROMPTS if key in there]
    if not there >= set(ANSWERS):
        raise BadRow(
            "unknown form",
            f"its fields ({foreign.line(', '.join(row)) or 'none'}) are not those of a pair of "
            f"answers; the forms are {'; '.join(FORMS)}",
            "rename its fields",
        )
    if len(prompts) > 1:
        raise BadRow("two prompts", f"it has {' and '.join(prompts)}", "leave out one of them")
    if not prompts:
        wholes = [_whole(row[key], key, reading) for key in ANSWERS]
        _check_prompts(*wholes)
        return wholes[0][:-1], wholes[0][-1], wholes[1][-1]
    (key,) = prompts
    if isinstance(row[key], str):
        prompt = conversations.question(row, key, reading)
    else:
        prompt = conversations.messages(row[key], key, reading)
    chosen, rejected = (_answer(row[name], name, prompt, reading) for name in ANSWERS)
    return prompt, chosen, rejected


def _check_prompts(chosen: list[Turn], rejected: list[Turn]) -> None:
    """Raises BadRow unless two conversations have turns, and differ in the last one at most."""
    if chosen[:-1] == rejected[:-1] and len(chosen) > 1:
        return
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((at for at, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if not shared or len(chosen) == len(rejected) == 1:
        kind, what = "no shared prompt", "'chosen' and 'rejected' do not begin with the same turn"
    else:
        kind = "more than an answer"
        what = (
            f"'chosen' and 'rejected' have {len(chosen)} and {len(rejected)} turns and differ from "
            f"turn {shared + 1} on, but only the last answer may differ"
        )
    raise BadRow(kind, what, "fix the row")


def _answer(value: Any, key: str, prompt: list[Turn], reading: Reading) -> Turn:
    """The answer in a field: a text, one message, or the whole conversation with the prompt."""
    if isinstance(value, str):
        return Turn("assistant", conversations.content_of(value, key, reading))
    if isinstance(value, Mapping):
        value = [value]
    turns = conversations.messages(value, key, reading)
    if len(turns) > 1 and turns[:-1] != prompt:
        raise BadRow(
            "no shared prompt",
            f"'{key}' has {len(turns)} turns, and those before its last are not the prompt",
            "fix the row",
        )
    return turns[-1]


def _whole(value: Any, key: str, reading: Reading) -> list[Turn]:
    """The conversation in a field without a prompt next to it."""
    if not isinstance(value, str):
        return conversations.messages(value, key, reading)
    before, *spoken = SPOKEN.split(value)
    if before.strip() or not spoken:
        raise BadRow(
            "no prompt",
            f"'{key}' is {described(value)}, and there is no {', '.join(PROMPTS[:-1])} or "
            f"{PROMPTS[-1]}",
            "add a prompt",
        )
    turns = zip(spoken[::2], spoken[1::2], strict=True)
    return [
        Turn(ROLE_OF[role], conversations.content_of(said.strip(), f"{key}.{number}", reading))
        for number, (role, said) in enumerate(turns)
    ]
