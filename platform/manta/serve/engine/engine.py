"""The engine: requests from any thread, and one thread of its own that runs the model."""

import contextlib
import dataclasses
import queue
import threading
from typing import Literal

import torch

from manta.model.generate import draws, pick
from manta.model.gpt import LanguageModel
from manta.model.inference import inference
from manta.model.reader import Reader
from manta.serve.engine.request import Ended, Failed, Piece, Request, Started, Tell, Token
from manta.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the engine does now, and what it has done since it was made."""

    running: int
    """Requests whose prompts are being read or whose answers are being written."""
    waiting: int
    """Requests that have come, for which there is no place yet."""
    generated: int
    """Tokens of answers."""
    prefilled: int
    """Tokens of prompts that were computed."""
    cached: int
    """Tokens of prompts that were in the cache, and were not computed."""
    requests: int
    """Requests whose prompts were read."""
    hits: int
    """The number of them of which at least one token was in the cache."""
    cache_bytes: int
    """Bytes of caches in use, those of running requests and those that are kept for later."""
    cache_limit: int
    """The most bytes of caches."""
    evicted: int
    """Beginnings of texts that were forgotten to make room."""


class Handle:
    """A request that was submitted."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        """Ends the request within a step; it is told `Ended`, with the reason "cancelled", unless
        it has ended before. From any thread."""
        self.is_cancelled = True


class Engine:
    """Runs a model for many requests. From any thread; `close` it in the end."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        device: torch.device,
        dtype: Literal["fp32", "bf16"],
        cache_bytes: int,
        most_running: int = 64,
        prefill_chunk: int | None = None,
    ):
        """Starts the engine's thread.

        Args:
            model: on `device`; nobody else uses it as long as the engine is open.
            cache_bytes: the most bytes for what the model remembers of texts.
            most_running: the most requests that are in a batch at once.
            prefill_chunk: the most tokens of prompts that are read between two tokens of the
                answers that are being written; None: what suits the device.
        """
        self._model, self._tokenizer = model, tokenizer
        self._device, self._dtype = device, dtype
        self._limit = cache_bytes
        self._most_running, self._prefill_chunk = most_running, prefill_chunk
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._counts = Counts(0, 0, 0, 0, 0, 0, 0, 0, cache_bytes, 0)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return self._model.config.context_length

    def submit(self, request: Request, tell: Tell) -> Handle:
        """Takes a request; returns at once. `tell` gets its events in the engine's thread."""
        handle = Handle()
        self._inbox.put((request, tell, handle))
        return handle

    def counts(self) -> Counts:
        """What the engine does now, and what it has done."""
        return self._counts

    def close(self) -> None:
        """Ends all requests as cancelled, and the engine's thread; returns when it has ended."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        with inference(self._device, self._dtype):
            reader = Reader(self._model)
            while (item := self._inbox.get()) is not None:
                request, tell, handle = item
                try:
                    self._answer(reader, request, tell, handle)
                except Exception as e:
                    tell(Failed(f"{type(e).__name__}: {e}"))

    def _answer(self, reader: Reader, request: Request, tell: Tell, handle: Handle) -> None:
        ids: list[int] = []
        text = ""
        tell(Started(0))
        numbers = draws([request.seed], self._device)
        reason: Literal["stop", "length", "cancelled"] = "length"
        room = min(request.max_tokens, self.context_length - len(request.prompt))
        with contextlib.suppress(StopIteration):
            while len(ids) < room:
                if handle.is_cancelled:
                    reason = "cancelled"
                    break
                logits = reader.logits([*request.prompt, *ids])
                token = int(pick(logits, request.sampling, next(numbers)))
                if token in request.ends:
                    reason = "stop"
                    break
                ids.append(token)
                new = self._tokenizer.decode([token])
                text += new
                tell(Piece(new, (Token(token),)))
        tell(Ended(reason, tuple(ids), text))
