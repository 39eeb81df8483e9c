"""Activation checkpointing: what a block keeps for its backward pass, and what it computes anew."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from manta.model.cpu_attention import causal_attention

# none: everything is kept. selective: what matrix products and attention give is kept, the cheap
# rest (norms, activations, rotations) is computed anew. full: a block keeps its input alone.
Recompute = Literal["none", "selective", "full"]

Found = TypeVar("Found")

_aten = torch.ops.aten
EXPENSIVE = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
    causal_attention._opoverload,
]


def recomputing(mode: Recompute, function: Callable[..., Found], *arguments: Any) -> Found:
    """`function(*arguments)`, of which the backward pass keeps what `mode` says."""
    if mode == "none" or not torch.is_grad_enabled():
        return function(*arguments)
    if mode == "full":
        return checkpoint(function, *arguments, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, EXPENSIVE)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)
