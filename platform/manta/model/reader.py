"""A text that grows, read with a cache that is kept: only what is new is computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from manta.model.gpt import LanguageModel
from manta.model.inference import send


class Reader:
    """Computes the logits after a text, and remembers what the model knows of all of it.

    Make and use it within `inference`, which decides the cache's precision.
    """

    def __init__(self, model: LanguageModel):
        self._model = model.eval()
        self._device = model.embedding.weight.device
        self.context_length = model.config.context_length
        self._cache = model.new_cache(1, self.context_length)
        self._read: list[int] = []

    def logits(self, ids: list[int]) -> Tensor:
        """Computes the (1, V) logits after `ids`, at most `context_length` of them.

        The cache keeps what these ids and those of the call before have in common at their
        beginning, so a text may grow, be cut off, or go on in another way.
        """
        assert 0 < len(ids) <= self.context_length
        # The last one gives the logits. An LSTM that cannot go back reads all of them again.
        kept = self._cache.cut(min(common(self._read, ids), len(ids) - 1))
        del self._read[kept:]
        new = send(torch.tensor([ids[kept:]]), self._device)
        logits = self._model(new, cache=self._cache, last_only=True)[:, -1]
        self._read += ids[kept:]  # last, as Ctrl-C may come before
        return logits


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of ids with which both begin."""
    if second[: len(first)] == first:  # the usual case
        return len(first)
    if first[: len(second)] == second:
        return len(second)
    pairs = zip(first, second, strict=False)
    return next(n for n, (a, b) in enumerate(pairs) if a != b)
