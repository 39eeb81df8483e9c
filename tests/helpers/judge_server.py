"""An OpenAI-compatible endpoint on this machine's loopback address."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass
class Server:
    """`reply(prompt)` gives the content of a reply, or the (status, headers, body) of one that is
    none."""

    address: str = ""
    reply: Callable[[str], Any] = lambda prompt: "50"
    prompts: list[str] = dataclasses.field(default_factory=list)
    keys: list[str | None] = dataclasses.field(default_factory=list)
    """What each request had in its header Authorization."""
    models: list[str] = dataclasses.field(default_factory=lambda: ["only"])


def chat_reply(content: Any) -> tuple[int, dict[str, str], str]:
    """A reply of a chat's endpoint, as (status, headers, body)."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "only"}
    return 200, {}, json.dumps({**reply, "choices": [choice]})


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A running endpoint."""
    made, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            models = [{"id": name, "object": "model", "created": 0} for name in made.models]
            self._send(200, {}, json.dumps({"object": "list", "data": models}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = body["messages"][0]["content"]
            with lock:
                made.prompts.append(prompt)
                made.keys.append(self.headers["authorization"])
            reply = made.reply(prompt)
            self._send(*(reply if isinstance(reply, tuple) else chat_reply(reply)))

        def _send(self, status: int, headers: dict[str, str], body: str) -> None:
            self.send_response(status)
            for name, value in {"content-type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body.encode())))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client has given up
                self.wfile.write(body.encode())

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    made.address = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
