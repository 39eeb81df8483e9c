"""The optimizer's config, and the optimizer of a GPT: AdamW, or Muon for the blocks' matrices."""

from typing import Any, ClassVar, Literal

import torch
from torch import nn

from manta.config import Count, Fraction, NonNegativeFloat, OpenFraction, PositiveFloat, config
from manta.model.groups import GROUPS, Group, group_of
from manta.model.trainable import learning
from manta.train.step.muon import QUINTICS, MuonAdamW, shapes_of

OF_MUON = ("muon_lr", "muon_momentum", "muon_rounds", "muon_weight_decay")


@config
class OptimizerConfig:
    only_for: ClassVar = tuple((key, "kind", ("muon",)) for key in OF_MUON)

    kind: Literal["adamw", "muon"] = "adamw"
    """The method. adamw: AdamW for everything; muon: Muon for the matrices of the blocks, AdamW for
    the rest (embeddings, head, norms, biases), at ZeRO stages 0 to 2."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate."""
    embedding_lr: PositiveFloat | None = None
    """Peak learning rate of the embeddings, even if they are also the head; null: lr."""
    head_lr: PositiveFloat | None = None
    """Peak learning rate of a separate head (model.tie_embeddings=false); null: lr."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the running mean and of the running square."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, on matrices and embeddings; never on biases and norms."""
    reference_batch: Count | None = None
    """tokens_per_batch for which the rates were tuned: they are multiplied by the square root of
    tokens_per_batch over this. null: the rates stay as given."""
    reference_width: Count | None = None
    """n_embd for which the rates were tuned (muP): for a model r times as wide, the rates of the
    matrices and of a separate head are divided by r (Muon's by its square root). null: the rates
    stay as given."""
    muon_lr: PositiveFloat | None = None
    """Muon's peak learning rate; null: lr. The RMS of a step is 0.2 times the rate, much like
    AdamW's."""
    muon_momentum: OpenFraction | None = None
    """Muon's decay rate of the running mean (Nesterov); null: 0.95."""
    muon_rounds: Literal[1, 2, 3, 4, 5] = 5
    """Rounds of Newton-Schulz, 1 to 5: fewer cost less and orthogonalise less well."""
    muon_weight_decay: NonNegativeFloat | None = None
    """Decoupled weight decay of Muon's matrices; null: weight_decay."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""

    def problems(self) -> list[str]:
        if self.kind == "muon":
            return []
        return [
            f"{key}={getattr(self, key):g} is for kind=muon: omit it, or set optimizer.kind=muon"
            for key in OF_MUON
            if getattr(self, key) not in (None, len(QUINTICS))
        ]

    def conflicts(self, zero_stage: int, tie_embeddings: bool) -> list[str]:
        """Messages about keys that cannot work with the rest of a run's config."""
        found = []
        if self.kind == "muon" and zero_stage > 2:
            found.append(
                f"optimizer.kind=muon works at zero_stage 0, 1 and 2, not {zero_stage}: at stage 3 "
                "no rank has whole matrices; set zero_stage=2, or optimizer.kind=adamw"
            )
        if self.head_lr is not None and tie_embeddings:
            found.append(
                f"optimizer.head_lr={self.head_lr:g}: the head's weights are the embedding's; set "
                "optimizer.embedding_lr instead, or model.tie_embeddings=false"
            )
        return found

    @property
    def momentum(self) -> float:
        return 0.95 if self.muon_momentum is None else self.muon_momentum

    @property
    def matrices_lr(self) -> float:
        """The peak learning rate of the matrices in the blocks."""
        return self.lr if self.muon_lr is None else self.muon_lr

    @property
    def matrices_weight_decay(self) -> float:
        return self.weight_decay if self.muon_weight_decay is None else self.muon_weight_decay


def make_optimizer(
    model: nn.Module,
    c: OptimizerConfig,
    dtype: Literal["fp32", "bf16"] = "fp32",
    lr_scales: dict[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a GPT's weights that learn. Each group has a `peak_lr`; the rate of a step
    is a share of it.

    Args:
        dtype: of the matrix products in Muon.
        lr_scales: factors of the groups' rates, by the groups' names.
    """
    found: dict[Group, list[nn.Parameter]] = {}
    for name, parameter in learning(model):  # a tied head comes as the embedding
        in_block, is_head = name.startswith("blocks."), name.startswith("head.")
        group = group_of(parameter.dim(), in_block=in_block, is_head=is_head)
        found.setdefault(group, []).append(parameter)
    peaks: dict[Group, float] = {
        "matrices": c.matrices_lr,
        "embeddings": c.lr if c.embedding_lr is None else c.embedding_lr,
        "head": c.lr if c.head_lr is None else c.head_lr,
        "vectors": c.lr,
    }
    scales = lr_scales or {}
    decays: dict[Group, float] = {"matrices": c.matrices_weight_decay, "vectors": 0.0}
    groups: list[dict[str, Any]] = [
        {
            "name": name,
            "params": found[name],
            "lr": peaks[name] * scales.get(name, 1.0),
            "peak_lr": peaks[name] * scales.get(name, 1.0),
            "weight_decay": decays.get(name, c.weight_decay),
        }
        for name in GROUPS
        if name in found
    ]
    if c.kind == "adamw":
        return torch.optim.AdamW(groups, betas=c.betas, eps=c.eps, fused=True)
    groups[0] |= {"momentum": c.momentum, "shapes": shapes_of(model, found["matrices"])}
    return MuonAdamW(
        groups,
        torch.bfloat16 if dtype == "bf16" else torch.float32,
        lr=c.lr,
        betas=c.betas,
        eps=c.eps,
        rounds=c.muon_rounds,
    )
