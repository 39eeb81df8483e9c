"""A request while it is answered: its ids, its cache, its text, and what it was told."""

import collections
from typing import Literal

import torch
from torch import Tensor

from manta.model.cache import Cache, StateCache
from manta.model.sampling import draws
from manta.serve.engine.request import Ended, Event, Failed, Piece, Request, Started, Tell, Token
from manta.serve.engine.scores import scored
from manta.text.streaming import TextStream, ids_before
from manta.text.tokenizer import Tokenizer


class Handle:
    """A request that was submitted."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        """Ends the request within a step; it is told `Ended`, with the reason "cancelled", unless
        it has ended before. From any thread."""
        self.is_cancelled = True


class Row:
    """A request that waits or is in the batch."""

    def __init__(
        self,
        request: Request,
        tell: Tell,
        handle: Handle,
        tokenizer: Tokenizer,
        context_length: int,
    ):
        self.request, self.handle = request, handle
        self._tell_, self._tokenizer = tell, tokenizer
        self.ids = list(request.prompt)
        """The prompt and the answer so far."""
        self.longest = min(context_length, len(request.prompt) + request.max_tokens)
        """The most tokens that `ids` may become."""
        self.cache: Cache | None = None
        """What the model remembers of the first of `ids`; None while the request waits."""
        self.must_fit = False
        """Whether the next cache has to have room for all of `longest`: the request was put back
        once because there was none."""
        self.is_told = False
        """Whether `Ended` or `Failed` was told."""
        self.cached = 0
        """How many of the prompt's tokens were in the cache when it was admitted first."""
        self._was_admitted = False
        self._numbers = draws([request.seed], torch.device("cpu"))
        self._number: tuple[int, Tensor] = (-1, torch.empty(0))
        self.counts: Tensor | None = None
        """(V,) how often each id is in the answer, if penalties ask for it."""
        self.seen: Tensor | None = None
        """(V,) whether each id is in the prompt or the answer, if penalties ask for it."""
        self.scored = [Token(id) for id in request.prompt[:1]]
        """The prompt's tokens with their log-probabilities, as far as they were read."""
        self._stream = TextStream(tokenizer, request.stop)
        self._text: list[str] = []
        self._is_started = False
        # A state cannot go back to where a text ended that was found later, so some are kept.
        longest_stop = max((len(stop.encode()) for stop in request.stop), default=0)
        self._states: collections.deque[StateCache] = collections.deque(maxlen=longest_stop)

    @property
    def length(self) -> int:
        """How many of `ids` the model has read."""
        return 0 if self.cache is None else self.cache.lengths[0]

    @property
    def pending(self) -> int:
        """How many of `ids` it has not read."""
        return len(self.ids) - self.length

    @property
    def scores(self) -> bool:
        """Whether the prompt's log-probabilities are still to be computed."""
        wanted = self.request.prompt_alternatives is not None
        return wanted and len(self.scored) < len(self.request.prompt)

    @property
    def states_kept(self) -> int:
        """The most states that are kept besides `cache`."""
        return self._states.maxlen or 0

    @property
    def answer(self) -> list[int]:
        """The ids of the answer so far."""
        return self.ids[len(self.request.prompt) :]

    @property
    def number(self) -> Tensor:
        """The number in [0, 1), (1,) on the host, with which the next token is drawn. A token that
        could not be chosen is drawn with the same number again."""
        if self._number[0] != len(self.ids):
            self._number = (len(self.ids), next(self._numbers))
        return self._number[1]

    def admit(self, cache: Cache, cached: int) -> None:
        """Gives the row a cache that has the first `cached` of its ids."""
        self.cache = cache
        if not self._was_admitted:
            self.cached, self._was_admitted = cached, True
        if self.scores:
            del self.scored[1:]

    def score(self, before: int, logits: Tensor) -> None:
        """Takes the (n, V) logits after n tokens of the prompt, the first of which has `before`
        others before it."""
        following = self.request.prompt[before + 1 : before + 1 + len(logits)]
        count = self.request.prompt_alternatives
        if following and count is not None:
            these = logits[: len(following)]
            self.scored += scored(these, following, [count] * len(following))

    def started(self) -> bool:
        """Tells that the prompt was read, if it was not told before; returns whether it is told
        now."""
        if self._is_started:
            return False
        self._is_started = True
        is_asked = self.request.prompt_alternatives is not None
        self._tell(Started(self.cached, tuple(self.scored) if is_asked else ()))
        return True

    def remember(self) -> None:
        """Keeps a copy of a state before the model reads on, as long as the text may turn out to
        have ended there."""
        if isinstance(self.cache, StateCache) and self._states.maxlen:
            self._states.append(self.cache.copied(self.length, self.length))

    def take(self, token: Token) -> None:
        """Adds the next token to the answer, or ends it."""
        if token.id in self.request.ends:
            self.finish("stop")
            return
        self.ids.append(token.id)
        told = self._stream.add(token.id)
        self._text.append(told)
        if self._stream.is_over:
            if told:
                self._tell(Piece(told, ()))
            self._cut(ids_before(self._tokenizer, self.answer, self.request.stop))
            return
        self._tell(Piece(told, (token,)))
        if len(self.ids) == self.longest:
            self.finish("length")

    def _cut(self, answer: list[int]) -> None:
        """Ends the answer at a text; `answer` has the ids before it."""
        kept = 0
        for mine, theirs in zip(self.answer, answer, strict=False):
            if mine != theirs:
                break
            kept += 1
        self._end("stop", answer)
        length = len(self.request.prompt) + kept
        del self.ids[length:]
        if self.cache is not None and self.length > length:
            states = [state for state in self._states if state.lengths == [length]]
            if isinstance(self.cache, StateCache) and states:
                self.cache = states[0]
            elif self.cache.cut(length) != length:
                self.ids = []

    def finish(self, reason: Literal["stop", "length", "cancelled"]) -> None:
        """Ends the answer where it is."""
        if told := self._stream.end():
            self._text.append(told)
            self._tell(Piece(told, ()))
        self._end(reason, self.answer)

    def _end(self, reason: Literal["stop", "length", "cancelled"], answer: list[int]) -> None:
        self._tell(Ended(reason, tuple(answer), "".join(self._text)))
        self.is_told = True

    def cancelled(self) -> None:
        """Ends the answer because nobody wants it any more."""
        if not self.is_told:
            self.finish("cancelled")

    def fail(self, why: str) -> None:
        """Tells that the request cannot go on."""
        if not self.is_told:
            self._tell(Failed(why))
            self.is_told = True

    def _tell(self, event: Event) -> None:
        try:
            self._tell_(event)
        except Exception:  # nobody is there to hear of it
            self.handle.cancel()
