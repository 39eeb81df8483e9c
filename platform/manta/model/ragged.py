"""Several texts' caches in one pass of a GPT, which reads some new tokens of each.

Shapes: N new tokens of all texts, one after the other; H heads, K key/value heads, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from manta.model.attention import DocumentMask
from manta.model.cache import KVCache
from manta.model.inference import send


class Ragged:
    """The caches of texts of any lengths, for one pass. To the model it is the cache of one row of
    N tokens.

    All that a model does with each token by itself, it does with all N at once. Attention is
    computed text by text, over exactly the tokens that a text has: nothing is masked because
    another text is longer, and the bits of a text's result do not depend on the others.
    """

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int], padding: int = 0):
        """Args:
        caches: of one text each, with room for its new tokens.
        counts: the number of new tokens of each, at least one.
        padding: tokens at the end of the row that belong to no text.
        """
        self._parts: list[tuple[KVCache, slice, Tensor | None]] = []
        places: list[int] = []
        for cache, count in zip(caches, counts, strict=True):
            (start,) = cache.lengths
            tokens = slice(len(places), len(places) + count)
            self._parts.append((cache, tokens, cache.mask(count)))
            places += range(start, start + count)
        self._padding = padding
        places += [0] * padding
        self._places = send(torch.tensor([places]), caches[0].store.device)

    def longest(self, _T: int) -> int:
        """The length of the longest text with its new tokens."""
        return max(
            cache.lengths[0] + tokens.stop - tokens.start for cache, tokens, _ in self._parts
        )

    def positions(self, _T: int) -> Tensor:
        """The position of each token in its text, (1, N)."""
        return self._places

    def mask(self, _T: int) -> None:
        """Nothing: each text has a mask of its own."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _mask: DocumentMask | None,
        dropout: float,
    ) -> Tensor:
        """Computes attention, (1, H, N, D), of (1, H, N, D) queries, after the (1, K, N, D) keys
        and values were appended to those of their texts."""
        found = [
            cache.attend(layer, q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], mask, dropout)
            for cache, tokens, mask in self._parts
        ]
        if self._padding:
            _, H, _, D = q.shape
            found.append(found[0].new_zeros(1, H, self._padding, D))
        return torch.cat(found, dim=2)

    def advance(self, _T: int) -> None:
        """Counts the new tokens of each text."""
        for cache, tokens, _ in self._parts:
            cache.advance(tokens.stop - tokens.start)
