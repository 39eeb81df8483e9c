"""The head: logits, or the cross-entropy of their targets without ever holding all logits.

Shapes: N tokens, C channels, V vocabulary, P padded vocabulary (V up to a multiple of 128).

The logits of a chunk of tokens are made, turned into the loss and its gradient, and dropped: the
whole (N, P) would be most of a small model's memory, and pass through it several times. The
gradient is made in the forward pass, so that no logits are computed twice.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORED = -1  # a target that no loss counts
# Tokens whose logits exist at once. CPU: fits its caches, and is long enough for matrix products.
CPU_CHUNK = 1024
GPU_CHUNK = 2048


def loss_chunk(device: torch.device) -> int:
    """Tokens whose logits exist at once on this device."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


class Head(nn.Linear):
    """(..., C) to (..., V). Its weight has P rows; those beyond V are no token's, and neither a
    logit nor a loss sees them."""

    def __init__(self, n_embd: int, vocab_size: int, padded_vocab_size: int):
        super().__init__(n_embd, padded_vocab_size, bias=False)
        self.vocab_size = vocab_size

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """Logits (..., V) or, with targets (...), the cross-entropy in nats: its mean over the
        targets that count, or (without a gradient) each, 0 where ignored."""
        if targets is None:
            return super().forward(x)[..., : self.vocab_size]
        compute = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            compute = torch.get_autocast_dtype(x.device.type)
        x, flat = x.flatten(0, -2), targets.flatten()
        if reduction == "none":
            assert not torch.is_grad_enabled(), "each target's loss has no gradient"
            return _each(x, self.weight, flat, self.vocab_size, compute).view_as(targets)
        if torch.is_grad_enabled():
            return _MeanLoss.apply(x, self.weight, flat, self.vocab_size, compute)
        nats = _each(x, self.weight, flat, self.vocab_size, compute)
        return nats.sum() / _count(flat)


def _count(targets: Tensor) -> Tensor:
    """How many targets count; 1 if none does, so that their mean is 0 and not 0/0."""
    return (targets != IGNORED).sum().clamp(min=1)


def _log_softmax(x: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    logits = x @ weight.T
    logits[:, vocab_size:] = -torch.inf
    return torch.log_softmax(logits, dim=1, dtype=torch.float32)


def _nats(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """(N,) minus the log-probability of each target; 0 where ignored."""
    picked = log_probabilities.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return -picked.masked_fill(targets == IGNORED, 0.0)


def _each(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, compute: torch.dtype
) -> Tensor:
    chunk = loss_chunk(x.device)
    with torch.autocast(x.device.type, enabled=False):
        weight = weight.to(compute)
        parts = [
            _nats(_log_softmax(rows.to(compute), weight, vocab_size), those)
            for rows, those in zip(x.split(chunk), targets.split(chunk), strict=True)
        ]
    return torch.cat(parts)


class _MeanLoss(torch.autograd.Function):
    """The mean over the targets that count, with its gradient: softmax minus one-hot."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, compute: torch.dtype
    ) -> Tensor:
        chunk = loss_chunk(x.device)
        total = torch.zeros((), device=x.device)
        d_x = torch.empty_like(x)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            weight = weight.to(compute)
            for start in range(0, len(x), chunk):
                part = slice(start, start + chunk)
                rows, those = x[part].to(compute), targets[part]
                gradient = _log_softmax(rows, weight, vocab_size)
                total += _nats(gradient, those).sum()
                gradient.exp_()
                at = those.clamp(min=0).unsqueeze(1)
                gradient.scatter_add_(1, at, gradient.new_full((), -1.0).expand_as(at))
                gradient.masked_fill_((those == IGNORED).unsqueeze(1), 0.0)
                gradient = gradient.to(compute)
                d_x[part] = gradient @ weight
                if compute == torch.float32:
                    d_weight.addmm_(gradient.T, rows)
                else:
                    d_weight += gradient.T @ rows
        count = _count(targets)
        ctx.count, ctx.gradients = count, (d_x, d_weight)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place: the weight's gradient is as large as the weight.
        d_x, d_weight = ctx.gradients
        ctx.gradients = None
        scale = upstream[0] / ctx.count
        return d_x.mul_(scale), d_weight.mul_(scale), None, None, None
