"""Direct preference optimization (Rafailov et al. 2023): its config, and its loss in plain torch.

Shapes: P pairs. Answer 2i is the chosen one of pair i, answer 2i + 1 the rejected one.
"""

import torch.nn.functional as F
from torch import Tensor

from manta.config import NonNegativeFloat, PositiveFloat, config

Figures = dict[str, Tensor]
NAMES = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp")


@config
class DpoConfig:
    beta: PositiveFloat = 0.1
    """Factor of rewards: an answer's reward is beta times what training has added to its
    log-probability, in nats. The larger beta, the less the model moves away from its start."""
    label_smoothing: NonNegativeFloat = 0.0
    """Share of pairs that are taken to be the wrong way round, below 0.5 (conservative DPO)."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of a second loss, the mean nats per token of the chosen answers. It keeps their
    log-probability from falling; 1 is usual where that happens (Pang et al. 2024)."""
    reference: str | None = None
    """Folder in the dataset with the log-probabilities of the answers before training;
    jobs/finetune.py makes it and sets this."""

    def problems(self) -> list[str]:
        if self.label_smoothing < 0.5:
            return []
        return [f"label_smoothing={self.label_smoothing}: it has to be below 0.5"]


def figures_of_pairs(c: DpoConfig, logp: Tensor, reference: Tensor, sizes: Tensor) -> Figures:
    """The figures NAMES of each pair, (P,) each; the loss has a gradient.

    Args:
        logp: (2P,) log-probability of each answer: the sum over its tokens, in nats.
        reference: (2P,) the same before training.
        sizes: (2P,) the tokens of each answer.
    """
    chosen, rejected = (c.beta * (logp - reference)).view(-1, 2).unbind(1)
    margin = chosen - rejected
    loss = -(1 - c.label_smoothing) * F.logsigmoid(margin)
    loss = loss - c.label_smoothing * F.logsigmoid(-margin)
    if c.sft_weight:
        loss = loss - c.sft_weight * (logp / sizes)[::2]
    accuracy = (margin > 0).to(margin.dtype)
    found = (loss, accuracy, margin, chosen, rejected, logp[::2])
    return {
        name: value if name == "loss" else value.detach()
        for name, value in zip(NAMES, found, strict=True)
    }
