"""Listens on an address until it is told to stop."""

import errno
import logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from manta.errors import ConfigError
from manta.serve.settings import ServeConfig

STOP_SECONDS = 5  # for answers that are being written when the server is told to stop
BACKLOG = 2048


def listen(c: ServeConfig) -> socket.socket:
    """A socket that listens on the config's address.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in c.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((c.host, c.port))
        found.listen(BACKLOG)
    except OSError as e:
        found.close()
        if e.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port={c.port}: something else listens there; give another port=, or 0 for any "
                "free one"
            ) from None
        why = e.strerror or str(e)
        raise ConfigError(
            f"host={c.host}, port={c.port}: cannot listen there ({why}); give an address of this "
            "machine, and a port above 1023"
        ) from None
    return found


def address(c: ServeConfig, port: int) -> str:
    """The address at which a browser on this machine reaches the server on this port."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(c.host, c.host)
    return f"http://{host}:{port}"


def run(app: Any, listening: socket.socket, started: Callable[[], None]) -> None:
    """Serves an application until SIGINT or SIGTERM comes; calls `started` once it does."""
    server = _Server(config_of(app), started)
    server.run(sockets=[listening])


def config_of(app: Any) -> uvicorn.Config:
    """How uvicorn serves an application."""
    return uvicorn.Config(
        app,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=STOP_SECONDS,
        timeout_keep_alive=30,
        ws="none",
        loop="asyncio",  # not what else may be installed
        http="h11",
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]):
        super().__init__(config)
        self._say = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._say()
