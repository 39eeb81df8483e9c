"""What clients get, in OpenAI's form."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse

from manta.serve.engine.request import Token
from manta.serve.refusal import Refusal
from manta.text.tokenizer import Tokenizer

# A proxy may otherwise keep the parts of an answer until it is whole.
STREAMING = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def envelope(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that each part of a reply has."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def event(content: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def streaming(parts: AsyncIterator[Any]) -> StreamingResponse:
    """A stream of events up to [DONE]. What goes wrong on the way is an event too, as the status
    has been sent."""

    async def events() -> AsyncIterator[str]:
        try:
            async for part in parts:
                yield event(part)
        except Refusal as e:
            yield event(e.body)
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers=STREAMING)


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is a part of a character, as its bytes: bytes:\\xf0\\x9f."""
    if token >= tokenizer.vocab_size:
        return f"<unused {token}>"
    raw = _raw(tokenizer, token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _raw(tokenizer: Tokenizer, token: int) -> bytes:
    try:
        return tokenizer.tiktoken.decode_single_token_bytes(token)
    except KeyError:  # an id between those of the vocabulary, which stands for nothing
        return b""


def of_chat(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Log-probabilities as chat completions have them."""
    return [
        {
            **_entry(tokenizer, token.id, token.logprob),
            "top_logprobs": [_entry(tokenizer, *other) for other in token.alternatives],
        }
        for token in tokens
    ]


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    raw = list(_raw(tokenizer, token)) if token < tokenizer.vocab_size else []
    return {
        "token": text_of(tokenizer, token),
        "logprob": finite(logprob),
        "bytes": raw,
        "id": token,
    }


def finite(logprob: float | None) -> float | None:
    """A log-probability that JSON can have: OpenAI's least is -9999."""
    return logprob if logprob is None else max(logprob, -9999.0)


class Columns:
    """Log-probabilities as completions have them: a list for each figure."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._offset = 0

    def add(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The lists of further tokens of a text."""
        texts, offsets = [], []
        for token in tokens:
            texts.append(text_of(self._tokenizer, token.id))
            offsets.append(self._offset)
            self._offset += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {text_of(self._tokenizer, i): finite(p) for i, p in reversed(token.alternatives)}
                if token.logprob is not None
                else None
                for token in tokens
            ],
            "text_offset": offsets,
        }
