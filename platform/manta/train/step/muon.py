"""Muon for the matrices of the blocks, with AdamW for the other weights.

Muon (Jordan et al. 2024) takes the momentum, and replaces it by (about) the nearest matrix whose
singular values are all one. At ZeRO stages 1 and 2 a rank has a slice of all the matrices laid end
to end. At all three stages (0, 1 and 2) the gradients are already averaged and clipped when Muon
sees them, so the same rule applies.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manta.model.gpt import Attention
from manta.model.lstm import GATES

# Coefficients of each round's quintic, the best one for what the earlier rounds leave ("Polar
# Express", Amsel et al. 2025, table of its appendix). This makes three rounds enough where a step
# is small.
QUINTICS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749, 0.4188073119525673),
)
# Rounding must not push a singular value beyond one, where the first quintics diverge.
SAFETY = 1.01
# An orthogonal update of r x c has the RMS 1/sqrt(max(r, c)); AdamW's is about 0.2-0.4 in practice.
# With this scale (Liu et al. 2025), learning rate and weight decay mean the same for both.
UPDATE_RMS = 0.2
BATCH_VALUES = 1 << 24  # values orthogonalised at once: this bounds the memory


def shapes_of(model: nn.Module, parameters: list[nn.Parameter]) -> list[tuple[int, int]]:
    """(rows, columns) of each matrix to orthogonalise, in the order in which they are laid end to
    end. Query, key and value are stacked in one weight, and count as three matrices; the gates of
    an LSTM count as four."""
    parts = {}
    for module in model.modules():
        if isinstance(module, Attention):
            c = module.c
            heads = (c.n_head, c.kv_heads, c.kv_heads)
            parts[id(module.qkv.weight)] = [n * c.head_size for n in heads]
        if isinstance(module, nn.LSTM):
            gates = [module.hidden_size] * GATES
            parts |= {id(p): gates for p in module.parameters() if p.dim() == 2}
    return [
        (rows, parameter.size(1))
        for parameter in parameters
        for rows in parts.get(id(parameter), [parameter.size(0)])
    ]


class MuonAdamW(torch.optim.AdamW):
    """Muon for the group that has `shapes`, AdamW for the others.

    Muon's group has either whole weights, the same on all ranks (ZeRO stage 0), or this rank's flat
    slice of them, where each rank has a slice of the same size (stages 1 and 2). Momentum is
    computed value by value, so it is stored in the same shape as the weights. Each matrix is
    orthogonalised on one rank, or on the few ranks that have a part of it.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        dtype: torch.dtype,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        rounds: int,
    ):
        """Makes the optimizer.

        Args:
            dtype: of the matrix products.
            lr, betas, eps: AdamW's.
            rounds: of Newton-Schulz.
        """
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        # The matrices are orthogonalised here, even if their state is offloaded to the CPU.
        self.device: torch.device = groups[0]["params"][0].device
        self.dtype = dtype
        self.rounds = rounds

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's expects AdamW's state in all

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        groups = self.param_groups  # ZeRO stages 1 and 2 pass one group at a time
        try:
            self.param_groups = [group for group in groups if "shapes" not in group]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if "shapes" in group:
                self._muon(group)

    def _muon(self, group: dict[str, Any]) -> None:
        directions = []
        for p in group["params"]:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            mean = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(mean, group["momentum"]))
        if directions[0].dim() == 2:
            flat = torch.cat([direction.flatten() for direction in directions])
            self._orthogonalise_whole(flat, group["shapes"])
        else:
            (flat,) = directions
            self._orthogonalise_slice(flat, group["shapes"])
        sizes = [p.numel() for p in group["params"]]
        for p, update in zip(group["params"], flat.split(sizes), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.view_as(p), alpha=-group["lr"])

    def _orthogonalise_whole(self, flat: Tensor, shapes: list[tuple[int, int]]) -> None:
        """Orthogonalises all matrices in place: each one on one rank, which sends it to all."""
        rank, world_size = _rank_and_world_size()
        starts = _starts(shapes)
        shares = _shares(tuple(map(tuple, shapes)), world_size)
        sizes = [sum(math.prod(shapes[i]) for i in share) for share in shares]
        whole = [flat[starts[i] : starts[i + 1]].view(shapes[i]) for i in shares[rank]]
        mine = [matrix.flatten() for matrix in self._orthogonal(whole)]
        everyone = self._everyone(mine, sizes) if world_size > 1 else [torch.cat(mine)]
        for share, done in zip(shares, everyone, strict=True):
            at = 0
            for i in share:
                size = math.prod(shapes[i])
                flat[starts[i] : starts[i + 1]] = done[at : at + size].float() * _scale(*shapes[i])
                at += size

    def _everyone(self, mine: list[Tensor], sizes: list[int]) -> Sequence[Tensor]:
        """The matrices of each rank, end to end, where those of rank r have `sizes[r]` values and
        `mine` are this rank's. (A collective call.)"""
        rank, world_size = _rank_and_world_size()
        if _is_gathered(sizes):
            padded = torch.zeros(max(sizes), device=self.device, dtype=self.dtype)
            padded[: sizes[rank]] = torch.cat(mine) if mine else 0.0
            everyone = [torch.empty_like(padded) for _ in range(world_size)]
            dist.all_gather(everyone, padded)
            return everyone
        # Most ranks have no matrix, or a small one: with padding for all of them, memory and
        # traffic of each rank would grow with their number.
        joined = torch.zeros(sum(sizes), device=self.device, dtype=self.dtype)
        everyone = list(joined.split(sizes))
        if mine:
            everyone[rank].copy_(torch.cat(mine))
        dist.all_reduce(joined)  # exact: each value has only one nonzero summand
        return everyone

    def _orthogonalise_slice(self, flat: Tensor, shapes: list[tuple[int, int]]) -> None:
        """Orthogonalises this rank's slice in place. A matrix that lies in several slices is put
        together first, and each of their ranks orthogonalises it."""
        rank, _ = _rank_and_world_size()
        starts = _starts(shapes)
        size = flat.numel()
        first, last = rank * size, (rank + 1) * size
        spans = list(itertools.pairwise(starts))
        cut = [i for i, (a, b) in enumerate(spans) if a // size != (b - 1) // size]
        mine = [i for i, (a, b) in enumerate(spans) if a < last and b > first]
        joined = self._joined(flat, [spans[i] for i in cut], first, last) if cut else {}
        whole = []
        for i in mine:
            a, b = spans[i]
            values = joined[a] if i in cut else flat[a - first : b - first]
            whole.append(values.view(shapes[i]))
        for i, matrix in zip(mine, self._orthogonal(whole), strict=True):
            a, b = spans[i]
            low, high = max(a, first), min(b, last)
            part = matrix.flatten()[low - a : high - a]
            flat[low - first : high - first] = part.to(flat) * _scale(*shapes[i])

    def _joined(
        self, flat: Tensor, spans: list[tuple[int, int]], first: int, last: int
    ) -> dict[int, Tensor]:
        """The whole matrices at `spans`, each by its start. This rank contributes the values from
        `first` to `last`. (A collective call: all ranks, with the same spans.)"""
        sizes = [b - a for a, b in spans]
        joined = torch.zeros(sum(sizes), device=self.device, dtype=flat.dtype)
        parts = joined.split(sizes)
        for (a, b), part in zip(spans, parts, strict=True):
            low, high = max(a, first), min(b, last)
            if low < high:
                part[low - a : high - a] = flat[low - first : high - first]
        dist.all_reduce(joined)  # exact: each value has only one nonzero summand
        return {a: part for (a, _), part in zip(spans, parts, strict=True)}

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        """The matrices orthogonalised, in the order given. Matrices of one shape are computed
        together, which keeps a GPU busy."""
        by_shape: dict[torch.Size, list[int]] = {}
        for i, matrix in enumerate(matrices):
            by_shape.setdefault(matrix.shape, []).append(i)
        done: dict[int, Tensor] = {}
        for shape, indices in by_shape.items():
            size = max(1, BATCH_VALUES // shape.numel())
            for some in (indices[at : at + size] for at in range(0, len(indices), size)):
                batch = torch.stack([matrices[i] for i in some]).to(self.device)
                done |= zip(some, orthogonalise(batch, self.dtype, self.rounds), strict=True)
        return [done[i] for i in range(len(matrices))]


def orthogonalise(matrices: Tensor, dtype: torch.dtype, rounds: int = len(QUINTICS)) -> Tensor:
    """Orthogonalises matrices with Newton-Schulz: (N, rows, columns) -> the same shape, with
    singular values of about one."""
    x = matrices.mT if matrices.size(-2) > matrices.size(-1) else matrices
    # The clamp lets tiny gradients through but avoids a division by zero. The norm is taken before
    # the cast, as bf16 would round it.
    x = (x / (SAFETY * x.norm(dim=(-2, -1), keepdim=True)).clamp(min=1e-20)).to(dtype)
    for a, b, c in QUINTICS[:rounds]:
        a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.size(-2) > matrices.size(-1) else x


def _scale(rows: int, columns: int) -> float:
    return UPDATE_RMS * math.sqrt(max(rows, columns))


def _starts(shapes: list[tuple[int, int]]) -> list[int]:
    """The start of each matrix when all are laid end to end; the last entry is their end."""
    return [0, *itertools.accumulate(rows * columns for rows, columns in shapes)]


@functools.cache
def _shares(shapes: tuple[tuple[int, int], ...], world_size: int) -> list[list[int]]:
    """The indices of the matrices that each rank orthogonalises; all ranks get about equal work."""
    work = [rows * columns * min(rows, columns) for rows, columns in shapes]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for i in sorted(range(len(shapes)), key=lambda i: -work[i]):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += work[i]
    return shares


def _is_gathered(sizes: list[int]) -> bool:
    """Whether ranks send `sizes` values padded to the largest of them, and not a sum of all."""
    return len(sizes) * max(sizes) <= 2 * sum(sizes)


def exchanged(shapes: tuple[tuple[int, int], ...], world_size: int) -> int:
    """The values that a rank receives of the others in a step, at ZeRO stage 0."""
    sizes = [sum(math.prod(shapes[i]) for i in s) for s in _shares(shapes, world_size)]
    # A sum over all ranks takes each value around their ring twice.
    return (world_size - 1) * max(sizes) if _is_gathered(sizes) else 2 * sum(sizes)


def _rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
