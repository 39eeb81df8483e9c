"""/v1/completions: texts that go on, and the log-probabilities of texts."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from manta.serve.engine.request import Ended, Piece, Started
from manta.serve.protocol.bodies import SEEDS, CompletionBody, request_of, seed_of
from manta.serve.protocol.chat import Answer, More, merged, reason
from manta.serve.protocol.reading import while_there
from manta.serve.protocol.replies import Columns, envelope, streaming, usage
from manta.serve.refusal import Refusal
from manta.serve.served import Served
from manta.serve.settings import ServeConfig

MAX_TOKENS = 16  # OpenAI's default


async def completions(
    request: Request, model: Served, body: CompletionBody, c: ServeConfig
) -> Response:
    """Goes on with one text or several, as a whole or as it comes."""
    prompts = body.prompts(model.tokenizer)
    context = model.engine.context_length
    wanted = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    for ids in prompts:
        # To score a text takes no place for another token.
        if len(ids) > context or (len(ids) == context and wanted and not body.echo):
            raise Refusal(
                f"a prompt has {len(ids):,} tokens, and the model's context {context:,}, with the "
                "new ones: shorten it",
                "prompt",
                code="context_length_exceeded",
            )
    count, seed = body.n or 1, seed_of(body)
    each = [(ids, (seed + i) % SEEDS) for ids in prompts for i in range(count)]
    streams = [_events(model, body, c, ids, s, wanted) for ids, s in each]
    if body.stream:
        return streaming(_stream(model, body, streams))
    found = await while_there(request, asyncio.gather(*map(_last, streams)))
    choices = []
    for index, choice in enumerate(found):
        shown: dict[str, Any] = {
            "index": index,
            "text": _echo(model, body, choice) + choice.text,
            "logprobs": None,
            "finish_reason": reason(choice.ended),
        }
        if body.logprobs is not None:
            shown["logprobs"] = Columns(model.tokenizer).add(choice.tokens)
        choices.append(shown)
    head = envelope("cmpl", "text_completion", model.name)
    return JSONResponse(
        {**head, "choices": choices, "usage": _usage(found), "manta": {"seed": seed}}
    )


async def _last(stream: AsyncIterator[Any]) -> Answer:
    last: Answer | None = None
    async for more in stream:
        last = more.answer
    assert last is not None
    return last


def _usage(choices: list[Answer]) -> dict[str, Any]:
    ends = [choice.ended for choice in choices if choice.ended is not None]
    prompts = {id(choice.prompt): choice for choice in choices}.values()
    return usage(
        sum(len(choice.prompt) for choice in prompts),
        sum(choice.cached for choice in prompts),
        sum(len(ended.ids) for ended in ends),
    )


def _echo(model: Served, body: CompletionBody, choice: Answer) -> str:
    return model.tokenizer.decode(choice.prompt) if body.echo else ""


async def _events(
    model: Served,
    body: CompletionBody,
    c: ServeConfig,
    prompt: tuple[int, ...],
    seed: int,
    max_tokens: int,
) -> AsyncIterator[More]:
    """A text as it goes on."""
    is_scored = body.echo and body.logprobs is not None
    room = model.engine.context_length - len(prompt)
    request = request_of(
        body,
        prompt,
        c,
        model.tokenizer,
        seed=seed,
        max_tokens=min(max_tokens, room),
        alternatives=body.logprobs,
        prompt_alternatives=body.logprobs if is_scored else None,
    )
    choice = Answer(prompt=prompt)
    async for event in model.events(request):
        if isinstance(event, Started):
            choice.cached = event.cached
            choice.tokens += event.prompt
            yield More(choice, tokens=event.prompt)
        elif isinstance(event, Piece):
            choice.text += event.text
            choice.tokens += event.tokens
            yield More(choice, event.text, event.tokens)
        elif isinstance(event, Ended):
            choice.ended = event
            yield More(choice, is_end=True)


async def _stream(
    model: Served, body: CompletionBody, streams: list[AsyncIterator[Any]]
) -> AsyncIterator[dict[str, Any]]:
    head = envelope("cmpl", "text_completion", model.name)
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    rest: dict[str, Any] = {"usage": None} if wants_usage else {}
    columns = [Columns(model.tokenizer) for _ in streams]
    choices: dict[int, Answer] = {}
    async for index, more in merged(streams):
        is_first = index not in choices
        choices[index] = more.answer
        shown = _echo(model, body, more.answer) + more.text if is_first else more.text
        why = reason(more.answer.ended) if more.is_end else None
        if not shown and not more.tokens and why is None:
            continue
        part: dict[str, Any] = {
            "index": index, "text": shown, "logprobs": None, "finish_reason": why,
        }  # fmt: skip
        if body.logprobs is not None and more.tokens:
            part["logprobs"] = columns[index].add(more.tokens)
        yield {**head, "choices": [part], **rest}
    if wants_usage:
        every = [choices[index] for index in sorted(choices)]
        yield {**head, "choices": [], "usage": _usage(every)}
