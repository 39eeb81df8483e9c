"""A conversation as the ids that a model reads: what fits, and what is left out, which is said.

Ids that a model generated are kept, and never encoded again: the same text may be other ids, and
then what the model remembers of the conversation would be of no use.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Sequence

from manta.evaluate.chat import ByTemplate, ByTranscript
from manta.serve.refusal import Refusal
from manta.serve.settings import Overflow
from manta.terminal import line
from manta.text.conversations import Turn
from manta.text.rows import BadRow
from manta.text.tokenizer import Tokenizer

Form = ByTemplate | ByTranscript

MOST_REMEMBERED = 20_000  # answers
MOST_CACHED = 20_000  # encoded questions
QUOTED = 60  # characters of a question that is named
SUMMARY = "Summarise our conversation up to here in at most three sentences."
NOTE = "[Summary of turns 1 to {last}, by the model: {text}]"
ONE_QUESTION = "the chat template has one question and one answer"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question and its answer, as text and as ids without those that close it."""

    question: str
    text: str
    answer: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A turn that the model does not see."""

    turn: int
    """Its number in the conversation; 1 is the first."""
    question: str
    """How its question begins."""
    is_new: bool
    """Whether the model saw it when the turn before was answered."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model reads, and what of the conversation is not in it."""

    ids: tuple[int, ...]
    dropped: tuple[Dropped, ...] = ()
    why: str = ""
    """Why turns were dropped; "" if none were."""
    note: str = ""
    """The summary that takes their place; "" if none does."""


