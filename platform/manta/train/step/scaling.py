"""How learning rate, batch and token budget follow from the size of a model: pure arithmetic.

Each rule names its source. The rules start from one reference, GPT-2 small's width (Brown et al.
2020, table 2.1: 6e-4 and half a million tokens a batch for 12 blocks of 768). They give round
numbers to start from; a sweep finds the best ones.
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
    """The factor of all rates for a batch of `batch` tokens instead of `reference`: the square root
    of the ratio (Malladi et al. 2022), which keeps the size of the noise in an update."""
    return math.sqrt(batch / reference)


def lr_for_width(width: int, reference: int, kind: Literal["adamw", "muon"] = "adamw") -> float:
    """The factor of the rates of the blocks' matrices and the head for an n_embd of `width` instead
    of `reference`.

    AdamW's rates go with 1 / width (Yang et al. 2022, muP, table 3). Muon's go with
    1 / sqrt(width): its update has the same RMS at every width, so its spectral norm grows with the
    square root of the width. Embeddings, norms and biases keep their rates.
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
    """The factor of each group's rate, by the group's name. A reference that is None changes
    nothing."""
    for_batch = 1.0 if reference_batch is None else lr_for_batch(batch, reference_batch)
    wider = reference_width or width
    return {
        "matrices": for_batch * lr_for_width(width, wider, kind),
        "head": for_batch * lr_for_width(width, wider),
        "embeddings": for_batch,
        "vectors": for_batch,
    }


def budget(depth: int) -> int:
    """The token budget of a model of `depth` blocks: 20 tokens for each of the blocks' 12 L C^2
    weights."""
    return TOKENS_PER_PARAMETER * 12 * depth * (depth * CHANNELS_PER_BLOCK) ** 2


def batch(depth: int) -> int:
    """Tokens in a batch for a model of `depth` blocks: a power of two, at least one sequence."""
    ratio = (budget(depth) / budget(REFERENCE_DEPTH)) ** BATCH_EXPONENT
    return max(DEPTH_CONTEXT, 2 ** round(math.log2(REFERENCE_BATCH * ratio)))


def recipe_of_depth(depth: Any) -> dict[str, Any]:
    """The keys of a training run with `depth` blocks, without the model's own keys; {} if `depth`
    is not a positive integer."""
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
