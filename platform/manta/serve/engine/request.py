"""What the engine is asked, and what it tells about each answer.

A request is a prompt of token ids and the way to go on. The engine tells, in this order: one
`Started`, any number of `Piece`s, and one `Ended` or `Failed`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from manta.model.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Penalties:
    """What makes tokens that were there before less likely, as OpenAI's and transformers' keys of
    these names do."""

    repetition: float = 1.0
    """Divides positive logits, and multiplies negative ones, of ids in the prompt and the answer;
    1: nothing."""
    presence: float = 0.0
    """Is taken once from the logits of ids in the answer."""
    frequency: float = 0.0
    """Is taken from the logits of ids in the answer, each time that they are there."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it goes on. All of it was checked by whoever made it."""

    prompt: tuple[int, ...]
    """Token ids, at least one, at most the context's length."""
    max_tokens: int
    """Most tokens to add. 0: only the prompt's log-probabilities are wanted. The context ends an
    answer too."""
    sampling: Sampling = Sampling()  # noqa: RUF009 - it is frozen
    penalties: Penalties = Penalties()
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Is added to the logits of these ids, before the temperature."""
    seed: int = 0
    """The same seed gives the same answer to the same prompt, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are not part of it, wherever the borders of tokens are."""
    ends: frozenset[int] = frozenset()
    """Ids that end the answer, and are not part of it."""
    alternatives: int | None = None
    """Each token of the answer comes with its log-probability and those of this many of the
    likeliest ids; None: with none."""
    prompt_alternatives: int | None = None
    """The same of the prompt's tokens, in `Started`."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token, and how likely the model found it, before the temperature and all other settings."""

    id: int
    logprob: float | None = None
    """Natural logarithm of its probability; None: not asked for, or the first token of a text."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of the likeliest ids, likeliest first."""


@dataclasses.dataclass(frozen=True)
class Started:
    """The prompt has been read."""

    cached: int
    """Tokens of the prompt that were in the cache, and were not computed."""
    prompt: tuple[Token, ...] = ()
    """The prompt's tokens, if their log-probabilities were asked for."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """More of the answer. Text that may be the beginning of a `stop`, or of a character, waits."""

    text: str
    """Whole characters; empty if all of these tokens' text waits."""
    tokens: tuple[Token, ...]
    """The tokens since the last piece."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """The answer is there, as far as it goes."""

    reason: Literal["stop", "length", "cancelled"]
    """stop: an id or a text that ends answers came. length: `max_tokens` or the context's end."""
    ids: tuple[int, ...]
    """The answer's ids, without what ended it: what the conversation goes on from."""
    text: str
    """The answer's whole text."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """The engine could not go on with this request. Other requests go on."""

    why: str


Event = Started | Piece | Ended | Failed

Tell = Callable[[Event], None]
"""Is called in the engine's thread with each event; it must not block or raise."""
