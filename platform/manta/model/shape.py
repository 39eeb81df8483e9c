"""The shape of a model: its config, without torch."""

import dataclasses
from typing import Any, ClassVar, Literal

from manta.config import Count, Fraction, PositiveFloat, config
from manta.model.presets import PRESETS, shape_of_depth

# The rows of the embedding and the head are a multiple of this, as GPUs multiply in tiles.
VOCAB_TILE = 128


@config
class RopeScaling:
    kind: Literal["none", "linear", "llama3"] = "none"
    """How RoPE's wavelengths grow for a context longer than the model was trained on. linear: all
    by `factor` (Chen et al. 2023). llama3: long ones by `factor`, short ones not at all, those
    between by something between (Llama 3.1 and later)."""
    factor: PositiveFloat = 1.0
    """What wavelengths are multiplied by."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths above original_context divided by this grow by the whole factor."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths below original_context divided by this stay; more than
    low_freq_factor."""
    original_context: Count = 8192
    """llama3: length of the context on which the model was trained at first, in tokens."""

    def problems(self) -> list[str]:
        if self.kind == "none" and self != RopeScaling():
            return ["kind=none has no factors: set kind=linear or kind=llama3, or omit them"]
        if self.kind == "linear" and self != RopeScaling(kind="linear", factor=self.factor):
            return ["kind=linear has a factor only: omit the other keys"]
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            return [
                f"high_freq_factor={self.high_freq_factor:g}: it should be more than "
                f"low_freq_factor={self.low_freq_factor:g}"
            ]
        return []


@config
class DropoutConfig:
    embeddings: Fraction | None = None
    """Dropout on the sum of embeddings; null: dropout."""
    attention_weights: Fraction | None = None
    """Dropout on attention weights; null: dropout."""
    attention: Fraction | None = None
    """Dropout on what attention adds to the residual stream; null: dropout."""
    activations: Fraction = 0.0
    """Dropout on the MLP's hidden channels, after its activation."""
    mlp: Fraction | None = None
    """Dropout on what the MLP adds to the residual stream; null: dropout."""


@config
class ModelConfig:
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    sources: ClassVar[tuple[str, ...]] = ("preset", "depth")
    only_for: ClassVar = (
        ("qk_norm", "family", ("modern",)),
        ("n_kv_head", "family", ("modern",)),
        ("bias", "family", ("gpt2",)),
        ("qkv_bias", "family", ("gpt2",)),
    )

    preset: str = "quickstart"
    """A named shape, which the keys below override: quickstart, gpt2-124m, gpt2-163m, gpt2-350m,
    lf-269m, casa-350m, gpt2-1.5b."""
    depth: Count | None = None
    """Number of blocks, as one dial instead of a preset: width, heads and context follow from it,
    and in training also learning rate, batch and token budget. Other keys override these."""
    family: Literal["gpt2", "modern"] = "modern"
    """gpt2: LayerNorm, learned positions, GELU; modern: RMSNorm, RoPE, SwiGLU."""
    vocab_size: Count | None = None
    """Number of token ids that the model knows; null: as many as the dataset's tokenizer has."""
    context_length: Count = 256
    """Length of the longest sequence, in tokens."""
    n_layer: Count = 4
    """Number of transformer blocks."""
    n_head: Count = 4
    """Number of attention heads."""
    n_embd: Count = 256
    """Number of channels of the residual stream."""
    n_kv_head: Count | None = None
    """Number of key/value heads (grouped-query attention, modern family); null: n_head."""
    head_dim: Count | None = None
    """Number of channels of each head (modern family); null: n_embd / n_head."""
    mlp_hidden: Count | None = None
    """Number of hidden channels of the MLP; null: 4 n_embd (gpt2), or 8/3 n_embd rounded up to a
    multiple of 64 (modern)."""
    bias: bool | None = None
    """Whether linear layers and LayerNorm have biases (gpt2 family); null: true there."""
    qkv_bias: bool | None = None
    """Whether query, key and value have a bias (gpt2 family); null: the same as `bias`."""
    qk_norm: bool = False
    """Whether RMSNorm normalizes each head's query and key (modern family)."""
    tie_embeddings: bool = True
    """Whether the head uses the token embedding's weights."""
    dropout: Fraction = 0.0
    """Dropout in training, on embeddings, attention weights and residual branches."""
    dropouts: DropoutConfig = DropoutConfig()
    rope_theta: PositiveFloat = 10000.0
    """Base of RoPE's wavelengths (modern family)."""
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: PositiveFloat = 1e-5
    """Number that norms add to the variance under the root."""

    @classmethod
    def beneath(cls, tree: dict[str, Any]) -> dict[str, Any]:
        return shape_of_depth(tree.get("depth"))

    def problems(self) -> list[str]:
        found = []
        if self.depth is not None and PRESETS[self.preset]:
            found.append(f"depth={self.depth} and preset={self.preset}: give one of them")
        if self.head_dim is None and self.n_embd % self.n_head:
            given = f"n_embd={self.n_embd} does not divide by n_head={self.n_head}"
            found.append(given + (", and head_dim is not set" if self.family == "modern" else ""))
        elif self.family == "modern" and self.head_size % 2:
            key = "n_embd / n_head =" if self.head_dim is None else "head_dim is"
            found.append(f"{key} {self.head_size}: RoPE needs an even head size")
        if self.n_head % self.kv_heads:
            found.append(f"n_head={self.n_head} does not divide by n_kv_head={self.kv_heads}")
        if self.family == "modern":
            for key in ("bias", "qkv_bias"):
                if getattr(self, key):
                    found.append(f"{key}=true is for family=gpt2: omit it")
        elif self.qk_norm or self.n_kv_head not in (None, self.n_head):
            found.append("qk_norm and n_kv_head are for family=modern: omit them")
        if self.family == "gpt2":
            if self.head_dim not in (None, self.n_embd // self.n_head):
                found.append(
                    f"head_dim={self.head_dim}: with family=gpt2 it is n_embd / n_head: omit it"
                )
            if self.rope_scaling.kind != "none":
                found.append("rope_scaling is for family=modern: omit it")
        return found

    def with_dropout_of(self, other: "ModelConfig") -> "ModelConfig":
        """This shape with the dropout of `other`: a run that goes on may have another one."""
        return dataclasses.replace(self, dropout=other.dropout, dropouts=other.dropouts)

    @property
    def rates(self) -> dict[str, float]:
        """The dropout of each place (`DropoutConfig`)."""
        given = dataclasses.asdict(self.dropouts)
        return {place: self.dropout if r is None else r for place, r in given.items()}

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def query_size(self) -> int:
        """Number of channels of all heads together, which differs from n_embd if head_dim says
        so."""
        return self.n_head * self.head_size

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding and of the head."""
        assert self.vocab_size is not None
        return -(-self.vocab_size // VOCAB_TILE) * VOCAB_TILE

    @property
    def has_bias(self) -> bool:
        return self.family == "gpt2" if self.bias is None else self.bias

    @property
    def has_qkv_bias(self) -> bool:
        return self.has_bias if self.qkv_bias is None else self.qkv_bias

    @property
    def hidden(self) -> int:
        if self.mlp_hidden is not None:
            return self.mlp_hidden
        return 4 * self.n_embd if self.family == "gpt2" else -(-8 * self.n_embd // 3 // 64) * 64
