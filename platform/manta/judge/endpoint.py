"""A judge behind an OpenAI-compatible endpoint, asked with OpenAI's own client."""

import os
from typing import Any, NamedTuple

from manta.errors import ConfigError, DataError
from manta.judge.settings import EndpointConfig
from manta.terminal import line, named

HIDDEN = "***"


class Reply(NamedTuple):
    """What an endpoint said. Exactly one of `text` and `error` is there."""

    text: str | None
    error: str | None = None
    """Why there was no reply; the request may be tried again."""


class Endpoint:
    """Asks a model behind an address. Threads may share it.

    Raises:
        ConfigError: the package openai is missing, or the key is not in the environment.
        DataError: the endpoint does not say which model it has.
    """

    def __init__(self, address: str, c: EndpointConfig):
        try:
            import openai
        except ImportError:
            raise ConfigError(
                "judge=http...: needs the package openai: pip install 'manta[judge]'"
            ) from None
        self._openai, self._c, self.address = openai, c, address
        self._key = _key(c.key_env)
        # Without the empty texts, the client would send what OPENAI_ORG_ID and the like have.
        self._client = openai.OpenAI(
            api_key=self._key or "none",
            base_url=address,
            organization="",
            project="",
            timeout=c.timeout_seconds,
            max_retries=c.max_retries,
        )
        self.model = c.model or self._only_model()

    def ask(self, prompt: str) -> Reply:
        """The reply to a prompt. Errors are in the reply; nothing is raised."""
        options: dict[str, Any] = {}
        if self._c.temperature is not None:
            options["temperature"] = self._c.temperature
        try:
            found = self._client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], **options
            )
            message = found.choices[0].message if found.choices else None
            text = (message.content or message.refusal or "") if message else ""
            if not isinstance(text, str):
                raise TypeError("its content is not a text")
        except Exception as e:  # an endpoint can send anything
            return Reply(None, self._what(e))
        return Reply(self._without_key(text))

    def _what(self, e: Exception) -> str:
        """A phrase for what went wrong; it begins with the kind."""
        openai = self._openai
        if isinstance(e, openai.APITimeoutError):
            return f"timed out (endpoint.timeout_seconds={self._c.timeout_seconds:g})"
        if isinstance(e, openai.APIStatusError):
            kind = {
                401: "not authorized, 401: check endpoint.key_env",
                403: "not allowed, 403: check endpoint.key_env",
                404: "not found, 404: check the address and endpoint.model",
                429: "too many requests, 429",
            }.get(e.status_code, f"HTTP {e.status_code}")
            return f"{kind} ({line(self._without_key(e.message), 160)})"
        if isinstance(e, openai.APIConnectionError):
            return f"no connection ({line(str(e.__cause__ or e), 160)})"
        return f"not a reply of an OpenAI-compatible endpoint ({line(type(e).__name__)})"

    def _only_model(self) -> str:
        try:
            names = [str(model.id) for model in self._client.models.list()]
        except Exception as e:
            raise DataError(
                f"judge={self.address}: cannot say which models it has: {self._what(e)}; give "
                "endpoint.model=NAME"
            ) from None
        if len(names) != 1:
            raise DataError(
                f"judge={self.address}: has {len(names):,} models; give endpoint.model=NAME: "
                f"{named(names)}"
            )
        return names[0]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, HIDDEN) if self._key else text


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"endpoint.key_env={line(variable)}: this environment variable is not set; export it, "
            "or omit endpoint.key_env for an endpoint without a key"
        )
    return key
