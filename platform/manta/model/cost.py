"""What a model costs to train: parameters and floating-point operations.

Pure arithmetic. The bytes are in `memory.py`.
"""

import dataclasses
import math
from typing import Literal

from manta.model.groups import Group, group_of
from manta.model.lora import LoraConfig
from manta.model.shape import ModelConfig
from manta.model.trainable import Trainable, blocks_trained

NO_ADAPTERS = LoraConfig()
Kind = Literal["embedding", "positions", "attention", "mlp", "norms", "head"]


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
    target: str = ""
    """The name by which `LoraConfig.targets` has this linear layer's weight."""

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
    """Lists every weight tensor of `GPT(c)`, a tied one once, without allocating any."""
    C, F, L, rows = c.n_embd, c.hidden, c.n_layer, c.padded_vocab_size
    heads = (c.n_head + 2 * c.kv_heads) * c.head_size
    found = [Weight("embedding", (rows, C), 1)]
    if c.family == "gpt2":
        found.append(Weight("positions", (c.context_length, C), 1))

    def linear(target: str, kind: Kind, out: int, into: int, bias: bool) -> None:
        found.append(Weight(kind, (out, into), L, in_block=True, is_linear=True, target=target))
        if bias:
            found.append(Weight(kind, (out,), L, in_block=True))

    linear("qkv", "attention", heads, C, c.has_qkv_bias)
    linear("out", "attention", C, c.query_size, c.has_bias)
    if c.family == "modern":
        linear("gate", "mlp", F, C, False)
    linear("up", "mlp", F, C, c.has_bias)
    linear("down", "mlp", C, F, c.has_bias)
    per_norm = 2 if c.family == "gpt2" and c.has_bias else 1  # scale and shift
    found.append(Weight("norms", (C,), 2 * L * per_norm, in_block=True))
    found.append(Weight("norms", (C,), per_norm))
    if c.qk_norm:
        found.append(Weight("norms", (c.head_size,), 2 * L, in_block=True))
    if not c.tie_embeddings:
        found.append(Weight("head", (c.head_rows, C), 1))
    return found


def adapters(c: ModelConfig, lora: LoraConfig) -> list[Weight]:
    """Lists the weight tensors of the adapters of `GPT(c)`; none if it has no adapters."""
    rank, targets = lora.rank, lora.for_model(c).targets or ()
    if rank is None:
        return []
    found = []
    for w in weights(c):
        if w.target in targets:
            for shape in ((rank, w.shape[1]), (w.shape[0], rank)):
                found.append(dataclasses.replace(w, shape=shape, target=""))
    return found


def learning(
    c: ModelConfig, which: Trainable = "all", lora: LoraConfig = NO_ADAPTERS
) -> list[Weight]:
    """Lists the weight tensors of `GPT(c)`, with its adapters, that learn."""
    found = weights(c)
    if lora.rank is not None:
        kinds = ("embedding", "head") if lora.embeddings else ("head",) if c.labels else ()
        return adapters(c, lora) + [w for w in found if w.kind in kinds]
    if which == "all":
        return found
    blocks = blocks_trained(which, c.n_layer)
    ours = [w for w in found if w.in_block or w.kind in ("norms", "head")]
    counts = [w.count // c.n_layer * blocks if w.in_block else w.count for w in ours]
    return [dataclasses.replace(w, count=n) for w, n in zip(ours, counts, strict=True) if n]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters by their purpose, each counted once, so a tied head has 0. The vocabulary includes
    its padding, as it is allocated."""

    embedding: int = 0
    positions: int = 0
    attention: int = 0
    mlp: int = 0
    norms: int = 0
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


def flops_per_token(
    c: ModelConfig,
    seq_len: int,
    which: Trainable = "all",
    lora: LoraConfig = NO_ADAPTERS,
) -> float:
    """Forward and backward FLOPs per token, 6 N + 12 L H D T: the numerator of MFU.

    Of the 6 a parameter, 2 are the forward pass, 2 the gradient of a layer's input, which the
    backward pass needs down to the first weight that learns, and 2 the gradient of the parameter,
    if it learns.

    N counts every parameter that multiplies. The position table and an untied embedding are only
    looked up, so they do not count; neither do the rows that pad the vocabulary. 12 L H D T
    is attention as if it were not causal (Chowdhery et al. 2022, PaLM, appendix B). nanoGPT and
    most others count the same way, so that MFUs can be compared. Work that activation checkpointing
    repeats is not counted: a model that is slower because of it has a lower MFU.
    """
    assert c.vocab_size is not None
    reached = c.n_layer if lora.rank is not None else blocks_trained(which, c.n_layer)
    every, learnt = weights(c) + adapters(c, lora), learning(c, which, lora)
    in_blocks = sum(w.total for w in every if w.in_block)
    # The head, tied or not, multiplies by one row per token id.
    head = 0 if c.labels else c.vocab_size * c.n_embd  # a classifier's is for one token of a text
    last = head + sum(w.total for w in every if w.kind == "norms" and not w.in_block)
    learns = sum(w.total for w in learnt if w.in_block or w.kind == "norms")
    if any(w.kind == ("embedding" if c.tie_embeddings else "head") for w in learnt):
        learns += head
    inputs = last + in_blocks // c.n_layer * reached
    attention = c.query_size * seq_len * (4.0 * c.n_layer + 8.0 * reached)
    return 2.0 * (in_blocks + last + inputs + learns) + attention
