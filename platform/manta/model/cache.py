"""Caches: what a model remembers of the tokens that it has seen. A GPT remembers their keys and
values, an LSTM one state after all of them.

Shapes: B batch, T new tokens, K key/value heads, D head size, S cached tokens, L layers,
C channels.
"""

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from manta.model.attention import DocumentMask, attend
from manta.model.inference import send
from manta.model.shape import ModelConfig


class Cache:
    """What a model remembers of B texts, in `store`, whose third dimension is B. `lengths` has the
    number of tokens seen of each."""

    store: Tensor
    lengths: list[int]

    def row(self, row: int) -> Self:
        """A view of one row, in the same memory; only its `lengths` are separate."""
        part = copy.copy(self)
        part.store = self.store[:, :, row : row + 1]
        part.lengths = self.lengths[row : row + 1]
        return part

    @property
    def nbytes(self) -> int:
        """The bytes of `store`."""
        return self.store.nbytes

    def longest(self, T: int) -> int:
        """The length of the longest text with T new tokens."""
        return max(self.lengths) + T

    def advance(self, T: int) -> None:
        """Counts T new tokens."""
        self.lengths = [length + T for length in self.lengths]

    def copied(self, length: int, capacity: int) -> Self:
        """Another cache with the first `length` tokens of the only row, for up to `capacity`; it
        must be possible to cut this one to that length."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forgets all tokens."""
        self.cut(0)

    def cut(self, length: int) -> int:
        """Forgets tokens at the end of each row until `length` are left; each row has at least as
        many. Returns how many are left, which is fewer if the cache cannot go back there."""
        raise NotImplementedError

    def keep(self, rows: list[int]) -> None:
        """Keeps only these rows, in this order."""
        self.store = self.store.index_select(2, send(torch.tensor(rows), self.store.device))
        self.lengths = [self.lengths[row] for row in rows]


class StateCache(Cache):
    """The hidden state and the cell state of an LSTM after the tokens seen so far, (2, L, B, C).
    Rows may have seen different numbers of tokens."""

    def __init__(self, c: ModelConfig, batch: int, device: torch.device):
        self.store = torch.zeros(2, c.n_layer, batch, c.n_embd, device=device)
        self.lengths = [0] * batch

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """Both states, (L, B, C) each."""
        return self.store[0].contiguous(), self.store[1].contiguous()

    def replace(self, state: tuple[Tensor, Tensor], T: int) -> None:
        """Puts the states after T more tokens in the place of those before them."""
        self.advance(T)  # first, as Ctrl-C may come between: `cut` then finds too many tokens
        for mine, new in zip(self.store, state, strict=True):
            mine.copy_(new)

    def cut(self, length: int) -> int:
        """Keeps everything or nothing: the states before the last ones are gone."""
        if set(self.lengths) == {length}:
            return length
        self.lengths = [0] * len(self.lengths)
        self.store.zero_()
        return 0

    def copied(self, length: int, capacity: int) -> Self:
        del capacity  # a state is of one size
        assert self.lengths == [length], "a state cannot go back"
        other = copy.copy(self)
        other.store, other.lengths = self.store.clone(), [length]
        return other

    @staticmethod
    def joined(parts: Sequence["StateCache"]) -> "StateCache":
        """One cache with a copy of the rows of several."""
        other = copy.copy(parts[0])
        other.store = torch.cat([part.store for part in parts], dim=2)
        other.lengths = [length for part in parts for length in part.lengths]
        return other


class KVCache(Cache):
    """Keys and values of the tokens seen so far, for every layer: (B, K, S, D) each.

    Rows may have seen different numbers of tokens; they then take one token at a time. Both the
    host (`lengths`, for slices) and the device (`starts`, for positions) have these numbers, so
    that a step transfers nothing between them.
    """

    def __init__(self, c: ModelConfig, batch: int, length: int, device: torch.device):
        shape = (c.n_layer, 2, batch, c.kv_heads, length, c.head_size)
        dtype = None
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        # Attention gives a shorter row's free places weight 0. They must be zero too, because
        # uninitialised memory may contain NaN, and 0 times NaN is NaN. A single row's are never
        # looked at, and on a CPU take no memory before they are used.
        make = torch.empty if batch == 1 else torch.zeros
        self.store = make(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch
        self._starts = torch.zeros(batch, 1, dtype=torch.long, device=device)

    @property
    def starts(self) -> Tensor:
        """The position of the next token: (B, 1), or (1, 1) if it is the same for all rows."""
        return self._starts[:1] if self._is_even else self._starts

    @property
    def _is_even(self) -> bool:
        """Whether all rows have seen the same number of tokens."""
        return len(set(self.lengths)) == 1

    @property
    def capacity(self) -> int:
        """The most tokens of a row."""
        return self.store.size(4)

    def positions(self, T: int) -> Tensor:
        """The positions of T new tokens, (B, T), or (1, T) if they are the same for all rows."""
        return self.starts + torch.arange(T, device=self.store.device)

    def mask(self, T: int) -> Tensor | None:
        """The mask of what T new tokens of each row see, (B or 1, 1, T, S); None: they see
        everything, or each other causally."""
        past = max(self.lengths)
        if past == 0 or (T == 1 and self._is_even):
            return None
        seen = self.positions(T)
        assert T == 1 or len(seen) == 1, "rows of different lengths take one token at a time"
        keys = torch.arange(past + T, device=self.store.device)
        return (keys <= seen.unsqueeze(2)).unsqueeze(1)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: DocumentMask | None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Appends T new keys and values to those of `layer`, and computes attention over all,
        (B, H, T, D), of (B, H, T, D) queries."""
        k, v = self.extend(layer, k, v)
        return attend(q.to(v.dtype), k, v, mask, mask is None and q.size(2) > 1, dropout)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends T new keys and values to those of `layer`; returns all, (B, K, S + T, D)."""
        keys, values = self.store[layer]
        start, T = self.lengths[0], k.size(2)
        if self._is_even:
            keys[:, :, start : start + T], values[:, :, start : start + T] = k, v
        else:
            rows = torch.arange(len(keys), device=keys.device)
            at = self._starts.squeeze(1)
            keys[rows, :, at], values[rows, :, at] = k[:, :, 0].to(keys), v[:, :, 0].to(keys)
        end = max(self.lengths) + T
        return keys[:, :, :end], values[:, :, :end]

    def row(self, row: int) -> Self:
        part = super().row(row)
        part._starts = self._starts[row : row + 1]
        return part

    def advance(self, T: int) -> None:
        """Counts T new tokens, after every layer has been extended by them."""
        super().advance(T)
        self._starts += T

    def cut(self, length: int) -> int:
        self.lengths = [length] * len(self.lengths)
        self._starts.fill_(length)
        return length

    def copied(self, length: int, capacity: int) -> Self:
        L, two, B, K, _, D = self.store.shape
        assert B == 1 and length <= min(capacity, self.lengths[0])
        other = copy.copy(self)
        other.store = self.store.new_empty(L, two, B, K, capacity, D)
        other.store[..., :length, :] = self.store[..., :length, :]
        other._starts = self._starts.clone()
        other.cut(length)
        return other

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self._starts = self._starts[send(torch.tensor(rows), self.store.device)]
