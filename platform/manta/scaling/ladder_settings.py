"""The configs of a ladder and of a coordinate check: which sizes are trained on how much."""

from typing import Any, Literal

from manta.config import Count, PositiveFloat, config

Size = Count | dict[str, Any]
"""A width, or keys of `model` with their values."""


@config
class LadderConfig:
    sizes: tuple[Size, ...] = ()
    """The models to train. A number is a width: `model` with that n_embd, heads of the same size,
    and blocks as `grow` says. Else keys of model that differ: {n_layer: 6, n_embd: 192, n_head: 3}.
    Empty: nothing is trained."""
    grow: Literal["width", "width_and_depth"] = "width_and_depth"
    """What grows with a width of `sizes`. width: the number of blocks stays; width_and_depth: it
    keeps its proportion to the width, rounded, at least 1."""
    tokens: tuple[Count, ...] = ()
    """The budgets that each size is trained on, in tokens, rounded up to whole batches. One stable
    run of each size serves all of them: the rate decays to each budget from a checkpoint of it,
    over the last `schedule.decay` of the budget."""
    tokens_per_parameter: tuple[PositiveFloat, ...] = ()
    """The budgets as multiples of a size's parameters (as `count` counts them), instead of
    `tokens`."""
    most_flops: PositiveFloat | None = None
    """The most compute of a run, 6 N D FLOPs, with N counted as `count` says: budgets that take a
    size more are left out. So small models learn from many tokens and large ones from few, and
    the run of the largest size on most tokens, which costs several times as much, can be predicted
    within the sizes and the tokens that were tried. null: each size has all budgets."""
    lr: tuple[PositiveFloat, ...] = ()
    """Peak learning rates to try with each size, so that the best one is known by compute; empty:
    optimizer.lr alone. With optimizer.reference_width they are those at that width."""
    tokens_per_batch: tuple[Count, ...] = ()
    """Batches to try with each size, in tokens; empty: the config's own tokens_per_batch alone."""
    warmup_tokens: Count | None = None
    """Tokens of warm-up, the same for all budgets of all sizes (in the place of schedule.warmup);
    null: a tenth of a size's smallest budget."""
    epochs: PositiveFloat = 1.0
    """How often the longest run may read the data. Tokens that are read again count less than new
    ones, so a law of more than about one epoch is not of tokens alone."""
    max_concurrent: Count | None = None
    """Runs at once; null: as many as fit on the cluster."""

    def problems(self) -> list[str]:
        found = []
        if self.tokens and self.tokens_per_parameter:
            found.append("tokens and tokens_per_parameter are both given: give one of them")
        for key in ("sizes", "tokens", "tokens_per_parameter", "lr", "tokens_per_batch"):
            values = getattr(self, key)
            twice = [v for i, v in enumerate(values) if v in values[:i]]
            if twice:
                found.append(f"{key}: {twice[0]} is there twice: omit one")
        return found


@config
class CoordinatesConfig:
    """The coordinate check (what=coordinates)."""

    steps: Count = 10
    """Optimizer steps, at the peak learning rates."""
    seeds: Count = 3
    """Models of each width with other initial weights, over which sizes are averaged."""
