"""The head: logits, or the cross-entropy of their targets without holding all logits at once.

Shapes: N tokens, C channels, V vocabulary, P padded vocabulary (V up to a multiple of 128).

The head makes the logits of a chunk of tokens, turns them into the loss and its gradient, and drops
them. All logits together, (N, P), would take most of a small model's memory, and pass through it
several times. The gradient of the mean is made in the forward pass, so that no logits are computed
twice. If each target's loss is wanted, its factor in the gradient is known only later: then the
backward pass computes each chunk's logits again.

Between the matrix products, a chunk's logits go through one of two forms of the same formula. The
plain form is a few of torch's operations, each of which passes through all logits. The compiled
form reads the logits twice and writes the gradient once. That matters on a GPU, where the passes
through memory take longer than the products.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from manta.model.compilation import compiled as compiled_whole
from manta.model.targets import IGNORED

# Tokens whose logits exist at once. On a CPU the logits of more tokens fall out of its caches. On a
# GPU each chunk costs one more pass through the head's gradient. The compiled form takes half as
# many bytes per logit, so its chunks can be larger.
CPU_CHUNK = 1024
GPU_CHUNK = 2048
COMPILED_GPU_CHUNK = 8192

# (rows, P) logits, (rows,) targets, V -> the sum of the targets' nats, fp32, and the sum's gradient
# by the logits, (rows, P) in the logits' dtype.
ChunkLoss = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def loss_chunk(device_type: str, compiled: bool = False) -> int:
    """The number of tokens whose logits exist at once on a device of this type."""
    if device_type == "cpu":
        return CPU_CHUNK
    return COMPILED_GPU_CHUNK if compiled else GPU_CHUNK


class Head(nn.Linear):
    """The linear layer from (..., C) to (..., V). Its weight has P rows; those beyond V belong to
    no token, and neither logits nor losses see them."""

    compiled = False  # whether the compiled form makes the loss and its gradient

    def __init__(self, n_embd: int, vocab_size: int, padded_vocab_size: int):
        super().__init__(n_embd, padded_vocab_size, bias=False)
        self.vocab_size = vocab_size

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """Computes logits (..., V) or, with targets (...), the cross-entropy in nats: its mean over
        the targets that count, or that of each target, 0 where ignored."""
        if targets is None:
            return self.product(x)[..., : self.vocab_size]
        compute = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            compute = torch.get_autocast_dtype(x.device.type)
        x, flat = x.flatten(0, -2), targets.flatten()
        if reduction == "none":
            arguments = (x, self.weight, flat, self.vocab_size, compute)
            if torch.is_grad_enabled():
                return _EachLoss.apply(*arguments, self.compiled).view_as(targets)
            return _each(*arguments).view_as(targets)
        if torch.is_grad_enabled():
            return _MeanLoss.apply(x, self.weight, flat, self.vocab_size, compute, self.compiled)
        nats = _each(x, self.weight, flat, self.vocab_size, compute)
        return nats.sum() / _count(flat)

    def product(self, x: Tensor) -> Tensor:
        """Computes (..., P) logits, those of the padding too."""
        return super().forward(x)


def _count(targets: Tensor) -> Tensor:
    """The number of targets that count; 1 if none does, so that their mean is 0 and not 0/0."""
    return (targets != IGNORED).sum().clamp(min=1)


def _each(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, compute: torch.dtype
) -> Tensor:
    """Computes minus the log-probability of each target, (N,); 0 where ignored."""
    chunk = loss_chunk(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        weight = weight.to(compute)
        pieces = zip(x.split(chunk), targets.split(chunk), strict=True)
        parts = [_nats(rows.to(compute) @ weight.T, those, vocab_size) for rows, those in pieces]
    return torch.cat(parts)


def _nats(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The loss of each target of a chunk. A function of its own, so that nothing of the size of the
    logits is there when the next chunk's are made."""
    logits[:, vocab_size:] = -torch.inf
    log_probabilities = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    picked = log_probabilities.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return -picked.masked_fill(targets == IGNORED, 0.0)


