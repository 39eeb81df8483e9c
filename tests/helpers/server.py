"""A server with two tiny models, on a port of this machine, as long as a block lasts."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from helpers.checkpoints import model_of, save
from helpers.pairs import chat_tokenizer
from manta.config import from_dict
from manta.serve.conversations import Conversations
from manta.serve.loading import models as models_of
from manta.serve.protocol import guard, server
from manta.serve.protocol.app import make_app
from manta.serve.served import Served
from manta.serve.settings import ServeConfig
from manta.text import tokenizer as tokenizers

CONTEXT = 128
TEXTS = ["the cat and the dog sat on the mat\n", "naïve 🐟 User: Assistant:\n"] * 20


def make_home(home: Path) -> Path:
    """A home with the runs `base`, which continues texts, and `tuned`, which has ChatML."""
    plain, chat = tokenizers.train(TEXTS, 270), chat_tokenizer()
    for name, tokenizer in (("base", plain), ("tuned", chat)):
        keys = {"family": "modern", "context_length": CONTEXT}
        save(model_of(keys, tokenizer.vocab_size), tokenizer, home, name)
    return home


class Running:
    """A server that runs: its address, its models, and its conversations."""

    def __init__(self, url: str, models: dict[str, Served], kept: Conversations, token: str | None):
        self.url, self.models, self.kept, self.token = url, models, kept, token


@contextlib.contextmanager
def running(home: Path, token: str | None = None, **keys: Any) -> Iterator[Running]:
    """A server of the home's models, with these keys of ServeConfig."""
    given = {"home": str(home), "checkpoint": "tuned,base", "port": 0, "cache_gb": 0.05, **keys}
    c = from_dict(ServeConfig, given)
    digest = None if token is None else guard.digest(token)
    listening = server.listen(c)
    with (
        contextlib.closing(listening),
        models_of(c, lambda _: None) as models,
        contextlib.closing(Conversations(home / "conversations.sqlite")) as kept,
    ):
        app = guard.Guard(make_app(models, c, kept), c, digest)
        found = uvicorn.Server(server.config_of(app))
        thread = threading.Thread(target=found.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield Running(server.address(c, listening.getsockname()[1]), models, kept, token)
        finally:
            found.should_exit = True
            thread.join(timeout=20)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
