"""RoPE: positions as angles by which pairs of channels turn (Su et al. 2021).

Shapes: T sequence, H heads, D head size.
"""

import dataclasses
import math

import torch
from torch import Tensor

from manta.model.shape import ModelConfig, RopeScaling


def frequencies(c: ModelConfig) -> Tensor:
    """The angle from token to token of each pair of channels, (D / 2,), fastest first. It is made
    on the CPU, so that every device has the same bits."""
    D = c.head_size
    unscaled = c.rope_theta ** (-torch.arange(0, D, 2, device="cpu").float() / D)
    return unscaled / _slowdown(c.rope_scaling, unscaled)


def slowdown(c: ModelConfig) -> Tensor:
    """The numbers that divide the frequencies under the config's scaling, (D / 2,)."""
    plain = dataclasses.replace(c, rope_scaling=RopeScaling())
    return _slowdown(c.rope_scaling, frequencies(plain))


def _slowdown(s: RopeScaling, unscaled: Tensor) -> Tensor:
    """llama3 leaves wavelengths below original_context / high_freq_factor as they are, multiplies
    those above original_context / low_freq_factor by the factor, and interpolates between them."""
    if s.kind == "none":
        return torch.ones_like(unscaled)
    if s.kind == "linear":
        return torch.full_like(unscaled, s.factor)
    turns = s.original_context * unscaled / (2 * math.pi)  # in the original context
    share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    share = share.clamp(0, 1)  # of the frequency as it was
    return 1 / ((1 - share) / s.factor + share)


def rope_table(c: ModelConfig) -> tuple[Tensor, Tensor]:
    """Computes cos and sin, (T, D) each, of RoPE's angles, for both halves of the channels (Llama's
    order). The sines of the first half are negative, as `rotate` needs them."""
    positions = torch.arange(c.context_length, device="cpu").float()
    angles = torch.outer(positions, frequencies(c))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of (B, H, T, D) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([second, first], dim=-1) * sin