def plain_loss(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """A `ChunkLoss` with as few passes as torch's operations allow. It overwrites the logits."""
    logits[:, vocab_size:] = -torch.inf
    counted, at = targets != IGNORED, targets.clamp(min=0).unsqueeze(1)
    # One pass makes the probabilities. They are exponentials divided by their sum. The log of that
    # sum follows from the largest probability, whose logit is known, without another such pass.
    largest = logits.amax(1).float()
    probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
    log_sums = largest - probabilities.amax(1).log()
    nats = log_sums - logits.gather(1, at).squeeze(1).float()
    probabilities.scatter_(1, at, probabilities.gather(1, at) - 1.0)
    if logits.is_cuda or not counted.all():  # asking a GPU would cost more than the pass
        probabilities.masked_fill_(~counted.unsqueeze(1), 0.0)
    return nats.masked_fill(~counted, 0.0).sum(), probabilities.to(logits.dtype)


def fused_loss(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """A `ChunkLoss` for compilation: it works value by value, except for maxima and sums of rows.

    Largest value, differences, exponentials, sum: in this order inductor recognises a softmax, and
    finds the largest value and the sum in one pass on a GPU.
    """
    counted, at = targets != IGNORED, targets.clamp(min=0).unsqueeze(1)
    ids = torch.arange(logits.size(1), device=logits.device)
    values = torch.where(ids < vocab_size, logits.float(), -torch.inf)
    largest = values.amax(1, keepdim=True)
    exponentials = (values - largest).exp()
    sums = exponentials.sum(1, keepdim=True)
    nats = (largest + sums.log() - logits.gather(1, at).float()).squeeze(1)
    gradient = exponentials / sums - (ids == at).float()
    gradient = torch.where(counted.unsqueeze(1), gradient, 0.0)
    return torch.where(counted, nats, 0.0).sum(), gradient.to(logits.dtype)


class _MeanLoss(torch.autograd.Function):
    """The mean over the targets that count, with its gradient: softmax minus one-hot. A weight that
    does not learn costs no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        compute: torch.dtype,
        compiled: bool,
    ) -> Tensor:
        chunk = loss_chunk(x.device.type, compiled)
        loss_of: ChunkLoss = compiled_whole(fused_loss) if compiled else plain_loss
        total = torch.zeros((), device=x.device)
        d_x = torch.empty_like(x)
        d_weight: Tensor | None = None
        learns = ctx.needs_input_grad[1]
        with torch.autocast(x.device.type, enabled=False):
            weight = weight.to(compute)
            for start in range(0, len(x), chunk):
                part = slice(start, start + chunk)
                rows = x[part].to(compute)
                nats, gradient = loss_of(rows @ weight.T, targets[part], vocab_size)
                total += nats
                d_x[part] = gradient @ weight
                if not learns:
                    pass
                elif d_weight is None:
                    d_weight = (gradient.T @ rows).float()
                elif compute == torch.float32:
                    d_weight.addmm_(gradient.T, rows)
                else:
                    d_weight += gradient.T @ rows
                del gradient  # before the next chunk's logits are made
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
        if d_weight is not None:
            d_weight.mul_(scale)
        return d_x.mul_(scale), d_weight, None, None, None, None


class _EachLoss(torch.autograd.Function):
    """Each target's loss (`_each`). Nothing of the size of the logits is kept for its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        compute: torch.dtype,
        compiled: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, targets)
        ctx.vocab_size, ctx.compute, ctx.compiled = vocab_size, compute, compiled
        return _each(x, weight, targets, vocab_size, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets = ctx.saved_tensors
        chunk = loss_chunk(x.device.type, ctx.compiled)
        loss_of: ChunkLoss = compiled_whole(fused_loss) if ctx.compiled else plain_loss
        factors = upstream[0].to(ctx.compute).unsqueeze(1)
        d_x = torch.empty_like(x)
        d_weight: Tensor | None = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        with torch.autocast(x.device.type, enabled=False):
            weight = weight.to(ctx.compute)
            for start in range(0, len(x), chunk):
                part = slice(start, start + chunk)
                rows = x[part].to(ctx.compute)
                _, gradient = loss_of(rows @ weight.T, targets[part], ctx.vocab_size)
                gradient *= factors[part]
                d_x[part] = gradient @ weight
                if d_weight is None:
                    continue
                if ctx.compute == torch.float32:
                    d_weight.addmm_(gradient.T, rows)
                else:
                    d_weight += gradient.T @ rows
                del gradient  # before the next chunk's logits are made
        return d_x, d_weight, None, None, None, None
