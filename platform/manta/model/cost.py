"""What a model costs to train: parameters and floating-point operations.

Pure arithmetic. The bytes are in `memory.py`.
"""

import dataclasses
import math
from typing import Literal

from manta.model.groups import Group, group_of
from manta.model.shape import ModelConfig

Kind = Literal["embedding", "positions", "attention", "mlp", "norms", "lstm", "head"]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight tensor that is in the model `count` times."""

    kind: Kind
    shape: tuple[int, ...]
    count: int
    in_block: bool = False
    is_linear: bool = False
    """Whether this is a linear layer's weight in a block. Autocast copies those (the head makes its
    own copies)."""

    @property
    def group(self) -> Group:
        return group_of(len(self.shape), in_block=self.in_block, is_head=self.kind == "head")

    @property
    def numel(self) -> int:
        """Elements of one tensor."""
        return math.prod(self.shape)

    @property
    def total(self) -> int:
        """Elements of all `count` tensors."""
        return self.numel * self.count


def weights(c: ModelConfig) -> list[Weight]:
    """Lists every weight tensor of a model of config `c`, a tied one once, without allocating
    any."""
    if c.is_recurrent:
        return _weights_of_lstm(c)
    C, F, L, rows = c.n_embd, c.hidden, c.n_layer, c.padded_vocab_size
    heads = (c.n_head + 2 * c.kv_heads) * c.head_size
    found = [Weight("embedding", (rows, C), 1)]
    if c.family == "gpt2":
        found.append(Weight("positions", (c.context_length, C), 1))

    def linear(kind: Kind, out: int, into: int, bias: bool, count: int = L) -> None:
        found.append(Weight(kind, (out, into), count, in_block=True, is_linear=True))
        if bias:
            found.append(Weight(kind, (out,), count, in_block=True))

    linear("attention", heads, C, c.has_qkv_bias)
    linear("attention", C, c.query_size, c.has_bias)
    linear("mlp", F, C, c.has_bias, L if c.family == "gpt2" else 2 * L)
    linear("mlp", C, F, c.has_bias)
    per_norm = 2 if c.family == "gpt2" and c.has_bias else 1  # scale and shift
    found.append(Weight("norms", (C,), 2 * L * per_norm, in_block=True))
    found.append(Weight("norms", (C,), per_norm))
    if c.qk_norm:
        found.append(Weight("norms", (c.head_size,), 2 * L, in_block=True))
    if not c.tie_embeddings:
        found.append(Weight("head", (rows, C), 1))
    return found


def _weights_of_lstm(c: ModelConfig) -> list[Weight]:
    C, L, rows = c.n_embd, c.n_layer, c.padded_vocab_size
    found = [
        Weight("embedding", (rows, C), 1),
        # The four gates, of the layer before and of the state; a bias for each.
        Weight("lstm", (4 * C, C), 2 * L, in_block=True, is_linear=True),
        Weight("lstm", (4 * C,), 2 * L, in_block=True),
    ]
    return found if c.tie_embeddings else [*found, Weight("head", (rows, C), 1)]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters by their purpose, each counted once, so a tied head has 0. The vocabulary includes
    its padding, as it is allocated."""

    embedding: int = 0
    positions: int = 0
    attention: int = 0
    mlp: int = 0
    norms: int = 0
    lstm: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def parameters(c: ModelConfig) -> Parameters:
    counts: dict[str, int] = {}
    for weight in weights(c):
        counts[weight.kind] = counts.get(weight.kind, 0) + weight.total
    return Parameters(**counts)


def hidden_matrices(c: ModelConfig) -> int:
    """Parameters in the blocks' matrices, which Muon optimizes; AdamW optimizes the rest."""
    return sum(w.total for w in weights(c) if w.group == "matrices")


def flops_per_token(c: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs per token, 6 N + 12 L H D T: the numerator of MFU.

    N counts every parameter that multiplies. The position table and an untied embedding are only
    looked up, so they do not count; neither do the rows that pad the vocabulary. 12 L H D T
    is attention as if it were not causal (Chowdhery et al. 2022, PaLM, appendix B). nanoGPT and
    most others count the same way, so that MFUs can be compared. An LSTM attends to nothing: its
    FLOPs are 6 N. Work that activation checkpointing repeats is not counted: a model that is slower
    because of it has a lower MFU.
    """
    assert c.vocab_size is not None
    found = parameters(c)
    # The head, tied or not, multiplies by one row per token id.
    head = c.vocab_size * c.n_embd
    n = found.attention + found.mlp + found.norms + found.lstm + head
    attention = 0.0 if c.is_recurrent else 12.0 * c.n_layer * c.query_size * seq_len
    return 6.0 * n + attention
