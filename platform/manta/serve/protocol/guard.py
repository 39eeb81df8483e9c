"""Who may ask: the token, the name by which the server is reached, the page that asks.

A page of another origin could otherwise have a visitor's browser ask for it, and with a name that
its owner points to this machine (DNS rebinding) it could read the answers too.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse

from manta import storage
from manta.errors import ConfigError
from manta.serve.refusal import Refusal
from manta.serve.settings import LOOPBACK, ServeConfig
from manta.terminal import line

TOKEN = "serve-token"
OPEN = ("/health", "/", "/page/")  # what needs no token: nothing in it is anybody's
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


def token_of(home: str) -> tuple[str, Path, bool]:
    """The token of the server of this home, its file, and whether it is new. It is kept, so that a
    server that starts again has the same.

    Raises:
        ConfigError: the home is in an object store, or others can read the file.
    """
    if not storage.is_local(home):
        raise ConfigError(f"home={home}: a token is kept on this machine; give a local home=")
    file = Path(storage.filesystem(storage.join(home, TOKEN))[1])
    if file.exists():
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"{file}: others can read this token: delete it, or chmod 600 it")
        found = file.read_text(encoding="utf-8", errors="replace").strip()
        if len(found) < 16 or not found.isascii():
            raise ConfigError(f"{file}: not a token: delete the file, and a new one is made")
        return found, file, False
    file.parent.mkdir(parents=True, exist_ok=True)
    made = secrets.token_urlsafe(32)
    file.touch(mode=0o600, exist_ok=False)
    file.write_text(f"{made}\n", encoding="utf-8")
    return made, file, True


def digest(token: str) -> bytes:
    """What the server keeps of its token in memory, and gives its replicas."""
    return hashlib.sha256(token.encode()).digest()


class Guard:
    """An ASGI application around another one, which refuses what has no right to ask. Without a
    digest, nobody needs a token."""

    def __init__(self, app: App, c: ServeConfig, token_digest: bytes | None):
        self._app, self._digest = app, token_digest
        names = [*LOOPBACK, c.host, socket.gethostname(), *c.hosts]
        self._names = {name.lower().rstrip(".") for name in names}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        try:
            self._check(scope["path"], headers)
        except Refusal as e:
            reply = JSONResponse(e.body, e.status, {**HEADERS, **_asking(e)})
            await reply(scope, receive, send)
            return

        async def guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                extra = [(k, v) for k, v in added if k not in there]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self._app(scope, receive, guarded)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise Refusal(
                f"Host {line(host)}: this server is not known by that name; add it to hosts=",
                status=403,
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise Refusal(f"a page of {line(origin)} may not use this server", status=403)
        if self._digest is None or path in OPEN or path.startswith(OPEN[-1]):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(digest(given.strip()), self._digest)
        if kind.lower() != "bearer" or not is_right:
            raise Refusal(
                "this server needs its token: Authorization: Bearer TOKEN (it is in the file "
                f"{TOKEN} of the server's home)",
                status=401,
                code="invalid_api_key",
            )

    def _is_ours(self, host: str) -> bool:
        name = urlsplit(f"//{host}").hostname if host else None
        if name is None:
            return False
        with contextlib.suppress(ValueError):  # an address is nobody's to point elsewhere
            ipaddress.ip_address(name)
            return True
        return name.lower().rstrip(".") in self._names


def _asking(refusal: Refusal) -> dict[str, str]:
    return {"www-authenticate": "Bearer"} if refusal.status == 401 else {}
