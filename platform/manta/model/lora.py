"""LoRA (Hu et al. 2021): small adapters that learn next to matrices that do not.

A layer with the matrix W (out x in) gets A (rank x in) and B (out x rank), and computes
W x + scale B A x. B starts at zero, so the model starts as it was. Query, key and value are one
matrix here and share one A: the rows of B are the same as a B for each of them.

An adapter's weights are named after its layer, with `lora_a` and `lora_b` in place of `weight`.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from manta.config import Count, Fraction, PositiveFloat, config
from manta.model.gpt import LanguageModel
from manta.model.shape import ModelConfig
from manta.model.trainable import Trainable

TARGETS = ("qkv", "out", "gate", "up", "down")
A, B = ".lora_a", ".lora_b"
# Other projects' names of the same matrices.
ALSO_CALLED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "c_attn", "query", "key", "value"), "qkv"),
    "o_proj": "out",
    "gate_proj": "gate",
    **dict.fromkeys(("up_proj", "c_fc"), "up"),
    "down_proj": "down",
    "c_proj": "out or down",
}


@config
class LoraConfig:
    rank: Count | None = None
    """Rank of the adapters that a fine-tuning trains while the model's own weights stay (LoRA), 8
    for example; null: no adapters."""
    alpha: PositiveFloat | None = None
    """Weight of the adapters: their output is multiplied by alpha / rank; null: twice the rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapters' input in training, below 1."""
    targets: tuple[str, ...] | None = None
    """Matrices of each block that get an adapter: qkv, out (attention), gate (modern family), up,
    down (MLP); null: all."""
    embeddings: bool = False
    """Whether the embedding and the head learn too, whole: for data with tokens that the base does
    not know. (The head of a classifier always does.)"""

    def problems(self) -> list[str]:
        if self.rank is None:
            default = LoraConfig()
            given = [f.name for f in dataclasses.fields(self)]
            given = [name for name in given if getattr(self, name) != getattr(default, name)]
            return [f"{name} is for adapters: set lora.rank, or omit it" for name in given]
        found = []
        if self.dropout == 1:
            found.append("dropout=1: nothing would be left of the adapters' input; use less")
        targets = self.targets if self.targets is not None else TARGETS
        for name in targets:
            if name not in TARGETS:
                near = difflib.get_close_matches(name, TARGETS, 1)
                known = ALSO_CALLED.get(name, near[0] if near else None)
                hint = f"did you mean {known}? " if known else ""
                found.append(f"targets has {name!r}: {hint}valid are {', '.join(TARGETS)}")
        if len(set(targets)) < max(1, len(targets)):
            found.append(f"targets=[{', '.join(targets)}]: each matrix once, and at least one")
        return found

    def conflicts(self, c: ModelConfig) -> list[str]:
        """Messages about keys that cannot work with a model of config `c`."""
        if self.rank is None:
            return []
        if c.is_recurrent:
            return [
                f"lora.rank={self.rank}: adapters are for the matrices of a GPT's blocks, and this "
                "model is an LSTM; omit it"
            ]
        found = []
        if c.family == "gpt2" and "gate" in (self.targets or ()):
            found.append(
                "lora.targets has gate, and the gpt2 family's MLP has none: valid are qkv, out, "
                "up, down"
            )
        least = min(c.n_embd, c.query_size, c.hidden)
        if self.rank > least:
            found.append(
                f"lora.rank={self.rank} is more than the model's matrices have ({least}): use less"
            )
        return found

    def for_model(self, c: ModelConfig) -> "LoraConfig":
        """The same adapters, with each value that follows from others written out."""
        if self.rank is None:
            return self
        targets = self.targets if self.targets is not None else TARGETS
        in_order = [t for t in TARGETS if t in targets and (t != "gate" or c.family == "modern")]
        return dataclasses.replace(self, alpha=self.scale * self.rank, targets=tuple(in_order))

    @property
    def scale(self) -> float:
        assert self.rank is not None
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def has(self, layer: str) -> bool:
        """Whether the layer of this name has an adapter."""
        if self.rank is None or not layer.startswith("blocks."):
            return False
        return layer.rpartition(".")[2] in (TARGETS if self.targets is None else self.targets)


