"""OpenAI's protocol, as its official client, lm-eval and curl speak it."""

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from helpers.common import ROOT
from helpers.server import CONTEXT, Running, free_port, make_home, running
from manta.evaluate.adapter import in_process, loglikelihood_requests
from manta.export import huggingface
from manta.model.generate import generate
from manta.model.sampling import Sampling
from manta.serve.conversations import Conversations
from manta.train.checkpoints import checkpoint


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(make_home(tmp_path_factory.mktemp("home"))) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


HI: list[Any] = [{"role": "user", "content": "why?"}]


def post(server: Running, path: str, body: Any, **keys: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60, **keys)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tuned", "base"]
    assert client.models.retrieve("base").object == "model"
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("nobody")
    assert found.value.code == "model_not_found"


def test_an_answer_as_a_whole_and_as_it_comes_are_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tuned", "messages": HI, "max_tokens": 12, "seed": 3}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len({c.id for c in chunks}) == 1 and all(c.created and c.model for c in chunks)
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert all(c.choices[0].finish_reason is None for c in [first, *middle])
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.choices == [] and usage.usage is not None and whole.usage is not None
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    assert usage.usage.prompt_tokens == whole.usage.prompt_tokens
    details = usage.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == whole.usage.prompt_tokens - 1  # the last one is always read


def test_the_next_turn_reads_only_what_is_new(client: openai.OpenAI) -> None:
    messages = [*HI]
    before = 0
    for _ in range(3):
        answer = client.chat.completions.create(
            model="tuned", messages=messages, max_tokens=6, seed=1
        )
        usage = answer.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        if before:
            # The last token of an answer is read after its end is told.
            assert before - 1 <= usage.prompt_tokens_details.cached_tokens <= before
        before = usage.prompt_tokens + usage.completion_tokens
        text = answer.choices[0].message.content
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "yes?"}]


def test_n_answers_are_those_of_their_seeds(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "base", "messages": HI, "max_tokens": 8}
    three = client.chat.completions.create(**asked, n=3, seed=10)
    each = [client.chat.completions.create(**asked, seed=10 + n) for n in range(3)]
    assert [c.message.content for c in three.choices] == [
        c.choices[0].message.content for c in each
    ]
    stream = client.chat.completions.create(**asked, n=3, seed=10, stream=True)
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [c.message.content for c in three.choices]


def test_greedy_text_is_that_of_generate(server: Running, client: openai.OpenAI) -> None:
    model = checkpoint.load_model(server.models["base"].checkpoint, torch.device("cpu"))
    tokenizer = server.models["base"].tokenizer
    prompt = tokenizer.prompt("the cat")
    sampling = Sampling(temperature=0, vocab_size=tokenizer.vocab_size)
    expected = list(generate(model, prompt, 20, sampling=sampling, stop=tokenizer.ends))
    given = client.completions.create(model="base", prompt="the cat", max_tokens=20, temperature=0)
    assert given.choices[0].text == tokenizer.decode(expected)
    by_ids = client.completions.create(model="base", prompt=prompt, max_tokens=20, temperature=0)
    assert by_ids.choices[0].text == given.choices[0].text


def test_log_probabilities(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tuned", messages=HI, max_tokens=5, logprobs=True, top_logprobs=3, temperature=0
    )
    content = found.choices[0].logprobs
    assert content is not None and content.content is not None
    for token in content.content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        assert token.logprob == max(other.logprob for other in token.top_logprobs)
    assert "logprobs" not in str(
        client.chat.completions.create(model="tuned", messages=HI, max_tokens=2).choices[0].logprobs
    )


def test_stop_and_echo(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="base", prompt="the", max_tokens=30, temperature=0, echo=True
    ).choices[0]
    assert whole.text.startswith("the") and whole.finish_reason == "length"
    answer = whole.text[3:]
    stop = answer[4:7]
    cut = client.completions.create(
        model="base", prompt="the", max_tokens=30, temperature=0, stop=[stop, "never there"]
    ).choices[0]
    assert cut.text == answer[: answer.index(stop)] and cut.finish_reason == "stop"


def test_tokens_are_clamped_to_what_fits(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tuned", messages=HI, max_completion_tokens=10**6)
    assert answer.usage is not None and answer.usage.total_tokens <= CONTEXT


def test_a_conversation_that_is_too_long(client: openai.OpenAI) -> None:
    turns: list[Any] = []
    for n in range(20):
        turns += [
            {"role": "user", "content": f"question {n} yes yes"},
            {"role": "assistant", "content": "yes"},
        ]
    turns = turns[:-1]
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="tuned", messages=turns)
    assert found.value.code == "context_length_exceeded" and found.value.param == "messages"
    for overflow in ("slide", "summarise"):
        answer: Any = client.chat.completions.create(
            model="tuned", messages=turns, max_tokens=4, extra_body={"overflow": overflow}
        )
        dropped = answer.manta["dropped"]
        assert [each["turn"] for each in dropped] == list(range(1, len(dropped) + 1))
        assert dropped[0]["question"] == "question 0 yes yes"
        assert ("note" in answer.manta) == (overflow == "summarise")


