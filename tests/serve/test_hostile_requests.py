"""What a client may send that nobody should: each is refused in OpenAI's form, in one line."""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.server import Running, make_home, running
from manta.config import from_dict
from manta.errors import ConfigError
from manta.serve.protocol import guard, reading, server
from manta.serve.settings import ServeConfig
from manta.terminal import line

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "why?"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(make_home(tmp_path_factory.mktemp("home"))) as found:
        yield found


def error(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a refusal, which has OpenAI's form, and is one line that steers nothing."""
    assert reply.status_code == status, reply.text
    found = reply.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"] == line(found["message"], 2000)
    return found


BAD: list[tuple[str, Any, str | None]] = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    (CHAT, {"messages": [*HI, *HI]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    (CHAT, {"messages": HI, "temperature": -1}, "temperature"),
    (CHAT, {"messages": HI, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": HI, "temperature": True}, "temperature"),
    (CHAT, {"messages": HI, "top_p": 0}, "top_p"),
    (CHAT, {"messages": HI, "n": 0}, "n"),
    (CHAT, {"messages": HI, "n": 10**9}, "n"),
    (CHAT, {"messages": HI, "max_tokens": -5}, "max_tokens"),
    (CHAT, {"messages": HI, "max_tokens": 1.5}, "max_tokens"),
    (CHAT, {"messages": HI, "seed": 10**40}, "seed"),
    (CHAT, {"messages": HI, "stream": "yes"}, "stream"),
    (CHAT, {"messages": HI, "stop": ["x"] * 100}, "stop"),
    (CHAT, {"messages": HI, "stop": "x" * 10_000}, "stop"),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"messages": HI, "logit_bias": {"99999999": 1}}, "logit_bias"),
    (CHAT, {"messages": HI, "top_logprobs": 50}, "top_logprobs"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"messages": HI, "overflow": "forget"}, "overflow"),
    (CHAT, {"messages": [{"role": "user", "content": "yes " * 1000}]}, "messages"),
    (COMPLETIONS, {"prompt": [[-1]]}, "prompt"),
    (COMPLETIONS, {"prompt": [10**6]}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": "the " * 1000}, "prompt"),
    (COMPLETIONS, {"prompt": ["x"] * 5000}, "prompt"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD, ids=lambda v: str(v)[:50])
def test_a_wrong_body_names_its_field(
    served: Running, path: str, body: Any, param: str | None
) -> None:
    reply = httpx.post(f"{served.url}{path}", json=body, timeout=30)
    assert error(reply, 400)["param"] == param


RAW = [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000,
       b'{"a":' * 10_000, b'{"temperature": 1e999}']  # fmt: skip


@pytest.mark.parametrize("raw", RAW, ids=lambda raw: str(raw[:20]))
def test_what_is_no_body_is_refused(served: Running, raw: bytes) -> None:
    error(httpx.post(f"{served.url}{CHAT}", content=raw, timeout=30), 400)


def test_a_body_that_is_too_large_is_not_read(served: Running) -> None:
    """Its header says its size; where that says nothing, the server stops as soon as it knows."""
    large = b" " * (reading.MOST_BYTES + 1)
    error(httpx.post(f"{served.url}{CHAT}", content=large, timeout=30), 413)

    def parts() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * (1 << 20)

    # (The server may close the connection before all is sent.)
    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
        error(httpx.post(f"{served.url}{CHAT}", content=parts(), timeout=30), 413)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = ("model", "messages", "prompt", "stream", "n", "stop", "seed", "top_k", "logprobs",
          "max_tokens", "stream_options", "logit_bias", "echo", "min_p")  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    path=st.sampled_from([CHAT, COMPLETIONS]),
    body=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=5),
)
def test_no_body_makes_the_server_fail(served: Running, path: str, body: dict[str, Any]) -> None:
    given_tokens = body.get("max_tokens")
    if given_tokens is None or (isinstance(given_tokens, int) and given_tokens > 4):
        body["max_tokens"] = 2
    raw = json.dumps(body).encode()
    reply = httpx.post(f"{served.url}{path}", content=raw, timeout=60)
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code != 200:
        error(reply, reply.status_code)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", CHAT, 405), ("GET", "/page/../serve.py", 404),
     ("GET", "/page/%2e%2e%2fserve.py", 404), ("GET", "/api/conversations/x", 400),
     ("GET", "/api/conversations/999", 404), ("GET", "/v1/models/%1b%5b2J", 404)],
)  # fmt: skip
def test_other_addresses_are_refused_in_the_same_form(
    served: Running, method: str, path: str, status: int
) -> None:
    error(httpx.request(method, f"{served.url}{path}"), status)


def test_a_name_that_somebody_points_here_is_refused(served: Running) -> None:
    """DNS rebinding: a page's own name leads to this machine."""
    reply = httpx.get(f"{served.url}/v1/models", headers={"host": "evil.example"})
    assert "hosts=" in error(reply, 403)["message"]
    for name in ("localhost", "127.0.0.1:1", "[::1]:8000"):
        assert httpx.get(f"{served.url}/v1/models", headers={"host": name}).status_code == 200


def test_another_pages_requests_are_refused(served: Running) -> None:
    headers = {"origin": "https://evil.example", "content-type": "text/plain"}
    error(httpx.post(f"{served.url}{CHAT}", json={"messages": HI}, headers=headers), 403)
    error(httpx.options(f"{served.url}{CHAT}", headers=headers), 403)
    own = httpx.get(f"{served.url}/v1/models", headers={"origin": served.url})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers


def test_headers_that_keep_a_page_in_its_place(served: Running) -> None:
    page = httpx.get(f"{served.url}/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["x-frame-options"] == "DENY" and "server" not in page.headers


def test_a_token_is_asked_for_and_compared(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    token, file, is_new = guard.token_of(str(home))
    assert is_new and file.stat().st_mode & 0o077 == 0
    assert guard.token_of(str(home)) == (token, file, False)
    with running(home, token=token) as found:
        for given_token in (b"", b"Bearer wrong", token.encode(), "Bearer ä".encode()):
            headers = {b"authorization": given_token}
            reply = httpx.get(f"{found.url}/v1/models", headers=headers)
            assert error(reply, 401)["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        right = {"authorization": f"Bearer {token}"}
        assert httpx.get(f"{found.url}/v1/models", headers=right).status_code == 200
        assert httpx.get(f"{found.url}/health").status_code == 200
        assert httpx.get(f"{found.url}/").status_code == 200  # the page, which then asks with it
        assert httpx.get(f"{found.url}/api/conversations").status_code == 401
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others can read"):
        guard.token_of(str(home))


def test_an_open_address_needs_a_token() -> None:
    assert from_dict(ServeConfig, {"host": "0.0.0.0"}).needs_token
    assert not from_dict(ServeConfig, {}).needs_token
    with pytest.raises(ConfigError, match="open to others"):
        from_dict(ServeConfig, {"host": "0.0.0.0", "token": False})


def test_a_port_in_use_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        c = from_dict(ServeConfig, {"port": taken.getsockname()[1]})
        with pytest.raises(ConfigError, match=r"port=\d+: something else listens there"):
            server.listen(c)
    with pytest.raises(ConfigError, match="cannot listen there"):
        server.listen(from_dict(ServeConfig, {"host": "203.0.113.7"}))