def choices(which: Trainable, c: LoraConfig, has_base: bool, optimizer: str) -> list[str]:
    """Messages about what should learn in a run; `has_base`: it starts from a checkpoint."""
    found = [f"trainable={which}"] if which != "all" else []
    found += [f"lora.rank={c.rank}"] if c.rank is not None else []
    if len(found) == 2:
        return [f"{' and '.join(found)}: with adapters, nothing else learns; omit one of them"]
    if found and not has_base:
        return [
            f"{found[0]}: weights that do not learn come from a checkpoint; omit it, or start from "
            "one, as in jobs/finetune.py base=RUN"
        ]
    if which == "head" and optimizer == "muon":
        return [
            "optimizer.kind=muon is for the matrices of blocks, of which trainable=head trains "
            "none: set optimizer.kind=adamw"
        ]
    return []


class LoraLinear(nn.Linear):
    """A linear layer (..., in) -> (..., out) with an adapter. Its weight and bias are those of the
    layer that it takes the place of."""

    def __init__(self, layer: nn.Linear, c: LoraConfig):
        assert c.rank is not None
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_a = nn.Parameter(layer.weight.new_empty(c.rank, layer.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, c.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as the authors' code does
        self.scale, self.dropout = c.scale, nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:
        # Scaled where it is smallest: (..., rank).
        inner = F.linear(self.dropout(x), self.lora_a) * self.scale
        return F.linear(x, self.weight, self.bias) + F.linear(inner, self.lora_b)


def attach(model: LanguageModel, c: LoraConfig) -> None:
    """Gives the model's layers adapters as `c` says, and leaves gradients to these alone, and to
    the weights that learn with them (see `learns`)."""
    for name, layer in list(model.named_modules()):
        if c.has(name):
            assert isinstance(layer, nn.Linear)
            block, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(block), attribute, LoraLinear(layer, c))
    for name, weight in model.named_parameters():
        weight.requires_grad_(learns(name, c, bool(model.config.labels)))


def learns(name: str, c: LoraConfig, classifies: bool) -> bool:
    """Whether a weight of a model with adapters learns. The head of one that `classifies` does."""
    if name.endswith((A, B)) or (classifies and name == "head.weight"):
        return True
    return c.embeddings and name in ("embedding.weight", "head.weight")


def has_adapters(model: nn.Module) -> bool:
    return any(isinstance(layer, LoraLinear) for layer in model.modules())


def split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's own weights, and those of its adapters, by their names."""
    own = {name: w for name, w in weights.items() if not name.endswith((A, B))}
    return own, {name: w for name, w in weights.items() if name not in own}


def pairs(adapters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name of each layer that has an adapter, with A (rank, in) and B (out, rank)."""
    for name, a in adapters.items():
        if name.endswith(A):
            layer = name.removesuffix(A)
            yield layer, a, adapters[layer + B]


def merged(
    weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], c: LoraConfig
) -> dict[str, Tensor]:
    """The weights of a model without adapters that computes the same as these with them."""
    found = dict(weights)
    for layer, a, b in pairs(adapters):
        weight = found[f"{layer}.weight"]
        product = c.scale * (b.double() @ a.double())  # rounded once, to the weight's own type
        found[f"{layer}.weight"] = (weight.double() + product.to(weight.device)).to(weight.dtype)
    return found


def shapes(c: LoraConfig, layers: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the adapters' weights, by name, in a model whose weights have these."""
    assert c.rank is not None
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in layers.items():
        layer = name.removesuffix(".weight")
        if layer != name and c.has(layer):
            found |= {layer + A: (c.rank, shape[1]), layer + B: (shape[0], c.rank)}
    return found