def test_lm_eval_scores_through_the_server_are_ours(server: Running, tmp_path: Path) -> None:
    """lm-eval's own client of such servers gives the log-likelihoods of the model in this
    process, and the same answers to whether a text is the likeliest."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tokenizer = server.models["base"].tokenizer
    model: Any = checkpoint.load_model(server.models["base"].checkpoint, torch.device("cpu"))
    huggingface.write(tmp_path, model, tokenizer, "")  # lm-eval reads its tokenizer
    pairs = [("the cat", " and the dog"), ("the", " mat\n"), ("naïve", " 🐟 the"), ("", "sat on")]
    greedy = list(generate(model, tokenizer.prompt("the dog"), 4, sampling=Sampling(temperature=0)))
    pairs.append(("the dog", tokenizer.decode(greedy)))
    requests = loglikelihood_requests(pairs)
    theirs = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="base", tokenizer=str(tmp_path),
        tokenizer_backend="huggingface", batch_size=2, max_length=CONTEXT,
    )  # fmt: skip
    found = theirs.loglikelihood(requests, disable_tqdm=True)
    ours = in_process(model, tokenizer).loglikelihood(requests)
    for (score, is_greedy), (expected, was_greedy) in zip(found, ours, strict=True):
        assert score == pytest.approx(expected, abs=1e-4)
        assert is_greedy == was_greedy


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_as_it_is_typed(server: Running) -> None:
    """Without a content type of JSON, which curl does not send by itself."""
    body = json.dumps({"messages": HI, "max_tokens": 3, "unknown_field": {"a": [1]}})
    command = ["curl", "-s", f"{server.url}/v1/chat/completions", "-d", body]
    said = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert json.loads(said)["object"] == "chat.completion"


def test_health_and_metrics(server: Running) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    post(server, "/v1/chat/completions", {"messages": HI, "max_tokens": 4})
    text = httpx.get(f"{server.url}/metrics").text
    for name in ("first_token_seconds_count", "between_tokens_seconds_sum", "running", "waiting",
                 "cache_bytes", "hits_total", "generated_total", "cached_total"):  # fmt: skip
        assert f'manta_serve_{name}{{model="tuned"}}' in text


def test_a_client_that_goes_away_frees_its_place(server: Running) -> None:
    """The same holds for a stream and for a client that waits for a whole answer."""
    engine = server.models["base"].engine
    body = {"model": "base", "prompt": "the", "max_tokens": 100, "n": 8, "stop": []}
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}) as s:
        next(s.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={**body, "n": 64}, timeout=0.05)
    until = time.monotonic() + 20
    while engine.counts().running + engine.counts().waiting and time.monotonic() < until:
        time.sleep(0.02)
    assert engine.counts().running == engine.counts().waiting == 0


def test_many_connections_of_which_a_fifth_goes_away(server: Running) -> None:
    results: list[Any] = []

    def one(number: int) -> None:
        body = {"model": "tuned", "messages": HI, "max_tokens": 8, "stream": True, "seed": number}
        try:
            with httpx.stream(
                "POST", f"{server.url}/v1/chat/completions", json=body, timeout=60
            ) as stream:
                lines = [line for line in stream.iter_lines() if number % 5] if number % 5 else []
                results.append(not lines or lines[-2] == "data: [DONE]")
        except Exception as e:
            results.append(e)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert results == [True] * 60


def test_a_checkpoint_that_goes_away_is_still_served(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    with running(home) as found:
        shutil.rmtree(home / "runs" / "tuned" / "checkpoints")
        reply = post(found, "/v1/chat/completions", {"messages": HI, "max_tokens": 3})
        assert reply.status_code == 200


@pytest.mark.long
def test_a_server_that_is_killed_while_it_writes_loses_no_turn(tmp_path: Path) -> None:
    """SIGKILL in the middle of a stream: the question and what was written of the answer are there
    when a server starts again, and the answer goes on."""
    home, port = make_home(tmp_path), free_port()
    command = [
        sys.executable, str(ROOT / "jobs" / "serve.py"), "checkpoint=tuned", f"home={home}",
        f"port={port}", "cache_gb=0.05",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    for number in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while "Ctrl-C" not in process.stdout.readline():
                pass
            one = httpx.post(f"{url}/api/conversations", json={}).json()["id"]
            asked = {"text": f"question {number}"}
            question = httpx.post(f"{url}/api/conversations/{one}/questions", json=asked).json()
            body = {"parent": question["id"], "settings": {"max_tokens": 100, "temperature": 0}}
            with (
                contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError),
                httpx.stream(
                    "POST", f"{url}/api/conversations/{one}/answers", json=body, timeout=60
                ) as stream,
            ):
                seen = 0
                for line in stream.iter_lines():
                    seen += '"tokens"' in line
                    if seen == 4 + 3 * number:
                        process.kill()
            process.wait()
        kept = Conversations(home / "runs" / "tuned" / "conversations.sqlite")
        turns = kept.get(one)["turns"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"]
        assert turns[0]["text"] == f"question {number}" and turns[1]["state"] != "streaming"
        assert turns[1]["tokens"] and turns[1]["ids"]
        assert len(kept.listed()) == number + 1
        kept.close()
