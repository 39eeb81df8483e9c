"""GPT, in plain PyTorch: no distribution, no third-party kernels.

Shapes: B batch, T sequence, C channels (n_embd), H heads, K key/value heads, D head size,
V vocabulary, S cached tokens.

Two families. gpt2: LayerNorm, learned positions, GELU, biases optional (Radford et al. 2019).
modern: RMSNorm, RoPE, SwiGLU, optional QK-norm and grouped-query attention, no biases (Llama;
with QK-norm, Qwen3).
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.config import Count, Fraction, PositiveFloat, config
from manta.model.attention import (
    DocumentMask,
    attend,
    document_mask,
    document_positions,
    has_flex_kernel,
)
from manta.model.presets import PRESETS

IGNORED = -1  # a target that no loss counts


@config
class ModelConfig:
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    preset: str = "quickstart"
    """A named shape, over which the keys below go: quickstart, gpt2-124m, gpt2-163m, gpt2-350m,
    lf-269m, casa-350m, gpt2-1.5b."""
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

    def problems(self) -> list[str]:
        found = []
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


class KVCache:
    """Keys and values of the tokens seen so far, for every layer: (B, K, S, D) each."""

    def __init__(self, c: ModelConfig, batch: int, length: int, device: torch.device):
        shape = (c.n_layer, 2, batch, c.kv_heads, length, c.head_size)
        self.store = torch.empty(shape, device=device)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts T new keys and values behind those of `layer`; all of them, (B, K, S + T, D)."""
        end = self.length + k.size(2)
        if self.store.dtype != k.dtype:  # known only now: autocast decides it
            self.store = self.store.to(k.dtype)
        self.store[layer, 0, :, :, self.length : end] = k
        self.store[layer, 1, :, :, self.length : end] = v
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.c, self.layer = c, layer
        self.qkv = nn.Linear(
            c.n_embd, (c.n_head + 2 * c.kv_heads) * c.head_size, bias=c.has_qkv_bias
        )
        self.out = nn.Linear(c.n_embd, c.n_embd, bias=c.has_bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_size, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_size, eps=c.norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: DocumentMask | None,
        cache: KVCache | None,
    ) -> Tensor:
        c, (B, T, C) = self.c, x.shape
        # (B, T, (H + 2K) D) -> (B, T, H + 2K, D) -> heads before time: (B, H or K, T, D)
        heads = self.qkv(x).view(B, T, -1, c.head_size).transpose(1, 2)
        q, k, v = heads.split([c.n_head, c.kv_heads, c.kv_heads], dim=1)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        causal = mask is None and T > 1
        if cache is not None:
            past = cache.length
            k, v = cache.extend(self.layer, k, v)
            if past and T > 1:  # new tokens see the past whole, and each other causally
                mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
                causal = False
        dropout = c.dropout if self.training else 0.0
        y = attend(q.to(v.dtype), k.to(v.dtype), v, mask, causal, dropout)
        # (B, H, T, D) -> (B, T, C)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class GeluMLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.up = nn.Linear(c.n_embd, c.hidden, bias=c.has_bias)
        self.down = nn.Linear(c.hidden, c.n_embd, bias=c.has_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(c.n_embd, c.hidden, bias=False)
        self.up = nn.Linear(c.n_embd, c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(c)
        self.attention = Attention(c, layer)
        self.mlp_norm = make_norm(c)
        self.mlp = GeluMLP(c) if c.family == "gpt2" else SwiGLU(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: DocumentMask | None,
        cache: KVCache | None,
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """The whole model; `vocab_size` must be set in its config."""

    cos: Tensor
    sin: Tensor
    flex: bool | None = None  # attention within documents by flex_attention; None: where it can

    def __init__(self, c: ModelConfig):
        super().__init__()
        assert c.vocab_size is not None, "resolved from the dataset before a model is made"
        self.config = c
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        if c.family == "gpt2":
            self.positions = nn.Embedding(c.context_length, c.n_embd)
        else:
            cos, sin = rope_table(c.context_length, c.head_size, c.rope_theta)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = make_norm(c)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """GPT-2's: normal(0.02); what writes to the residual stream, scaled by its depth."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for last in (getattr(module, "out", None), getattr(module, "down", None)):
            if isinstance(last, nn.Linear):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits or, with targets, the cross-entropy in nats.

        Args:
            tokens: (B, T) int64 ids; with a cache, those that follow what is in it.
            targets: (B, T) int64 ids, IGNORED where nothing counts.
            documents: (B, T) integers, the number of each token's document; they never decrease
                along a row. A token sees its own document only, whose positions start at 0.
            reduction: mean over the targets that count (0 if none does), or "none": (B, T), 0
                where ignored.
            cache: is extended by these tokens.
            last_only: logits of the last position only, (B, 1, V).

        Returns:
            (B, T, V) logits without targets; with them the loss, () or (B, T).
        """
        c, T = self.config, tokens.size(1)
        start = cache.length if cache is not None else 0
        assert start + T <= c.context_length, f"{start + T} tokens > context {c.context_length}"
        x = self.embedding(tokens)  # (B, T, C)
        mask = None
        if documents is not None:  # one mask for all layers
            assert cache is None, "a cache holds one document"
            assert documents.shape == tokens.shape, f"{documents.shape} for {tokens.shape}"
            dropout = c.dropout if self.training else 0.0
            can_flex = has_flex_kernel(tokens.device, c.head_size, dropout)
            mask = document_mask(documents, can_flex if self.flex is None else self.flex)
        rope = None
        if c.family == "gpt2":
            if documents is None:
                positions = torch.arange(start, start + T, device=tokens.device)
            else:
                positions = document_positions(documents)
            x = x + self.positions(positions)
        else:
            # Not restarted in a document: RoPE knows only how far a query is from a key, and the
            # mask leaves only pairs of one document.
            rope = self.cos[start : start + T], self.sin[start : start + T]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += T
        logits = self.head(self.norm(x[:, -1:] if last_only else x))
        if targets is None:
            return logits
        loss = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction=reduction,
        )
        if reduction == "none":
            return loss.view_as(targets)
        # The mean of no targets would be 0/0. Only that becomes 0: another NaN must be seen.
        return loss.masked_fill((targets == IGNORED).all(), 0.0)


def make_norm(c: ModelConfig) -> nn.Module:
    if c.family == "gpt2":
        return nn.LayerNorm(c.n_embd, eps=c.norm_eps, bias=c.has_bias)
    return nn.RMSNorm(c.n_embd, eps=c.norm_eps)


def rope_table(length: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, D) each, of RoPE's angles (Su et al. 2021), both halves alike (Llama)."""
    frequencies = theta ** (-torch.arange(0, head_size, 2).float() / head_size)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of (B, H, T, D) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def num_parameters(c: ModelConfig) -> int:
    """Parameters of a model of this config, each counted once; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(c).parameters())
