"""AdamW, with weight decay on matrices only."""

from typing import Any

import torch
from torch import nn

from manta.config import Fraction, NonNegativeFloat, PositiveFloat, config


@config
class OptimizerConfig:
    lr: PositiveFloat = 2e-3
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay of its running mean and of its running square."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, on matrices and embeddings; never on biases and norms."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""


def make_optimizer(model: nn.Module, c: OptimizerConfig) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, eps=c.eps, fused=True)