class Answers:
    """The ids of answers, by all that was said up to their ends. From any thread."""

    def __init__(self, most: int = MOST_REMEMBERED):
        self._most = most
        self._ids: collections.OrderedDict[bytes, tuple[int, ...]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def keep(self, turns: Sequence[Turn], ids: Sequence[int]) -> None:
        """Keeps the ids of the answer that is the last of `turns`."""
        with self._lock:
            self._ids[_key(turns)] = tuple(ids)
            while len(self._ids) > self._most:
                self._ids.popitem(last=False)

    def get(self, turns: Sequence[Turn]) -> tuple[int, ...] | None:
        """The ids of the answer that is the last of `turns`; None: it is not known."""
        with self._lock:
            found = self._ids.get(key := _key(turns))
            if found is not None:
                self._ids.move_to_end(key)
            return found


def _key(turns: Sequence[Turn]) -> bytes:
    # Clients may take white space off an answer's ends.
    said = [(turn.role, turn.content.strip()) for turn in turns]
    return hashlib.sha256(json.dumps(said).encode()).digest()


def split(turns: Sequence[Turn]) -> tuple[list[Turn], list[tuple[str, str]], str]:
    """The system's message (a list of none or one), questions with their answers, and the question
    to answer.

    Raises:
        Refusal: the roles are out of order.
    """
    system = [turn for turn in turns[:1] if turn.role == "system"]
    rest = turns[len(system) :]
    for number, turn in enumerate(rest):
        wanted = "assistant" if number % 2 else "user"
        if turn.role != wanted:
            where = len(system) + number
            raise Refusal(
                f"messages[{where}] has the role {line(turn.role)}, and {wanted} is expected: "
                "after an optional system message, user and assistant take turns",
                "messages",
            )
    if len(rest) % 2 == 0:
        raise Refusal(
            "the last message has to be the user's: there is nothing to answer", "messages"
        )
    pairs = [(q.content, a.content) for q, a in zip(rest[::2], rest[1::2], strict=False)]
    return system, pairs, rest[-1].content


class Dialogue:
    """Makes prompts of conversations with one model."""

    def __init__(self, form: Form, tokenizer: Tokenizer, context_length: int, answers: Answers):
        self._form, self._tokenizer, self._context = form, tokenizer, context_length
        self._answers = answers
        self._between = functools.lru_cache(MOST_CACHED)(self._encoded)

    def _encoded(self, turns: tuple[Turn, ...]) -> tuple[int, ...]:
        try:
            return tuple(self._form.between(list(turns)))
        except BadRow as e:
            raise Refusal(e.what, "messages") from None

    def exchanges(self, system: Sequence[Turn], pairs: Sequence[tuple[str, str]]) -> list[Exchange]:
        """Questions and answers with the ids of these: those that were generated, where they are
        known, else those of the text."""
        found, turns = [], list(system)
        for question, text in pairs:
            turns += [Turn("user", question), Turn("assistant", text)]
            ids = self._answers.get(turns)
            if ids is None:
                ids = tuple(self._tokenizer.encode(self._form.lead + text))
            found.append(Exchange(question, text, ids))
        return found

    def keep(self, turns: Sequence[Turn], text: str, ids: Sequence[int]) -> None:
        """Remembers the ids of the answer `text` to the last of `turns`."""
        self._answers.keep([*turns, Turn("assistant", text)], ids)

    def ids(
        self, system: Sequence[Turn], exchanges: Sequence[Exchange], question: str
    ) -> tuple[int, ...]:
        """The ids of a conversation up to where the answer to `question` begins."""
        found: list[int] = []
        for number, exchange in enumerate(exchanges):
            found += self._opening(system, exchanges, number, exchange.question)
            found += [*exchange.answer, *self._form.closing]
        found += self._opening(system, exchanges, len(exchanges), question)
        return tuple(found)

    def _opening(
        self, system: Sequence[Turn], exchanges: Sequence[Exchange], number: int, question: str
    ) -> tuple[int, ...]:
        """The ids after the answer before, up to where the next one begins. A template preserves
        prefixes (Template checks it), so only the exchange before matters."""
        before: list[Turn] = []
        if number:
            last = exchanges[number - 1]
            before = [Turn("user", last.question), Turn("assistant", last.text or " ")]
        return self._between((*system, *before, Turn("user", question)))

    def starts(
        self,
        system: Sequence[Turn],
        exchanges: Sequence[Exchange],
        question: str,
        limit: int,
        target: int,
    ) -> list[int]:
        """The first exchange that the model saw, for each question up to this one, each time that
        it moved: [0, 3, 7] has moved twice.

        Whenever a question with what is before it has more than `limit` ids, whole exchanges are
        dropped until at most `target` are left, or nothing is. So the beginning stays the same for
        some turns, and what the model remembers of it is of use.
        """
        sizes = [
            len(self._opening(system, exchanges, n, e.question))
            + len(e.answer)
            + len(self._form.closing)
            for n, e in enumerate(exchanges)
        ]
        found, first, held = [0], 0, 0  # held: ids of exchanges first to number - 1
        for number in range(len(exchanges) + 1):
            asked = exchanges[number].question if number < len(exchanges) else question
            size = held + len(self._opening(system, exchanges, number, asked))
            if size > limit and first < number:
                while size > target and first < number:
                    size -= sizes[first]
                    held -= sizes[first]
                    first += 1
                found.append(first)
            if number < len(exchanges):
                held += sizes[number]
        return found

    def prompt(
        self,
        turns: Sequence[Turn],
        max_tokens: int,
        overflow: Overflow,
        summary: Callable[[Sequence[int], Sequence[Exchange], Sequence[Turn]], str] | None = None,
    ) -> Prompt:
        """What the model reads of a conversation.

        Args:
            turns: all that was said; the last is the question to answer.
            max_tokens: the tokens that the answer may have; a quarter of the context, at most, is
                kept free for it.
            summary: gives the text of the summary of exchanges 0 to starts[-1] - 1, by
                (starts, exchanges, system); for overflow=summarise.

        Raises:
            Refusal: the roles are out of order, the template refuses the conversation, or it is too
                long for the context.
        """
        system, pairs, question = split(turns)
        exchanges = self.exchanges(system, pairs)
        if not self._form.has_turns and exchanges:
            dropped = self._dropped(exchanges, len(exchanges), max(0, len(exchanges) - 1))
            return Prompt(self._fitting(system, [], question), dropped, ONE_QUESTION)
        ids = self.ids(system, exchanges, question)
        limit = self.limit(max_tokens)
        if overflow == "error" or len(ids) <= limit or not exchanges:
            return Prompt(self._checked(ids, len(exchanges)))
        is_summary = overflow == "summarise" and summary is not None
        spare = self.note_tokens + self._note_frame if is_summary else 0
        room = max(1, limit - spare), max(1, (limit - spare) * 2 // 3)
        starts = self.starts(system, exchanges, question, *room)
        earlier = (system, exchanges[:-1], exchanges[-1].question)
        was_whole = len(self.ids(*earlier)) <= limit
        before = 0 if was_whole else self.starts(*earlier, *room)[-1]
        first = starts[-1]
        why = f"the context of {self._context:,} tokens is full"
        if not first or summary is None or not is_summary:
            ids = self._fitting(system, exchanges[first:], question)
            return Prompt(ids, self._dropped(exchanges, first, before), why if first else "")
        text = summary(starts, exchanges, system)
        while True:
            note = NOTE.format(last=first, text=text)
            ids = self._noted(system, exchanges[first:], question, note)
            if len(ids) < self._context or first == len(exchanges):
                break
            first += 1  # the note came out longer than it should
        dropped = self._dropped(exchanges, first, before)
        return Prompt(self._checked(ids, 0), dropped, why, note)

    @functools.cached_property
    def _note_frame(self) -> int:
        """Tokens of a note without its text."""
        return len(self._tokenizer.encode("\n\n" + NOTE.format(last=1000, text="")))

    def limit(self, max_tokens: int) -> int:
        """The most ids of a prompt, so that there is room for an answer."""
        return self._context - max(1, min(max_tokens, self._context // 4))

    @property
    def note_tokens(self) -> int:
        """The most tokens of a summary."""
        return max(1, self._context // 8)

    def _noted(
        self, system: Sequence[Turn], exchanges: Sequence[Exchange], question: str, note: str
    ) -> tuple[int, ...]:
        """The ids with a note: after the system's message, or, where the template has no place for
        one, before the first question."""
        said = f"{system[0].content}\n\n{note}" if system else note
        try:
            return self.ids([Turn("system", said)], exchanges, question)
        except Refusal:
            if not exchanges:
                return self.ids(system, exchanges, f"{note}\n\n{question}")
            first = dataclasses.replace(exchanges[0], question=f"{note}\n\n{exchanges[0].question}")
            return self.ids(system, [first, *exchanges[1:]], question)

    def _fitting(
        self, system: Sequence[Turn], exchanges: Sequence[Exchange], question: str
    ) -> tuple[int, ...]:
        return self._checked(self.ids(system, exchanges, question), len(exchanges))

    def _checked(self, ids: tuple[int, ...], earlier: int) -> tuple[int, ...]:
        """The ids. Raises Refusal if they leave no room for a single new token."""
        if len(ids) < self._context:
            return ids
        remedy = (
            "send fewer messages, or ask with overflow=slide"
            if earlier
            else "the newest question alone, with what is always before it, is too long: shorten it"
        )
        raise Refusal(
            f"the conversation has {len(ids):,} tokens, and the model's context {self._context:,}, "
            f"with the answer: {remedy}",
            "messages",
            code="context_length_exceeded",
        )

    def _dropped(
        self, exchanges: Sequence[Exchange], first: int, before: int
    ) -> tuple[Dropped, ...]:
        return tuple(
            Dropped(number + 1, line(exchange.question, QUOTED), number >= before)
            for number, exchange in enumerate(exchanges[:first])
        )
