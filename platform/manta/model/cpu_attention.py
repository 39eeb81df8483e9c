"""Causal attention in bf16 on a CPU, by whole matrix products.

Shapes: B batch, T sequence, H heads, K key/value heads, G = H / K, D head size.

torch's own kernel for CPUs computes bf16 in fp32, unless the processor has AMX. On a processor with
bf16 instructions but without AMX, bf16 products take half of that kernel's time for T = 256
(forward and backward; 0.7 of it for T = 1024), although they compute the scores twice. As in every
bf16 product, the results are rounded to bf16, the scores too.

T x T scores are never held. They are computed for some rows of some sequences at once, against the
keys up to the last of these rows, and again in the backward pass.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of queries at once. Fewer rows waste less on unseen keys, but make the products small.
ROWS = 128
# Scores at once: about what the caches hold, but at least those of one sequence.
SCORES = 1 << 21

_HAS_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def pays() -> bool:
    """Whether this attention is faster than torch's own on this CPU. (It does not check for bf16
    instructions: without them, nobody computes in bf16.)"""
    return not _HAS_AMX


class _Part(NamedTuple):
    """Some rows of some sequences; a sequence's last rows come first.

    n is the number of these sequences times key/value heads; R is G times the number of rows.
    """

    sequences: slice
    rows: slice
    q: Tensor
    """(n, R, D): the queries, scaled"""
    k: Tensor
    """(n, S, D): the keys up to the last row"""
    v: Tensor
    """(n, S, D): the values up to the last row"""
    probabilities: Tensor
    """(n, R, S): the softmax of the scores"""


def _parts(q: Tensor, k: Tensor, v: Tensor) -> Iterator[_Part]:
    B, H, T, D = q.shape
    groups = H // k.size(1)
    side = min(ROWS, T)
    unseen = torch.full((side, side), -torch.inf, dtype=q.dtype).triu_(1)
    count = max(1, SCORES // (H * side * T))
    for first in range(0, B, count):
        some = slice(first, first + count)
        keys, values = k[some].reshape(-1, T, D), v[some].reshape(-1, T, D)
        for start in reversed(range(0, T, ROWS)):
            end = min(T, start + ROWS)
            rows, size = slice(start, end), end - start
            mine = (q[some, :, rows] * D**-0.5).reshape(-1, groups * size, D)
            scores = torch.bmm(mine, keys[:, :end].transpose(1, 2))
            # All of these rows see the keys before them.
            scores.view(-1, groups, size, end)[..., start:] += unseen[:size, :size]
            probabilities = torch.softmax(scores, -1)
            yield _Part(some, rows, mine, keys[:, :end], values[:, :end], probabilities)


@torch.library.custom_op("manta::causal_attention", mutates_args=())
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes attention, (B, H, T, D), of (B, H, T, D) queries and (B, K, T, D) keys and values.

    The result is laid out by token, as the next layer reads it.
    """
    B, H, T, D = q.shape
    out = q.new_empty(B, T, H, D).transpose(1, 2)
    for part in _parts(q, k, v):
        rows = torch.bmm(part.probabilities, part.v)
        out[part.sequences, :, part.rows] = rows.view(-1, H, rows.size(1) * k.size(1) // H, D)
    return out


@causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    del k, v
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


@torch.library.custom_op("manta::causal_attention_backward", mutates_args=())
def _backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes the gradients of queries, keys and values in one tensor, (B, T, H + 2K, D), in the
    order in which one layer makes queries, keys and values."""
    (B, H, T, D), K = q.shape, k.size(1)
    found = q.new_empty(B, T, H + 2 * K, D)
    d_q, d_k, d_v = found.transpose(1, 2).split([H, K, K], dim=1)
    for part in _parts(q, k, v):
        end, mine = part.k.size(1), d_out[part.sequences, :, part.rows].reshape(part.q.shape)
        d_probabilities = torch.bmm(mine, part.v.transpose(1, 2))
        d_scores = torch.ops.aten._softmax_backward_data(
            d_probabilities, part.probabilities, -1, q.dtype
        )
        rows = torch.bmm(d_scores, part.k).view(-1, H, part.q.size(1) * K // H, D)
        d_q[part.sequences, :, part.rows] = rows * D**-0.5
        more_k = torch.bmm(d_scores.transpose(1, 2), part.q)
        more_v = torch.bmm(part.probabilities.transpose(1, 2), mine)
        if end == T:  # these rows see all keys; the other rows' parts are added in fp32
            sum_k, sum_v = more_k.float(), more_v.float()
        else:
            sum_k[:, :end] += more_k
            sum_v[:, :end] += more_v
        if part.rows.start == 0:
            d_k[part.sequences] = sum_k.view(-1, K, T, D)
            d_v[part.sequences] = sum_v.view(-1, K, T, D)
    return found


@_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    del d_out, v
    (B, H, T, D), K = q.shape, k.size(1)
    return q.new_empty(B, T, H + 2 * K, D)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    del output  # torch passes `output` by its name
    ctx.save_for_backward(*inputs)


def _gradients(ctx: torch.autograd.function.FunctionCtx, d_out: Tensor) -> tuple[Tensor, ...]:
    q, k, v = ctx.saved_tensors  # type: ignore[attr-defined]
    found = _backward(d_out, q, k, v).transpose(1, 2)
    return tuple(found.split([q.size(1), k.size(1), k.size(1)], dim=1))


causal_attention.register_autograd(_gradients, setup_context=_save)
