"""The engine's thread: requests from many threads, and its end."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from helpers.serving import CONTEXT, alone, made_tokenizer, request, serving_model
from manta.model.sampling import Sampling
from manta.serve.engine.engine import Engine
from manta.serve.engine.request import Ended, Event, Failed, Piece, Request

SECONDS = 30


class Heard:
    """What a request was told, for a thread that waits."""

    def __init__(self, engine: Engine, asked: Request):
        self.events: list[Event] = []
        self.has_begun, self._is_over = threading.Event(), threading.Event()
        self.handle = engine.submit(asked, self._hear)

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Piece):
            self.has_begun.set()
        if isinstance(event, Ended | Failed):
            self._is_over.set()

    def wait(self) -> Event:
        assert self._is_over.wait(SECONDS), self.events
        return self.events[-1]


def engine_of(model: Any, **keys: Any) -> Engine:
    settings = {"dtype": "fp32", "cache_bytes": 10**7, "prefill_chunk": 8, **keys}
    return Engine(model, made_tokenizer(), device=torch.device("cpu"), **settings)


@pytest.fixture(params=["gpt2", "modern-gqa", "lstm"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = engine_of(copy.deepcopy(serving_model(request.param)))
    made.model_name = request.param  # type: ignore[attr-defined]
    yield made
    made.close()


def test_threads_get_what_each_request_gets_alone(engine: Engine) -> None:
    model = serving_model(engine.model_name)  # type: ignore[attr-defined]
    asked = [
        request([n, 3, n], 12, sampling=Sampling(n % 3 / 2, top_k=50), seed=n) for n in range(24)
    ]
    found: dict[int, Event] = {}

    def submit(number: int) -> None:
        found[number] = Heard(engine, asked[number]).wait()

    threads = [threading.Thread(target=submit, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(asked))] == [alone(model, one) for one in asked]
    counts = engine.counts()
    assert counts.requests == 24
    assert counts.prefilled + counts.cached == 24 * 3


def test_a_closed_engine_ends_what_runs_and_refuses_what_comes(engine: Engine) -> None:
    running = Heard(engine, request([1, 2], 30))
    assert running.has_begun.wait(SECONDS)
    engine.close()
    last = running.wait()
    assert isinstance(last, Ended)
    assert last.reason in ("cancelled", "length")
    late = Heard(engine, request([1, 2]))
    assert late.wait() == Failed("the engine is closed")
    engine.close()  # once more does nothing


def test_a_listener_that_fails_harms_nobody_else(engine: Engine) -> None:
    def fails(event: Event) -> None:
        raise BrokenPipeError(event)

    engine.submit(request([1, 2], 30), fails)
    assert isinstance(Heard(engine, request([1, 2], 3)).wait(), Ended)


def test_bf16_answers_too() -> None:
    engine = engine_of(copy.deepcopy(serving_model("modern")), dtype="bf16")
    first = Heard(engine, request([1, 2, 3], 6)).wait()
    assert isinstance(first, Ended)
    counts = engine.counts()
    # Keys and values of a whole context, in two layers of 4 heads with 8 channels each.
    assert counts.cache_bytes == 2 * 2 * 4 * 8 * 2 * CONTEXT
    goes_on = Heard(engine, request([1, 2, 3, *first.ids, 9], 3))
    goes_on.wait()
    assert goes_on.events[0].cached == 9  # type: ignore[union-attr]
    engine.close()


def test_a_bug_in_the_engine_itself_fails_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    from manta.serve.engine.batch import Batch

    engine = engine_of(copy.deepcopy(serving_model("modern")))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def fails(_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(Batch, "step", fails)
    failed = Heard(engine, request([1])).wait()
    assert isinstance(failed, Failed)
    assert "start the server again" in failed.why
    assert "a bug" in failed.why
    late = Heard(engine, request([1])).wait()
    assert isinstance(late, Failed)
