"""The chat page, and what it asks for: conversations, and answers that are kept as they come."""

import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response

from manta import foreign
from manta.serve.conversations import Conversations, State
from manta.serve.engine.request import Token
from manta.serve.protocol.bodies import ChatBody, parse
from manta.serve.protocol.chat import Answer, Asked
from manta.serve.protocol.reading import body_of
from manta.serve.protocol.replies import STREAMING, finite, streaming, text_of
from manta.serve.refusal import Refusal
from manta.serve.served import Served
from manta.serve.settings import ServeConfig
from manta.text.conversations import Turn

PAGE = Path(__file__).resolve().parents[1] / "page"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere is loaded, nothing but the page's own files runs, and no other page may
# have this one in a frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    # Only what DOMPurify has made may become elements.
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
PAGE_HEADERS = {"content-security-policy": POLICY, "cache-control": "no-cache"}
SECONDS_BETWEEN_WRITES = 0.3
ALTERNATIVES = 5  # of each token, on the page


def page_routes(
    kept: Conversations, model_of: Callable[[str | None], Served], c: ServeConfig
) -> APIRouter:
    """The routes of the page."""
    routes = APIRouter()

    @routes.get("/")
    async def page() -> Response:
        return _file("index.html")

    @routes.get("/page/{name}")
    async def part(name: str) -> Response:
        return _file(name)

    @routes.get("/api/conversations")
    async def listed(search: str = "") -> dict[str, Any]:
        return {"stamp": kept.stamp(), "conversations": kept.listed(search)}

    @routes.get("/api/defaults")
    async def defaults() -> dict[str, Any]:
        return {
            "temperature": c.temperature,
            "top_k": c.top_k or 0,
            "top_p": c.top_p,
            "max_tokens": c.max_tokens,
            "overflow": c.overflow or "slide",
        }

    @routes.get("/api/stamp")
    async def stamp() -> dict[str, str]:
        return {"stamp": kept.stamp()}

    @routes.post("/api/conversations")
    async def new(request: Request) -> dict[str, Any]:
        given = await _given(request, {"title": str, "system": str})
        return {"id": kept.new(given.get("title", ""), given.get("system", ""))}

    @routes.get("/api/conversations/{conversation}")
    async def one(conversation: int) -> dict[str, Any]:
        with _known():
            return kept.get(conversation)

    @routes.patch("/api/conversations/{conversation}")
    async def change(conversation: int, request: Request) -> dict[str, Any]:
        given = await _given(request, {"title": str, "system": str, "leaf": int})
        with _known():
            kept.change(conversation, **given)
        return {"ok": True}

    @routes.delete("/api/conversations/{conversation}")
    async def delete(conversation: int, undo: bool = False) -> dict[str, Any]:
        with _known():
            kept.delete(conversation, undo=undo)
        return {"ok": True}

    @routes.post("/api/conversations/{conversation}/questions")
    async def ask(conversation: int, request: Request) -> dict[str, Any]:
        given = await _given(request, {"parent": int, "text": str})
        if not given.get("text", "").strip():
            raise Refusal("text is empty: there is nothing to ask", "text")
        with _known():
            return {"id": kept.ask(conversation, given.get("parent"), given["text"])}

    @routes.post("/api/conversations/{conversation}/answers")
    async def answer(conversation: int, request: Request) -> Response:
        types = {"parent": int, "model": str, "settings": dict, "go_on": int}
        given = await _given(request, types)
        model = model_of(given.get("model"))
        settings = given.get("settings") or {}
        with _known():
            asked = await _asked(kept, model, conversation, given.get("parent"), settings, c)
            if "go_on" in given:
                turn = kept.turn(conversation, given["go_on"])
                if turn["parent"] != given["parent"] or turn["model"] != model.name:
                    raise Refusal(
                        "an answer goes on after its own question, by its own model", "go_on"
                    )
                asked = asked.going_on(turn["ids"])
            else:
                made = kept.answer(conversation, given["parent"], model.name, settings)
                turn = kept.turn(conversation, made)
        return streaming(_stream(kept, asked, conversation, turn))

    @routes.get("/api/export")
    async def export_all() -> Response:
        return _lines(kept, None)

    @routes.get("/api/export/{conversation}")
    async def export_one(conversation: int) -> Response:
        with _known():
            return _lines(kept, conversation)

    return routes


def _file(name: str) -> Response:
    file = PAGE / name
    if Path(name).name != name or file.suffix not in TYPES or not file.is_file():
        raise Refusal(f"/page/{name[:80]!r} is not a part of the page", status=404)
    return FileResponse(file, media_type=TYPES[file.suffix], headers=PAGE_HEADERS)


