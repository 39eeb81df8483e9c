"""Settings of answers and judgements."""

import ipaddress
import re
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

from manta.config import Count, DatasetName, Natural, NonNegativeFloat, PositiveFloat, config
from manta.evaluate.inference_settings import DrawConfig
from manta.terminal import line

WEB = ("http://", "https://")


@config
class EndpointConfig:
    """How a judge behind an endpoint is asked."""

    model: str | None = None
    """Name of the model at the endpoint; null: the only one that the endpoint lists."""
    key_env: str | None = None
    """Name of the environment variable that has the endpoint's key, such as OPENAI_API_KEY; null:
    no key is sent."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature of the judge; null: the endpoint's own."""
    timeout_seconds: PositiveFloat = 60.0
    """Seconds that one request may wait for the endpoint."""
    max_retries: Natural = 4
    """Retries of a request that failed by a time-out, a lost connection, 408, 409, 429 or 5xx, with
    pauses that grow, each of at most a minute."""
    parallel: Count = 4
    """Requests at a time."""


@config
class JudgeConfig(DrawConfig):
    checkpoint: str | tuple[str, ...] = "quickstart"  # type: ignore[assignment]
    """Models that answer: a run's name or folder (its newest checkpoint), or a checkpoint's folder,
    or [several]."""
    questions: str = ""
    """A .json file (one list) or .jsonl file with a question in each row: `question` and perhaps
    `answer`; instruction, input, output; prompt and completion; `messages` or `conversations`. The
    answer that a row has is the judge's reference."""
    judge: str | None = None
    """Address of an OpenAI-compatible endpoint (https://HOST/v1), or a checkpoint as in
    `checkpoint`; null: the answers are only written."""
    mode: Literal["score", "pairwise"] = "score"
    """score: each answer gets 0 to 100. pairwise: which of two models' answers is better, asked in
    both orders."""
    repeats: Count = 1
    """Times that an endpoint is asked for each judgement; 2 or more measure the judge's own
    noise."""
    limit: Count | None = None
    """Use at most this many questions, the first ones; null: all."""
    name: DatasetName | None = None
    """Name of the folder in HOME/judged that keeps the answers and judgements; null: the name of
    the file of questions."""
    max_tokens: Count = 256
    """Most tokens of an answer; the model may end it earlier."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the answers; 0: always the likeliest token."""
    batch: Count = 16
    """Questions that a model answers at a time."""
    system: str | None = None
    """System message before each question that has none; null: none."""
    transcript: bool = False
    """Whether models continue a transcript ("User: ...", "Assistant: ...") although their
    checkpoints have a chat template. One without a template always does."""
    json: str | None = None
    """File for the figures as JSON, in addition to result.json in the folder."""
    endpoint: EndpointConfig = EndpointConfig()

    @property
    def models(self) -> tuple[str, ...]:
        """The models that answer."""
        return (self.checkpoint,) if isinstance(self.checkpoint, str) else self.checkpoint

    @property
    def is_endpoint(self) -> bool:
        """Whether the judge is behind an endpoint."""
        return self.judge is not None and self.judge.lower().startswith(WEB)

    def problems(self) -> list[str]:
        found = []
        if not self.questions:
            found.append("questions: give a .json or .jsonl file of questions")
        if not self.models:
            found.append("checkpoint=[]: give at least one model that answers")
        twice = {name for name in self.models if self.models.count(name) > 1}
        if twice:
            found.append(f"checkpoint: {line(min(twice))} is there twice; name each model once")
        if self.mode == "pairwise" and len(self.models) < 2:
            found.append("mode=pairwise: compares models; give checkpoint=[A,B], or mode=score")
        if self.judge is None and self.mode != "score":
            found.append("mode=pairwise: is for a judge; give judge=, or omit it")
        if not self.is_endpoint:
            if self.repeats > 1:
                found.append(
                    f"repeats={self.repeats}: is for a judge behind an endpoint; a checkpoint's "
                    "probabilities are the same each time: omit it"
                )
            if self.endpoint != EndpointConfig():
                found.append("endpoint: is for judge=https://HOST/v1; omit it")
        return [*found, *self._problems_of_address()]

    def _problems_of_address(self) -> Iterator[str]:
        if self.judge is None:
            return
        if not self.is_endpoint:
            if re.fullmatch(r"[\w.-]+:\d+(/.*)?", self.judge):
                yield f"judge={line(self.judge)}: an endpoint's address begins with http:// or https://"
            return
        try:
            address = urlsplit(self.judge)
            host, _ = address.hostname, address.port
        except ValueError:
            host = None
        if not host:
            yield "judge: not an address; an endpoint is as in https://HOST/v1"
        elif "@" in address.netloc or address.query or address.fragment:
            yield (
                "judge: an address without a name, password or query, as it gets into logs and "
                "results; put a key into an environment variable, and name that with "
                "endpoint.key_env"
            )
        elif address.scheme == "http" and self.endpoint.key_env and not _is_here(host):
            yield (
                f"judge=http://{line(host)}: a key would be sent without encryption; give an "
                "https:// address, or omit endpoint.key_env"
            )


def _is_here(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
