"""Attention within documents: its masks, its positions, and which kernel takes which mask.

Shapes: B batch, T sequence, S keys, H heads, K key/value heads, D head size.

`documents`, (B, T), has the number of each token's document; numbers never decrease along a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from manta.model import cpu_attention
from manta.model.compilation import compiled

# A block mask is for flex_attention, which skips the blocks of other documents. A (B, 1, T, T)
# tensor of booleans is for scaled_dot_product_attention, which computes these and drops them.
DocumentMask = BlockMask | Tensor


def document_positions(documents: Tensor) -> Tensor:
    """The position of each token in its own document, (B, T), from 0."""
    index = torch.arange(documents.size(1), device=documents.device)
    opens = F.pad(documents.diff(dim=1), (1, 0)) != 0  # index 0 opens one too, but is 0 anyway
    return index - (index * opens).cummax(dim=1).values


def branch_positions(branches: Tensor) -> Tensor:
    """The position of each token, (B, T).

    `branches`, (B, T) integers, is 0 for a common beginning, then 1, 2, ... for its possible
    continuations. Each continuation starts where the beginning ends.
    """
    return document_positions(branches) + (branches > 0) * (branches == 0).sum(1, keepdim=True)


def branch_mask(branches: Tensor) -> Tensor:
    """The (B, 1, T, T) mask that shows a token the beginning and its own branch, up to itself."""
    query, key = branches.unsqueeze(2), branches.unsqueeze(1)
    return ((key == 0) | (key == query)).tril().unsqueeze(1)


def has_flex_kernel(device: torch.device, head_size: int, dropout: float) -> bool:
    """Whether flex_attention can train here. It has no dropout and, on the CPU, no gradient; its
    kernel multiplies tiles of at least 16."""
    return device.type == "cuda" and head_size >= 16 and not dropout


def document_mask(documents: Tensor, flex: bool) -> DocumentMask:
    """A mask that shows a token itself and the earlier tokens of its document; for flex_attention
    if `flex`."""
    if not flex:
        same = documents.unsqueeze(2) == documents.unsqueeze(1)  # (B, T, T), query before key
        return same.tril().unsqueeze(1)

    def sees(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    B, T = documents.shape
    # Uncompiled, create_block_mask first makes all B x T x T pairs, for every micro batch.
    make = compiled(create_block_mask) if documents.is_cuda else create_block_mask
    return make(sees, B, None, T, T, device=documents.device)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | None, causal: bool, dropout: float
) -> Tensor:
    """Computes attention, (B, H, T, D), of (B, H, T, D) queries and (B, K, S, D) keys and values.

    The kind of mask decides the kernel; there is no silent fallback to another one.
    """
    gqa = q.size(1) != k.size(1)
    if isinstance(mask, BlockMask):
        assert not causal and not dropout, "flex_attention has no dropout; the mask is causal"
        # Uncompiled, flex_attention is for tests on the CPU: it makes all T x T scores and has no
        # gradient. Compiled, it takes the documents as an input, so new masks need no compilation.
        kernel: Any = compiled(flex_attention) if q.is_cuda else flex_attention
        # The backend is TRITON because for T < 128, AUTO takes the decoding kernel, which refuses
        # some numbers of grouped queries.
        return kernel(
            q, k, v, block_mask=mask, enable_gqa=gqa, kernel_options={"BACKEND": "TRITON"}
        )
    # Only training uses Manta's kernel: sampling and scoring keep torch's own results.
    bf16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if causal and bf16_on_cpu and not dropout and torch.is_grad_enabled() and cpu_attention.pays():
        return cpu_attention.causal_attention(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=gqa
    )


def fused_kernels(device: torch.device, dtype: torch.dtype, head_size: int) -> list[str]:
    """The kernels without T x T scores that scaled_dot_product_attention has on a GPU for causal
    training without a mask: "flash", "cudnn", both, or none."""
    q = torch.empty(1, 1, 128, head_size, device=device, dtype=dtype, requires_grad=True)
    asked = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, True, False)
    found = {
        "flash": torch.backends.cuda.can_use_flash_attention(asked),
        "cudnn": torch.backends.cuda.can_use_cudnn_attention(asked),
    }
    return [name for name, can in found.items() if can]
