"""The application: all routes together, and errors in OpenAI's form."""

import logging
import traceback
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from manta.serve.conversations import Conversations
from manta.serve.protocol import bodies
from manta.serve.protocol.bodies import ChatBody, CompletionBody
from manta.serve.protocol.chat import chat
from manta.serve.protocol.completions import completions
from manta.serve.protocol.conversation_routes import page_routes
from manta.serve.protocol.measures import CONTENT_TYPE, Measures
from manta.serve.protocol.reading import Gone, body_of
from manta.serve.refusal import Refusal
from manta.serve.served import Served
from manta.serve.settings import ServeConfig
from manta.terminal import line, visible

LOG = logging.getLogger("manta.serve")
CLOSED_BY_CLIENT = 499  # nginx's status for it; nobody reads it


def make_app(
    models: Mapping[str, Served], c: ServeConfig, kept: Conversations | None, replica: str = ""
) -> FastAPI:
    """The application of these models, by their names; `kept` has the page's conversations (None:
    there is no page), `replica` the name of this copy of the server. `Guard` goes around it."""
    app = FastAPI(title="Manta", docs_url=None, redoc_url=None)
    app.openapi_url = None
    measures = Measures(models, replica)
    app.state.models, app.state.config = models, c

    def model_of(name: str | None) -> Served:
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise Refusal(
                f"there is no model {line(name)} here; there are {', '.join(models)}",
                "model",
                status=404,
                code="model_not_found",
            )
        return models[name]

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(measures.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_shown(model) for model in models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _shown(model_of(name))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = bodies.parse(await body_of(request), ChatBody)
        return await chat(request, model_of(body.model), body, c)

    @app.post("/v1/completions")
    async def text_completions(request: Request) -> Response:
        body = bodies.parse(await body_of(request), CompletionBody)
        return await completions(request, model_of(body.model), body, c)

    if kept is not None:
        app.include_router(page_routes(kept, model_of, c))

    @app.exception_handler(Refusal)
    async def refused(_request: Request, e: Refusal) -> JSONResponse:
        return JSONResponse(e.body, e.status)

    @app.exception_handler(Gone)
    async def gone(_request: Request, _e: Gone) -> Response:
        return Response(status_code=CLOSED_BY_CLIENT)

    @app.exception_handler(RequestValidationError)
    async def unfit(request: Request, e: RequestValidationError) -> JSONResponse:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        found = Refusal(f"{request.method} {line(request.url.path)}: {where}: {first['msg']}")
        return JSONResponse(found.body, 400)

    @app.exception_handler(HTTPException)
    async def other(request: Request, e: HTTPException) -> JSONResponse:
        where = f"{request.method} {line(request.url.path)}"
        message = f"{where}: {e.detail}; there are {', '.join(ROUTES)}"
        found = Refusal(message, status=e.status_code, code="not_found")
        return JSONResponse(found.body, e.status_code, e.headers)

    @app.exception_handler(Exception)
    async def failed(_request: Request, e: Exception) -> JSONResponse:
        LOG.error("%s", visible("".join(traceback.format_exception(e))))
        message = f"the server has failed ({type(e).__name__}); its log says more"
        found = Refusal(message, status=500, kind="server_error")
        return JSONResponse(found.body, 500)

    return app


ROUTES = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/metrics")


def _shown(model: Served) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "manta",
        "manta": {
            "parameters": model.parameters,
            "context_length": model.engine.context_length,
            "is_fine_tuned": model.is_fine_tuned,
            "has_turns": model.form.has_turns,
        },
    }
