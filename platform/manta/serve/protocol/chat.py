"""/v1/chat/completions."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from manta.serve.dialogue import Prompt
from manta.serve.engine.request import Ended, Piece, Started, Token
from manta.serve.protocol.bodies import SEEDS, ChatBody, request_of, seed_of
from manta.serve.protocol.reading import while_there
from manta.serve.protocol.replies import envelope, of_chat, streaming, usage
from manta.serve.refusal import Refusal
from manta.serve.served import Served
from manta.serve.settings import ServeConfig
from manta.text.conversations import Turn


@dataclasses.dataclass
class Answer:
    """One of the answers to a request, as far as it has come. It grows while others read of it, so
    what is new is told apart."""

    text: str = ""
    cached: int = 0
    prefilled: int = 0
    tokens: list[Token] = dataclasses.field(default_factory=list)
    ended: Ended | None = None
    prompt: tuple[int, ...] = ()
    """What a text of /v1/completions goes on from."""


@dataclasses.dataclass(frozen=True)
class More:
    """What is new of an answer: text, the tokens of it, and whether this is its end."""

    answer: Answer
    text: str = ""
    tokens: tuple[Token, ...] = ()
    is_end: bool = False


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question to a model, ready to be answered."""

    model: Served
    body: ChatBody
    turns: list[Turn]
    prompt: Prompt
    overflow: str
    seed: int
    config: ServeConfig
    begun: tuple[int, ...] = ()
    """Ids that the answer has already; they are the end of the prompt."""

    @classmethod
    async def of(cls, model: Served, body: ChatBody, c: ServeConfig) -> "Asked":
        """Raises Refusal if it cannot be answered."""
        turns = body.turns()
        overflow = body.overflow or c.overflow or "error"
        prompt = await model.prompt(turns, cls._max_tokens(body, c), overflow)
        return cls(model, body, turns, prompt, overflow, seed_of(body), c)

    def going_on(self, begun: Sequence[int]) -> "Asked":
        """The same question, with an answer that has these ids already. Raises Refusal if the
        context has no room for more."""
        ids = (*self.prompt.ids, *begun)
        if len(ids) >= self.model.engine.context_length:
            raise Refusal("the context is full: this answer cannot go on")
        return dataclasses.replace(
            self, prompt=dataclasses.replace(self.prompt, ids=ids), begun=tuple(begun)
        )

    @property
    def said(self) -> str:
        """The text of the ids that the answer has already."""
        if not self.begun:
            return ""
        return self.model.tokenizer.decode(self.begun).lstrip(self.model.form.lead or "\0")

    @staticmethod
    def _max_tokens(body: ChatBody, c: ServeConfig) -> int:
        given = body.max_completion_tokens
        given = body.max_tokens if given is None else given
        return c.max_tokens if given is None else given

    async def events(self, index: int = 0) -> AsyncIterator[More]:
        """The answer as it comes. The first has no text, and says how much of the prompt was
        remembered."""
        model, form = self.model, self.model.form
        asks = self.body.top_logprobs if self.body.logprobs else None
        request = request_of(
            self.body,
            self.prompt.ids,
            self.config,
            model.tokenizer,
            seed=(self.seed + index) % SEEDS,
            max_tokens=self._max_tokens(self.body, self.config),
            alternatives=(asks or 0) if self.body.logprobs else None,
            stop=model.request_stop(),
        )
        answer = Answer(self.said)
        async for event in model.events(request):
            if isinstance(event, Started):
                answer.cached = event.cached
                answer.prefilled = len(self.prompt.ids) - event.cached
                yield More(answer)
            elif isinstance(event, Piece):
                text = event.text
                if form.lead and not answer.text:
                    text = text.lstrip(form.lead)
                answer.text += text
                answer.tokens += event.tokens
                yield More(answer, text, event.tokens)
            elif isinstance(event, Ended):
                answer.ended = event
                model.dialogue.keep(self.turns, answer.text, (*self.begun, *event.ids))
                yield More(answer, is_end=True)

    def about(self, answer: Answer) -> dict[str, Any]:
        """What OpenAI's fields have no place for."""
        found: dict[str, Any] = {
            "cached": answer.cached,
            "prefilled": answer.prefilled,
            "prompt_tokens": len(self.prompt.ids),
            "context_length": self.model.engine.context_length,
            "seed": self.seed,
            "overflow": self.overflow,
            "dropped": [dataclasses.asdict(turn) for turn in self.prompt.dropped],
        }
        if self.prompt.dropped:
            found["why"] = self.prompt.why
        if self.prompt.note:
            found["note"] = self.prompt.note
        return found