@contextlib.contextmanager
def _known() -> Iterator[None]:
    """A context in which KeyError becomes the answer that there is no such thing."""
    try:
        yield
    except KeyError:
        raise Refusal(
            "there is no such conversation or turn (any more): reload the page", status=404
        ) from None


async def _given(request: Request, types: dict[str, type]) -> dict[str, Any]:
    """The fields of a body; those that are null are left out. Raises Refusal for a wrong type."""
    try:
        content = foreign.parse(await body_of(request), dict)
    except ValueError as e:
        raise Refusal(str(e)) from None
    found = {key: content[key] for key in types if content.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, types[key]) or isinstance(value, bool):
            raise Refusal(f"{key} has to be a {types[key].__name__}", key)
    return found


async def _asked(
    kept: Conversations,
    model: Served,
    conversation: int,
    parent: int | None,
    settings: dict[str, Any],
    c: ServeConfig,
) -> Asked:
    """The question `parent`, with all before it, ready to be answered. Raises Refusal if it cannot
    be, and KeyError if it is not there."""
    head = kept.get(conversation)
    turns = [Turn("system", head["system"])] if head["system"].strip() else []
    if parent is None:
        raise KeyError(parent)
    for turn in kept.path(conversation, parent):
        if turn["role"] == "assistant":
            if turn["model"] == model.name and turn["ids"]:
                model.dialogue.keep(turns, turn["text"], turn["ids"])  # (the server was restarted)
            turns.append(Turn("assistant", turn["text"] or " "))
        else:
            turns.append(Turn("user", turn["text"]))
    content = {
        **settings,
        "messages": [turn._asdict() for turn in turns],
        "logprobs": True,
        "top_logprobs": ALTERNATIVES,
    }
    return await Asked.of(model, parse(json.dumps(content).encode(), ChatBody), c)


async def _stream(
    kept: Conversations, asked: Asked, conversation: int, old: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """An answer for the page as it comes, which is kept meanwhile; `old` is it until now."""
    tokenizer, turn = asked.model.tokenizer, old["id"]
    answer, shown = Answer(asked.said), list(old["tokens"])
    with _known():
        kept.go_on(conversation, turn)
    begun, written = time.monotonic(), -math.inf  # the first piece is written at once
    try:
        yield {"turn": turn, "about": {"seed": asked.seed}, "text": answer.text, "tokens": shown[:]}
        async for more in asked.events():
            answer = more.answer
            new = [_shown(tokenizer, token) for token in more.tokens]
            shown += new
            if more.is_end:
                break
            if not new and not more.text:
                yield {"about": asked.about(answer)}
            else:
                yield {"text": more.text, "tokens": new}
            now = time.monotonic()
            if shown and now - written > SECONDS_BETWEEN_WRITES:
                kept.write(turn, answer.text, "streaming", tokens=shown, ids=_ids(asked, answer))
                written = now
    finally:
        seconds = time.monotonic() - begun
        about = {
            **asked.about(answer),
            "seconds": seconds,
            "completion_tokens": len(answer.tokens),
            "tokens_per_second": len(answer.tokens) / max(seconds, 1e-9),
            "finish_reason": answer.ended.reason if answer.ended else "cancelled",
        }
        state: State = "complete" if answer.ended else "stopped"
        ids = _ids(asked, answer)
        kept.write(turn, answer.text, state, tokens=shown, ids=ids, about=about)
    yield {"about": about, "state": "complete"}


def _ids(asked: Asked, answer: Answer) -> tuple[int, ...]:
    """The ids of an answer as far as it has come."""
    new = answer.ended.ids if answer.ended else tuple(token.id for token in answer.tokens)
    return (*asked.begun, *new)


def _shown(tokenizer: Any, token: Token) -> list[Any]:
    """A token for the page: its text, its log-probability, the likeliest others."""
    others = [[text_of(tokenizer, i), finite(p)] for i, p in token.alternatives]
    return [text_of(tokenizer, token.id), finite(token.logprob), others]


def _lines(kept: Conversations, conversation: int | None) -> Response:
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept.export(conversation)]
    if not rows and conversation is not None:
        raise Refusal("this conversation has no whole answer yet: there is nothing to export")
    name = "conversations" if conversation is None else f"conversation-{conversation}"
    headers = {**STREAMING, "content-disposition": f'attachment; filename="{name}.jsonl"'}
    return PlainTextResponse("".join(rows), media_type="application/jsonl", headers=headers)
