"""What clients send, checked: its types, its ranges, and what the server does not have."""

import dataclasses
import secrets
from typing import Any, TypeVar

from manta import foreign
from manta.foreign import Flag, Integer, Number
from manta.model.sampling import Sampling
from manta.serve.engine.request import Penalties, Request
from manta.serve.refusal import Refusal
from manta.serve.settings import Overflow, ServeConfig
from manta.terminal import line
from manta.text.conversations import Turn
from manta.text.tokenizer import Tokenizer

T = TypeVar("T")

MOST_CHOICES = 128  # of n
MOST_STOPS = 16
LONGEST_STOP = 1000  # characters
MOST_ALTERNATIVES = 20
MOST_PROMPTS = 1024  # of one request to /v1/completions
SEEDS = 1 << 63
NEW_SEEDS = 1 << 31  # JavaScript computes with it exactly

# Fields that would change what an answer means if they were ignored, and when they ask for nothing.
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "tools": (None, []), "functions": (None, []), "audio": (None,), "suffix": (None, ""),
    "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]),
}  # fmt: skip
# The lowest and the highest value of a field.
RANGES = {
    "temperature": (0, 10), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "n": (1, MOST_CHOICES),
    "max_tokens": (0, 1 << 40), "max_completion_tokens": (0, 1 << 40),
    "top_logprobs": (0, MOST_ALTERNATIVES), "top_k": (-1, 1 << 40),
}  # fmt: skip


@dataclasses.dataclass
class StreamOptions:
    include_usage: Flag | None = None


@dataclasses.dataclass
class Body:
    """The fields that both kinds of request have. Unknown fields are ignored."""

    model: str | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Integer | None = None
    n: Integer | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


@dataclasses.dataclass
class Part:
    type: str
    text: str | None = None


@dataclasses.dataclass
class Message:
    role: str
    content: str | list[Part] | None = None


@dataclasses.dataclass
class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: list[Message] = dataclasses.field(default_factory=list)
    max_completion_tokens: Integer | None = None
    logprobs: Flag | None = None
    top_logprobs: Integer | None = None
    overflow: Overflow | None = None

    def turns(self) -> list[Turn]:
        """What was said. Raises Refusal for what is not text."""
        if not self.messages:
            raise Refusal("messages is empty: there is nothing to answer", "messages")
        return [
            Turn("system" if m.role == "developer" else m.role, _text(m.content, number))
            for number, m in enumerate(self.messages)
        ]


def _text(content: str | list[Part] | None, number: int) -> str:
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise Refusal(
                    f"messages[{number}].content has a part of the type {line(part.type)}: these "
                    "models read text only",
                    "messages",
                )
        content = "".join(part.text or "" for part in content)
    if not content:
        raise Refusal(f"messages[{number}].content is empty: give its text", "messages")
    return content


@dataclasses.dataclass
class CompletionBody(Body):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[Integer] | list[list[Integer]] | None = None
    echo: Flag | None = None
    logprobs: Integer | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
        """The ids of each prompt. Raises Refusal for none, and for ids that do not exist."""
        given: list[Any]
        if self.prompt is None or self.prompt in ([], ""):
            given = [""]  # a text from its beginning
        elif isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            given = [self.prompt]
        else:
            given = self.prompt
        if len(given) > MOST_PROMPTS:
            raise Refusal(f"{len(given):,} prompts; at most {MOST_PROMPTS:,} at once", "prompt")
        found = []
        for prompt in given:
            if isinstance(prompt, str):
                ids = tokenizer.prompt(prompt)
            else:
                ids = prompt
                wrong = [n for n in ids if not 0 <= n < tokenizer.vocab_size]
                if wrong or not ids:
                    what = f"the id {wrong[0]}" if wrong else "no ids"
                    raise Refusal(
                        f"a prompt has {what}; the model's ids are 0 to {tokenizer.vocab_size - 1}",
                        "prompt",
                    )
            found.append(tuple(ids))
        return found


def parse(data: bytes, kind: type[T]) -> T:
    """A body. Raises Refusal, which says what is wrong with it in one line."""
    try:
        content = foreign.parse(data, dict)
        for field, nothing in NOT_HERE.items():
            if field in content and content[field] not in nothing:
                raise Refusal(f"{field} is not supported here: omit it", field)
        body = foreign.check(content, kind)
    except ValueError as e:
        text = str(e)
        field = text.partition(":")[0].partition("=")[0].partition(".")[0]
        fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        raise Refusal(text, field if field in fields else None) from None
    for field, (low, high) in RANGES.items():
        value = getattr(body, field, None)
        if value is not None and not low <= value <= high:
            raise Refusal(f"{field}={value:g}: expected a number from {low:g} to {high:g}", field)
    if isinstance(body, Body) and len(body.stops) > MOST_STOPS:
        raise Refusal(f"stop has {len(body.stops)} texts; at most {MOST_STOPS}", "stop")
    if isinstance(body, Body) and any(len(text) > LONGEST_STOP for text in body.stops):
        raise Refusal(f"a text of stop has more than {LONGEST_STOP:,} characters", "stop")
    if getattr(body, "top_p", None) == 0:
        raise Refusal("top_p=0: expected a number above 0; temperature=0 is greedy", "top_p")
    return body


def seed_of(body: Body) -> int:
    """The seed that was asked for, else a new one."""
    return secrets.randbelow(NEW_SEEDS) if body.seed is None else body.seed % SEEDS


def request_of(
    body: Body,
    prompt: tuple[int, ...],
    c: ServeConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    max_tokens: int | None,
    alternatives: int | None,
    prompt_alternatives: int | None = None,
    stop: tuple[str, ...] = (),
) -> Request:
    """What the engine is asked for one answer."""
    top_k = c.top_k if body.top_k is None else body.top_k
    sampling = Sampling(
        temperature=c.temperature if body.temperature is None else body.temperature,
        top_k=top_k if top_k and top_k > 0 else None,
        top_p=c.top_p if body.top_p is None else body.top_p,
        vocab_size=tokenizer.vocab_size,
        min_p=body.min_p or 0.0,
    )
    penalties = Penalties(
        repetition=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence=body.presence_penalty or 0.0,
        frequency=body.frequency_penalty or 0.0,
    )
    return Request(
        prompt=prompt,
        max_tokens=c.max_tokens if max_tokens is None else max_tokens,
        sampling=sampling,
        penalties=penalties,
        logit_bias=_bias(body, tokenizer),
        seed=seed,
        stop=(*stop, *body.stops),
        ends=frozenset(tokenizer.ends),
        alternatives=alternatives,
        prompt_alternatives=prompt_alternatives,
    )


def _bias(body: Body, tokenizer: Tokenizer) -> dict[int, float]:
    found = {}
    for key, value in (body.logit_bias or {}).items():
        if not key.isdecimal() or int(key[:20]) >= tokenizer.vocab_size or abs(value) > 100:
            raise Refusal(
                f"logit_bias has {line(key)}: {value:g}; expected ids of 0 to "
                f"{tokenizer.vocab_size - 1}, with numbers from -100 to 100",
                "logit_bias",
            )
        found[int(key)] = value
    return found