def reason(ended: Ended | None) -> str | None:
    """OpenAI's finish_reason; it has none for an answer that was cancelled."""
    return None if ended is None else "stop" if ended.reason == "cancelled" else ended.reason


async def chat(request: Request, model: Served, body: ChatBody, c: ServeConfig) -> Response:
    """Answers a conversation, as a whole or as it comes."""
    asked = await Asked.of(model, body, c)
    count = body.n or 1
    if body.stream:
        return streaming(_stream(asked, count))
    answers = await while_there(request, asyncio.gather(*(_whole(asked, i) for i in range(count))))
    choices = []
    for index, answer in enumerate(answers):
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason(answer.ended),
        }
        if body.logprobs:
            choice["logprobs"] = {"content": of_chat(model.tokenizer, answer.tokens)}
        choices.append(choice)
    head = envelope("chatcmpl", "chat.completion", model.name)
    return JSONResponse(
        {
            **head,
            "choices": choices,
            "usage": _usage(asked, list(answers)),
            "manta": asked.about(answers[0]),
        }
    )


async def _whole(asked: Asked, index: int) -> Answer:
    answer = Answer()
    async for more in asked.events(index):
        answer = more.answer
    return answer


def _usage(asked: Asked, answers: list[Answer]) -> dict[str, Any]:
    ends = [answer.ended for answer in answers if answer.ended is not None]
    return usage(
        len(asked.prompt.ids),
        min((answer.cached for answer in answers), default=0),
        sum(len(ended.ids) for ended in ends),
    )


async def _stream(asked: Asked, count: int) -> AsyncIterator[dict[str, Any]]:
    head = envelope("chatcmpl", "chat.completion.chunk", asked.model.name)
    body = asked.body
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    # With include_usage, OpenAI's other chunks have the field too, as null.
    rest: dict[str, Any] = {"usage": None} if wants_usage else {}

    def chunk(index: int, delta: dict[str, Any], why: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": why}
        return {**head, "choices": [choice], **rest}

    answers = [Answer() for _ in range(count)]
    for index in range(count):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, more in merged([asked.events(i) for i in range(count)]):
        answers[index] = more.answer
        if more.is_end:
            last = chunk(index, {}, reason(more.answer.ended))
            yield {**last, "manta": asked.about(more.answer)}
        elif more.text or (body.logprobs and more.tokens):
            found = chunk(index, {"content": more.text})
            if body.logprobs:
                content = of_chat(asked.model.tokenizer, more.tokens)
                found["choices"][0]["logprobs"] = {"content": content}
            yield found
    if wants_usage:
        yield {**head, "choices": [], "usage": _usage(asked, answers)}


async def merged(streams: list[AsyncIterator[Any]]) -> AsyncIterator[tuple[int, Any]]:
    """What several streams have, as it comes, each with its stream's index."""
    if len(streams) == 1:
        async for item in streams[0]:
            yield 0, item
        return
    told: asyncio.Queue[tuple[int, Any, BaseException | None, bool]] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async for item in streams[index]:
                told.put_nowait((index, item, None, False))
        except Exception as e:
            told.put_nowait((index, None, e, False))
        told.put_nowait((index, None, None, True))

    tasks = [asyncio.ensure_future(pump(index)) for index in range(len(streams))]
    try:
        left = len(tasks)
        while left:
            index, item, error, is_over = await told.get()
            if error is not None:
                raise error
            if is_over:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
