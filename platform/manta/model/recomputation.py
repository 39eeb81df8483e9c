"""Activation checkpointing: what a block keeps for its backward pass, and what it recomputes."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from manta.model.cpu_attention import causal_attention

# none: a block keeps everything. selective: it keeps the results of matrix products and attention,
# and recomputes the cheap rest (norms, activations, rotations). full: it keeps only its input.
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
    """Returns `function(*arguments)`, and keeps what `mode` says for the backward pass."""
    if mode == "none" or not torch.is_grad_enabled():
        return function(*arguments)
    if mode == "full":
        return checkpoint(function, *arguments, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, EXPENSIVE)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)
