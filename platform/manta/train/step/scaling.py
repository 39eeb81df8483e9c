"""How learning rate, batch and token budget follow from the size of a model: pure arithmetic.

Each rule is stated with its source. They start from one reference, GPT-2 small's width (Brown et
al. 2020, table 2.1: 6e-4 and half a million tokens a batch for 12 blocks of 768), and give round
numbers to start from, not the best ones: a sweep finds those.
"""

import math
from typing import Any, Literal

from manta.model.presets import CHANNELS_PER_BLOCK, DEPTH_CONTEXT

# Compute-optimal tokens per parameter (Hoffmann et al. 2022).
TOKENS_PER_PARAMETER = 20
REFERENCE_DEPTH = 12
REFERENCE_LR = 6e-4
REFERENCE_BATCH = 524288
# The best batch grows with the token budget to this power (Bergsma et al. 2025, "Power Lines").
BATCH_EXPONENT = 0.383


def lr_for_batch(batch: int, reference: int) -> float:
    """Factor of every rate for another batch, in tokens: the square root of their ratio (Malladi
    et al. 2022), which keeps the size of the noise in an update."""
    return math.sqrt(batch / reference)


def lr_for_width(width: int, reference: int, kind: Literal["adamw", "muon"] = "adamw") -> float:
    """Factor of the rate of the blocks' matrices and the head for another n_embd.

    AdamW: 1 / width (Yang et al. 2022, muP, table 3). Muon, whose update has one RMS at every
    width and so a spectral norm that grows with the root of it: 1 / sqrt(width). Embeddings, norms
    and biases keep theirs.
    """
    ratio = reference / width
    return math.sqrt(ratio) if kind == "muon" else ratio


def lr_scales(
    kind: Literal["adamw", "muon"],
    width: int,
    reference_width: int | None,
    batch: int,
    reference_batch: int | None,
) -> dict[str, float]:
    """The factor of each group of weights; 1 for what has no reference."""
    for_batch = 1.0 if reference_batch is None else lr_for_batch(batch, reference_batch)
    wider = reference_width or width
    return {
        "matrices": for_batch * lr_for_width(width, wider, kind),
        "head": for_batch * lr_for_width(width, wider),
        "embeddings": for_batch,
        "vectors": for_batch,
    }


def budget(depth: int) -> int:
    """Tokens: 20 for each weight of the blocks, 12 L C^2."""
    return TOKENS_PER_PARAMETER * 12 * depth * (depth * CHANNELS_PER_BLOCK) ** 2


def batch(depth: int) -> int:
    """Tokens in a batch: a power of two, and at least one sequence."""
    ratio = (budget(depth) / budget(REFERENCE_DEPTH)) ** BATCH_EXPONENT
    return max(DEPTH_CONTEXT, 2 ** round(math.log2(REFERENCE_BATCH * ratio)))


def recipe_of_depth(depth: Any) -> dict[str, Any]:
    """The keys of a training run of so many blocks, beside the model's own; none where depth is no
    such number."""
    if type(depth) is not int or depth < 1:
        return {}
    tokens_per_batch = batch(depth)
    rate = REFERENCE_LR * lr_for_width(depth, REFERENCE_DEPTH)
    rate *= lr_for_batch(tokens_per_batch, REFERENCE_BATCH)
    return {
        "total_tokens": budget(depth),
        "tokens_per_batch": tokens_per_batch,
        "optimizer": {"lr": float(f"{rate:.2g}")},
    }
