"""The models that are served, and their answers as streams of events."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from manta.evaluate.chat import form_of
from manta.model.sampling import Sampling
from manta.serve.dialogue import SUMMARY as ASK_FOR_SUMMARY
from manta.serve.dialogue import Answers, Dialogue, Exchange, Form, Prompt
from manta.serve.engine.engine import Engine
from manta.serve.engine.request import Ended, Event, Failed, Piece, Request
from manta.serve.refusal import Refusal
from manta.serve.settings import Overflow
from manta.text.conversations import Turn
from manta.text.tokenizer import Tokenizer

MOST_SUMMARIES = 1000


class Watch(Protocol):
    """Is told how answers come along."""

    def started(self, seconds: float) -> None: ...
    def between(self, seconds: float) -> None: ...


@dataclasses.dataclass
class Served:
    """A model that is served."""

    name: str
    checkpoint: str
    """The path of its checkpoint."""
    engine: Engine
    tokenizer: Tokenizer
    form: Form
    created: int
    """When the checkpoint was written, in seconds since 1970."""
    parameters: int
    watch: Watch | None = None
    dialogue: Dialogue = dataclasses.field(init=False)
    _summaries: dict[tuple[str, ...], str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        context = self.engine.context_length
        self.dialogue = Dialogue(self.form, self.tokenizer, context, Answers())

    @property
    def is_fine_tuned(self) -> bool:
        """Whether it has a chat template; a model without one continues a transcript."""
        return bool(self.form.closing)

    async def prompt(self, turns: Sequence[Turn], max_tokens: int, overflow: Overflow) -> Prompt:
        """What the model reads of a conversation. Raises Refusal."""
        if overflow != "summarise":
            return await asyncio.to_thread(self.dialogue.prompt, turns, max_tokens, overflow)
        loop = asyncio.get_running_loop()

        def summary(
            starts: Sequence[int], exchanges: Sequence[Exchange], system: Sequence[Turn]
        ) -> str:
            asked = self._summary(starts, exchanges, system)
            return asyncio.run_coroutine_threadsafe(asked, loop).result()

        return await asyncio.to_thread(self.dialogue.prompt, turns, max_tokens, overflow, summary)

    async def _summary(
        self, starts: Sequence[int], exchanges: Sequence[Exchange], system: Sequence[Turn]
    ) -> str:
        """The model's summary of exchanges 0 to starts[-1] - 1: that of the turns before, and of
        those that were dropped last."""
        text = ""
        for first, last in itertools.pairwise(starts):
            turns = [turn.content for turn in system]
            key = (*turns, *(part for e in exchanges[:last] for part in (e.question, e.text)))
            if key not in self._summaries:
                told = list(exchanges[first:last])
                if text:
                    question = f"[{text}]\n\n{told[0].question}"
                    told[0] = dataclasses.replace(told[0], question=question)
                self._summaries[key] = await self._summarised(system, told)
                while len(self._summaries) > MOST_SUMMARIES:
                    del self._summaries[next(iter(self._summaries))]
            text = self._summaries[key]
        return text

    async def _summarised(self, system: Sequence[Turn], told: list[Exchange]) -> str:
        room = self.dialogue.note_tokens
        ids = self.dialogue.ids(system, told, ASK_FOR_SUMMARY)
        while len(ids) + room > self.engine.context_length and len(told) > 1:
            told = told[1:]
            ids = self.dialogue.ids(system, told, ASK_FOR_SUMMARY)
        if len(ids) + room > self.engine.context_length:
            return "(too long to be summarised)"
        stop = self.request_stop()
        sampling = Sampling(temperature=0.0, vocab_size=self.tokenizer.vocab_size)
        request = Request(ids, room, sampling, stop=stop, ends=frozenset(self.tokenizer.ends))
        async for event in self.events(request):
            if isinstance(event, Ended):
                return " ".join(event.text.split()) or "(nothing)"
        return "(nothing)"

    def request_stop(self) -> tuple[str, ...]:
        """The texts that end an answer in this form of conversation."""
        return (self.form.stop,) if self.form.stop else ()

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """The events of an answer, as they come. Whoever stops reading cancels it.

        Raises:
            Refusal: the engine could not go on.
        """
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[Event] = asyncio.Queue()
        begun = time.monotonic()
        handle = self.engine.submit(request, lambda event: _put(loop, told, event))
        last = None
        try:
            while True:
                event = await told.get()
                if isinstance(event, Failed):
                    raise Refusal(event.why, status=503, kind="server_error")
                if self.watch is not None:
                    now = time.monotonic()
                    if isinstance(event, Piece):
                        if last is None:
                            self.watch.started(now - begun)
                        else:
                            self.watch.between(now - last)
                        last = now
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            handle.cancel()


def _put(loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[Event]", event: Event) -> None:
    loop.call_soon_threadsafe(queue.put_nowait, event)


def served(
    name: str,
    checkpoint: str,
    tokenizer: Tokenizer,
    engine: Engine,
    *,
    created: int,
    parameters: int,
    transcript: bool,
) -> Served:
    """A model with its form of conversations.

    Raises:
        DataError: the checkpoint's template cannot be used.
    """
    form = form_of(tokenizer, [], transcript)
    return Served(name, checkpoint, engine, tokenizer, form, created, parameters)
