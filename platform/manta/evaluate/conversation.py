"""Conversations as lm-eval takes them, which knows texts only: with the ids of special tokens.

lm-eval puts a task's question into a chat template as a text, and encodes that text later. For
Manta's tokenizers a text never has special tokens, whatever it spells. So a `Conversation` is a
text that carries its parts.
"""

from collections.abc import Sequence

from manta.errors import ConfigError, DataError
from manta.job import hint_once
from manta.terminal import line
from manta.text.conversations import Turn
from manta.text.rows import BadRow
from manta.text.templates import Template
from manta.text.tokenizer import Tokenizer


class Conversation(str):
    """A text with its parts: ids, of special tokens for example, and texts between."""

    parts: tuple[int | str, ...]

    def __new__(cls, text: str, parts: Sequence[int | str]) -> "Conversation":
        made = super().__new__(cls, text)
        made.parts = tuple(parts)
        return made


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text, or of a conversation's parts."""
    if not isinstance(text, Conversation):
        return tokenizer.encode(text)
    found: list[int] = []
    for part in text.parts:
        found += [part] if isinstance(part, int) else tokenizer.encode(part)
    return found


def cut(
    context: Conversation, continuation: str, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """The ids of a context and of what follows it, cut as lm-eval cuts texts: white space at the
    end of the context belongs to what follows."""
    *head, tail = (*context.parts, "") if isinstance(context.parts[-1], int) else context.parts
    assert isinstance(tail, str)
    kept = tail.rstrip()
    before = ids_of(Conversation("", head), tokenizer)
    context_ids = before + tokenizer.encode(kept)
    whole = before + tokenizer.encode(tail + continuation)
    return context_ids, whole[len(context_ids) :]


class ChatForm:
    """A model's chat template, as lm-eval's `apply_chat_template`.

    Raises:
        DataError: the tokenizer has no chat template that can be used.
        ConfigError: the template has no place for the `system` message.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None):
        try:
            self.template = Template.of(tokenizer)
        except DataError as e:
            raise DataError(f"chat=true: {e}, or omit chat=true") from None
        if system is not None:
            try:
                self.template.encode([Turn("system", system), Turn("user", "Why?")], True)
            except BadRow as e:
                raise ConfigError(f"system={line(system)}: {e.what}; omit it") from None
        self._spelled = {token.id: token.content for token in tokenizer.extras.added}

    def __call__(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> Conversation:
        """The conversation up to where an answer begins. Without `add_generation_prompt`, its last
        turn is an answer that has begun.

        A task's description is left out if the template has no place for a system's message, as
        lm-eval's `hf` model does it.

        Raises:
            ConfigError: the template refuses the conversation.
        """
        turns = [Turn(message["role"], message["content"]) for message in chat_history]
        try:
            try:
                parts = self._parts(turns, add_generation_prompt)
            except BadRow as e:
                if turns[0].role != "system":
                    raise
                parts = self._parts(turns[1:], add_generation_prompt)
                hint_once(f"the task's description is left out: {e.what}")
        except BadRow as e:
            several = sum(turn.role == "user" for turn in turns) > 1
            remedy = "give fewshot_as_multiturn=false" if several else "omit chat=true"
            raise ConfigError(f"chat=true: {e.what}; {remedy}") from None
        text = "".join(self._spelled[p] if isinstance(p, int) else p for p in parts)
        return Conversation(text, parts)

    def _parts(self, turns: list[Turn], add_generation_prompt: bool) -> list[int | str]:
        return self.template.parts(turns, add_generation_prompt, goes_on=not add_generation_prompt)
