"""A conversation with a model: its form as ids, and answers that are streamed.

A fine-tuned model gets its chat template. A model without one continues a transcript, and its
answer ends where the other speaker's turn begins.
"""

import dataclasses
from collections.abc import Generator, Iterator, Sequence

from manta.errors import ConfigError, DataError
from manta.evaluate.inference_settings import ChatConfig
from manta.model.gpt import LanguageModel
from manta.model.reader import Reader
from manta.model.sampling import draws, pick
from manta.terminal import line
from manta.text.conversations import Turn
from manta.text.rows import BadRow
from manta.text.streaming import ids_before, until
from manta.text.templates import Template
from manta.text.tokenizer import Tokenizer

QUOTED = 40  # characters of a question in a note


class ByTemplate:
    """The form of a conversation with a model that was fine-tuned with a chat template."""

    stop = ""
    lead = ""

    def __init__(self, tokenizer: Tokenizer, system: list[Turn]):
        try:
            self._template = Template.of(tokenizer)
        except DataError as e:
            raise DataError(f"{e}, or talk with transcript=true") from None
        self.closing = [self._template.end]
        user, answer = Turn("user", "Why?"), Turn("assistant", "Why not?")
        try:
            self._template.encode([*system, user], True)
        except BadRow as e:
            raise ConfigError(f"system={line(system[0].content)}: {e.what}; omit it") from None
        try:
            self._template.encode([*system, user, answer, user], True)
            self.has_turns = True
        except BadRow:
            self.has_turns = False

    def between(self, turns: list[Turn]) -> list[int]:
        """The ids after the end of the last answer in `turns`, up to where the next one begins."""
        found = self._template.encode(turns, True)
        trained = found.trained.nonzero()[0]
        return found.ids[int(trained[-1]) + 1 if len(trained) else 0 :].tolist()

    def whole(self, turns: Sequence[Turn]) -> list[int]:
        """The ids of texts up to where the next answer begins. Raises BadRow if the template
        refuses them."""
        return self._template.encode(turns, True).ids.tolist()


class ByTranscript:
    """The form of a conversation with a model that only continues texts."""

    stop = "\nUser:"
    lead = " "
    has_turns = True

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.closing: list[int] = []

    def between(self, turns: list[Turn]) -> list[int]:
        """The ids after the last answer in `turns`, up to where the next one begins."""
        if any(turn.role == "assistant" for turn in turns):
            return self._tokenizer.encode(f"\nUser: {turns[-1].content}\nAssistant:")
        return self.whole(turns)

    def whole(self, turns: Sequence[Turn]) -> list[int]:
        """The ids of texts up to where the next answer begins."""
        said = {"system": "{}\n\n", "user": "User: {}\nAssistant:", "assistant": " {}\n"}
        return self._tokenizer.prompt("".join(said[t.role].format(t.content) for t in turns))


def form_of(
    tokenizer: Tokenizer, system: list[Turn], transcript: bool = False
) -> ByTemplate | ByTranscript:
    """The form of conversations with a model: its chat template, if there is one and `transcript`
    does not say otherwise.

    Raises:
        DataError: the checkpoint's template cannot be used.
        ConfigError: the template has no place for a system's message.
    """
    if transcript or tokenizer.extras.chat_template is None:
        return ByTranscript(tokenizer)
    return ByTemplate(tokenizer, system)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question and the ids of its answer, without those that close it."""

    number: int
    question: str
    answer: list[int]


class Chat:
    """A conversation. Ids that were generated are kept, and never encoded again.

    Make and use it within `inference`.

    Raises:
        DataError: the checkpoint's template cannot be used.
        ConfigError: the template has no place for a system's message.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, config: ChatConfig):
        self._tokenizer, self._config = tokenizer, config
        self._system = [] if config.system is None else [Turn("system", config.system)]
        self.form = form_of(tokenizer, self._system, config.transcript)
        self._reader = Reader(model)
        self._device = model.embedding.weight.device
        self.exchanges: list[Exchange] = []
        self._asked = 0
        self.notes: list[str] = []
        """What a person should know of the last answer: turns that were dropped, an answer that was
        cut off."""

    def reset(self) -> None:
        """Forgets all turns."""
        self.exchanges.clear()

    def answer(self, question: str) -> Generator[str, None, None]:
        """Yields the text of the answer as it comes, in whole characters. An answer that is not
        read to its end becomes part of the conversation as far as it was computed.

        What follows a full context is as if the conversation had begun after its oldest turns,
        which are dropped whole; `notes` says which.
        """
        if not self.form.has_turns:
            self.reset()
        self.notes = []
        self._asked += 1
        answer: list[int] = []
        is_done = False
        if not self._fits(question):
            return
        try:
            is_first = True
            texts = self._tokenizer.stream(self._tokens(question, answer))
            for text in until(texts, [self.form.stop]):
                shown = text.lstrip(self.form.lead) if is_first else text
                if shown:
                    is_first = False
                    yield shown
            is_done = True
        finally:
            if answer or is_done:
                kept = ids_before(self._tokenizer, answer, [self.form.stop])
                self.exchanges.append(Exchange(self._asked, question, kept))

    def _tokens(self, question: str, answer: list[int]) -> Iterator[int]:
        """Yields the ids of the answer, which it also appends to `answer`."""
        c, tokenizer = self._config, self._tokenizer
        sampling = c.sampling(tokenizer.vocab_size)
        numbers = draws([c.seed + self._asked - 1], self._device)
        before = self.prompt(question)
        for _ in range(c.max_tokens):
            while len(before) + len(answer) > self._reader.context_length:
                if not self.exchanges:
                    self.notes.append(f"{self._full}: the answer was cut off")
                    return
                self._drop()
                before = self.prompt(question)
            logits = self._reader.logits(before + answer)
            token = int(pick(logits, sampling, next(numbers)))
            if token in tokenizer.ends:
                return
            answer.append(token)
            yield token
        self.notes.append(f"max_tokens={c.max_tokens}: the answer was cut off")

    def prompt(self, question: str) -> list[int]:
        """The ids of the conversation up to where the answer to `question` begins."""
        turns, ids = [*self._system], list[int]()
        for exchange in self.exchanges:
            turns.append(Turn("user", exchange.question))
            ids += self.form.between(turns) + exchange.answer + self.form.closing
            turns.append(Turn("assistant", self._tokenizer.decode(exchange.answer)))
        return ids + self.form.between([*turns, Turn("user", question)])

    @property
    def _full(self) -> str:
        return f"the context of {self._reader.context_length:,} tokens is full"

    def _fits(self, question: str) -> bool:
        """Whether the question has room once all earlier turns are dropped; a note if not."""
        length = len(self.form.between([*self._system, Turn("user", question)]))
        if length <= self._reader.context_length:
            return True
        self.notes.append(
            f"not answered: {length:,} tokens, with what is always before a question, are more "
            f"than the context of {self._reader.context_length:,}; ask something shorter"
        )
        return False

    def _drop(self) -> None:
        oldest = self.exchanges.pop(0)
        asked = line(oldest.question, QUOTED)
        self.notes.append(f'{self._full}: turn {oldest.number} ("{asked}") and its answer dropped')
