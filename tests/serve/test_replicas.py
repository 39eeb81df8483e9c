"""A server in several copies on a Ray cluster."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient

from helpers.server import free_port, make_home, running
from manta.config import from_dict
from manta.errors import ClusterError, ConfigError
from manta.serve.protocol.app import make_app
from manta.serve.protocol.guard import Guard, digest
from manta.serve.settings import ServeConfig

TOKEN = "a-token-of-this-test"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"replicas": 2, "port": 0}, "port=0: replicas=2 need a port with a number"),
        ({"replica_cpus": 2}, "replica_cpus=2: is for replicas"),
        ({"wait_seconds": 60}, "wait_seconds=60.0: is for replicas"),
    ],
)
def test_keys_of_replicas_that_do_not_fit_are_named(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        from_dict(ServeConfig, keys)


def test_a_replica_has_no_page_names_itself_and_knows_the_token_by_its_digest(
    tmp_path: Path,
) -> None:
    with running(make_home(tmp_path)) as server:
        c = from_dict(ServeConfig, {"replicas": 2, "hosts": ("testserver",)})
        app = make_app(server.models, c, None, replica="r1")
        client = TestClient(Guard(app, c, digest(TOKEN)))
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        client.headers["authorization"] = f"Bearer {TOKEN}"
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tuned", "base"]
        assert client.get("/").status_code == 404
        assert 'manta_serve_running{model="base",replica="r1"} 0.0' in client.get("/metrics").text


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_replicas_answer_alike_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    import ray
    from ray import serve

    from manta.serve.replicas import NAME, serve_replicas

    keys = {"home": str(make_home(tmp_path)), "checkpoint": "tuned,base", "cache_gb": 0.05}
    c = from_dict(ServeConfig, {**keys, "replicas": 2, "port": free_port(), "device": "cpu"})
    too_many = from_dict(ServeConfig, {**keys, "replicas": 99, "port": free_port()})
    with pytest.raises(ClusterError, match="do not fit"):
        serve_replicas(too_many, None, print, [])
    said: list[str] = []
    arguments = (c, digest(TOKEN), said.append, ["it serves"])
    thread = threading.Thread(target=serve_replicas, args=arguments)
    thread.start()
    try:
        wait(lambda: "it serves" in said, 120)
        with httpx.Client(
            base_url=f"http://127.0.0.1:{c.port}", headers={"authorization": f"Bearer {TOKEN}"}
        ) as client:
            body = {"prompt": "the cat", "max_tokens": 12, "seed": 3, "model": "base"}
            texts = {answer(client, body) for _ in range(12)}
            assert len(texts) == 1
            assert len(who_answers(client)) == 2
            streamed = client.post("/v1/completions", json={**body, "stream": True}).text
            assert streamed.rstrip().endswith("data: [DONE]")
            assert httpx.get(client.base_url.join("/v1/models")).status_code == 401
            with pytest.raises(ClusterError, match="Ray Serve already runs on this cluster"):
                serve_replicas(c, None, print, [])
            for _ in range(8):  # clients that go away; with two places each, they would block
                with contextlib.suppress(httpx.ReadTimeout):
                    client.post("/v1/completions", json={**body, "max_tokens": 100}, timeout=0.01)
            assert answer(client, body) in texts
            before = who_answers(client)
            victim = replica_pids()[0]
            os.kill(victim, signal.SIGKILL)
            wait(lambda: victim not in replica_pids() and len(replica_pids()) == 2, 60)
            wait(lambda: len(who_answers(client)) == 2, 60)
            assert answer(client, body) in texts
            assert len(who_answers(client) - before) == 1
    finally:
        serve.delete(NAME)
        thread.join(timeout=60)
    assert not thread.is_alive() and said[-1] == "somebody else ended the server"
    assert not serve.status().proxies
    assert ray.is_initialized()


def answer(client: httpx.Client, body: dict[str, Any]) -> str:
    found: str = client.post("/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    return found


def who_answers(client: httpx.Client) -> set[str]:
    """The names of the replicas that answer."""
    texts = [client.get("/metrics").text for _ in range(16)]
    return {text.partition('replica="')[2].partition('"')[0] for text in texts}


def replica_pids() -> list[int]:
    """The processes of replicas among those of this test's own Ray."""
    family = psutil.Process().children(recursive=True)
    return [p.pid for p in family if "ServeReplica" in " ".join(p.cmdline())]


def wait(is_so: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.2)
