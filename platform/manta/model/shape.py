"""The shape of a model: its config, without any torch."""

from typing import Any, ClassVar, Literal

from manta.config import Count, Fraction, PositiveFloat, config
from manta.model.presets import PRESETS, shape_of_depth

# Rows of the embedding and the head come in so many: matrix products of GPUs are in tiles.
VOCAB_TILE = 128


@config
class ModelConfig:
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    sources: ClassVar[tuple[str, ...]] = ("preset", "depth")

    preset: str = "quickstart"
    """A named shape, over which the keys below go: quickstart, gpt2-124m, gpt2-163m, gpt2-350m,
    lf-269m, casa-350m, gpt2-1.5b."""
    depth: Count | None = None
    """One dial instead of a preset: so many blocks, and width, heads and context that follow; in
    training also learning rate, batch and token budget. Keys given beside it go over them."""
    family: Literal["gpt2", "modern"] = "modern"
    """gpt2: LayerNorm, learned positions, GELU; modern: RMSNorm, RoPE, SwiGLU."""
    vocab_size: Count | None = None
    """Token ids that the model knows; null: as many as the dataset's tokenizer has."""
    context_length: Count = 256
    """Longest sequence, in tokens."""
    n_layer: Count = 4
    """Transformer blocks."""
    n_head: Count = 4
    """Attention heads."""
    n_embd: Count = 256
    """Channels of the residual stream."""
    n_kv_head: Count | None = None
    """Key/value heads (grouped-query attention, modern family); null: n_head."""
    mlp_hidden: Count | None = None
    """Hidden channels of the MLP; null: 4 n_embd (gpt2), 8/3 n_embd rounded up to 64s (modern)."""
    bias: bool | None = None
    """Biases in linear layers and LayerNorm (gpt2 family); null: true there."""
    qkv_bias: bool | None = None
    """Bias on query, key and value (gpt2 family); null: as `bias`."""
    qk_norm: bool = False
    """RMSNorm on each head's query and key (modern family)."""
    tie_embeddings: bool = True
    """The head's weights are the token embedding's."""
    dropout: Fraction = 0.0
    """Dropout in training, on embeddings, attention weights and residual branches."""
    rope_theta: PositiveFloat = 10000.0
    """Base of RoPE's wavelengths (modern family)."""
    norm_eps: PositiveFloat = 1e-5
    """Added to variances under the root."""

    @classmethod
    def beneath(cls, tree: dict[str, Any]) -> dict[str, Any]:
        return shape_of_depth(tree.get("depth"))

    def problems(self) -> list[str]:
        found = []
        if self.depth is not None and PRESETS[self.preset]:
            found.append(f"depth={self.depth} and preset={self.preset}: give one of them")
        if self.n_embd % self.n_head:
            found.append(f"n_embd={self.n_embd} does not divide by n_head={self.n_head}")
        elif self.family == "modern" and self.head_size % 2:
            found.append(f"n_embd / n_head = {self.head_size}: RoPE needs an even head size")
        if self.n_head % self.kv_heads:
            found.append(f"n_head={self.n_head} does not divide by n_kv_head={self.kv_heads}")
        if self.family == "modern":
            for key in ("bias", "qkv_bias"):
                if getattr(self, key):
                    found.append(f"{key}=true is for family=gpt2: omit it")
        elif self.qk_norm or self.n_kv_head not in (None, self.n_head):
            found.append("qk_norm and n_kv_head are for family=modern: omit them")
        return found

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head."""
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
