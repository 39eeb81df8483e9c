"""The engine: requests from any thread, and one thread of its own that runs the model."""

import contextlib
import queue
import threading

import torch

from manta.model.activations import Dtype
from manta.model.gpt import LanguageModel
from manta.model.inference import inference
from manta.model.onednn import packed, pays
from manta.serve.engine.batch import Batch, Counts, why
from manta.serve.engine.budget import CHUNK, MOST_RUNNING
from manta.serve.engine.request import Request, Tell
from manta.serve.engine.row import Handle, Row
from manta.text.tokenizer import Tokenizer

CLOSED = "the engine is closed"


class Engine:
    """Runs a model for many requests. From any thread; `close` it in the end."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        device: torch.device,
        dtype: Dtype,
        cache_bytes: int,
        most_running: int = MOST_RUNNING,
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
        self._model, self._tokenizer = model.eval(), tokenizer
        self._device, self._dtype = device, dtype
        self._batch = Batch(
            model,
            dtype,
            tokenizer.vocab_size,
            limit=cache_bytes,
            most_running=most_running,
            chunk=prefill_chunk or CHUNK[device.type],
        )
        self._inbox: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._counts = self._batch.counts()
        self._lock = threading.Lock()  # so that no request comes after the last one
        self._ended: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return self._batch.context_length

    def submit(self, request: Request, tell: Tell) -> Handle:
        """Takes a request; returns at once. `tell` gets its events in the engine's thread."""
        handle = Handle()
        row = Row(request, tell, handle, self._tokenizer, self.context_length)
        with self._lock:
            if self._ended is None:
                self._inbox.put(row)
                return handle
        row.fail(self._ended)
        return handle

    def counts(self) -> Counts:
        """What the engine does now, and what it has done."""
        return self._counts

    def close(self) -> None:
        """Ends all requests as cancelled, and the engine's thread; returns when it has ended."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        fast = pays(self._device, self._dtype)
        ended = CLOSED
        try:
            with (
                packed(self._model) if fast else contextlib.nullcontext(),
                torch.inference_mode(),
                inference(self._device, self._dtype),
            ):
                while self._take():
                    self._batch.step()
                    self._counts = self._batch.counts()
        except BaseException as e:
            ended = f"the engine has stopped ({why(e)}): start the server again"
            raise
        finally:
            self._end(ended)

    def _take(self) -> bool:
        """Takes the requests that have come, and waits for one if there is nothing to do; returns
        whether the engine stays open."""
        while self._batch.is_idle or not self._inbox.empty():
            row = self._inbox.get()
            if row is None:
                return False
            self._batch.add(row)
        return True

    def _end(self, why: str) -> None:
        """Ends all requests that are there, and those that come later."""
        with self._lock:
            self._ended = why
            rows = [*self._batch.running, *self._batch.waiting]
            while not self._inbox.empty():
                if (row := self._inbox.get()) is not None:
                    rows.append(row)
        for row in rows:
            if why == CLOSED:
                row.cancelled()
            else:
                row.fail(why)
