"""GPT, in plain PyTorch: no distribution, no third-party kernels.

Shapes: B batch, T sequence, C channels (n_embd), H heads, K key/value heads, D head size,
V vocabulary, S cached tokens.

It has two families. gpt2: LayerNorm, learned positions, GELU, biases optional (Radford et al.
2019). modern: RMSNorm, RoPE, SwiGLU, optional QK-norm and grouped-query attention, no biases
(Llama; with QK-norm, Qwen3).
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.model.attention import (
    DocumentMask,
    attend,
    branch_mask,
    branch_positions,
    document_mask,
    document_positions,
    has_flex_kernel,
)
from manta.model.cache import Cache, KVCache
from manta.model.loss import IGNORED, Head
from manta.model.ragged import Ragged
from manta.model.recomputation import Recompute, recomputing
from manta.model.rope import rope_table, rotate
from manta.model.shape import ModelConfig

__all__ = ["GPT", "IGNORED", "KVCache", "LanguageModel", "ModelConfig"]


class HeadNorm(nn.RMSNorm):
    """RMSNorm of heads. Autocast gives them in bf16, and torch has a fused kernel only for an input
    of the weight's dtype: it would warn, and compute the same in several passes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.c, self.layer = c, layer
        self.dropout = c.rates["attention_weights"]
        self.qkv = nn.Linear(
            c.n_embd, (c.n_head + 2 * c.kv_heads) * c.head_size, bias=c.has_qkv_bias
        )
        self.out = nn.Linear(c.n_head * c.head_size, c.n_embd, bias=c.has_bias)
        if c.qk_norm:
            self.q_norm = HeadNorm(c.head_size, eps=c.norm_eps)
            self.k_norm = HeadNorm(c.head_size, eps=c.norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: DocumentMask | None,
        cache: KVCache | Ragged | None,
    ) -> Tensor:
        c, (B, T, _) = self.c, x.shape
        # (B, T, (H + 2K) D) -> (B, T, H + 2K, D) -> heads before time: (B, H or K, T, D)
        heads = self.qkv(x).view(B, T, -1, c.head_size).transpose(1, 2)
        q, k, v = heads.split([c.n_head, c.kv_heads, c.kv_heads], dim=1)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        dropout = self.dropout if self.training else 0.0
        if cache is not None:
            y = cache.attend(self.layer, q, k, v, mask, dropout)
        else:
            causal = mask is None and T > 1
            y = attend(q.to(v.dtype), k.to(v.dtype), v, mask, causal, dropout)
        # (B, H, T, D) -> (B, T, H D) -> (B, T, C)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class GeluMLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.up = nn.Linear(c.n_embd, c.hidden, bias=c.has_bias)
        self.down = nn.Linear(c.hidden, c.n_embd, bias=c.has_bias)
        self.dropout = nn.Dropout(c.rates["activations"])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.gelu(self.up(x), approximate="tanh")))


class SwiGLU(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(c.n_embd, c.hidden, bias=False)
        self.up = nn.Linear(c.n_embd, c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.n_embd, bias=False)
        self.dropout = nn.Dropout(c.rates["activations"])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(c)
        self.attention = Attention(c, layer)
        self.mlp_norm = make_norm(c)
        self.mlp = GeluMLP(c) if c.family == "gpt2" else SwiGLU(c)
        self.attention_dropout = nn.Dropout(c.rates["attention"])
        self.mlp_dropout = nn.Dropout(c.rates["mlp"])

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        rope: tuple[Tensor, Tensor] | None,
        mask: DocumentMask | None,
        cache: KVCache | Ragged | None,
        recompute: Recompute = "none",
    ) -> tuple[Tensor, Tensor]:
        """Returns the residual stream (B, T, C) and a branch (B, T, C) still to be added to it;
        takes both from the block before. A compiled block adds and normalises in one pass through
        memory, so the sum is left to the block or norm that comes next."""
        if branch is not None and recompute != "none":  # so that one tensor is kept, not two
            x, branch = x + branch, None
        return recomputing(recompute, self._forward, x, branch, rope, mask, cache)

    def _forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        rope: tuple[Tensor, Tensor] | None,
        mask: DocumentMask | None,
        cache: KVCache | Ragged | None,
    ) -> tuple[Tensor, Tensor]:
        if branch is not None:
            x = x + branch
        attended = self.attention(self.attention_norm(x), rope, mask, cache)
        x = x + self.attention_dropout(attended)
        return x, self.mlp_dropout(self.mlp(self.mlp_norm(x)))


def _run(block: nn.Module, *arguments: Any) -> tuple[Tensor, Tensor]:
    return block(*arguments)


class LanguageModel(nn.Module):
    """What the models of all families have: an embedding, a head, and state dicts without the
    vocabulary's padding. `vocab_size` must be set in the config."""

    recompute: Recompute = "none"  # activation checkpointing

    def __init__(self, c: ModelConfig):
        super().__init__()
        assert c.vocab_size is not None, "vocab_size is resolved before a model is made"
        self.config = c
        self.embedding = nn.Embedding(c.padded_vocab_size, c.n_embd)

    @property
    def window(self) -> int | None:
        """The most tokens that the model can read as one text; None: any number."""
        raise NotImplementedError

    def new_cache(self, batch: int, length: int, /) -> Cache:
        """Makes an empty cache, for `batch` texts of up to `length` tokens each."""
        raise NotImplementedError

    def compile_blocks(self) -> None:
        """Compiles for training, at first use, what compilation makes faster."""
        raise NotImplementedError

    def _init(self, module: nn.Module) -> None:
        """Draws the initial weights of one module."""
        raise NotImplementedError

    def _complete(self) -> None:
        """Makes the head, which comes last, and draws the initial weights."""
        c = self.config
        assert c.vocab_size is not None
        self.head: nn.Linear
        if c.labels:
            self.head = nn.Linear(c.n_embd, c.head_rows, bias=False)
        else:
            self.head = Head(c.n_embd, c.vocab_size, c.padded_vocab_size)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.apply(self._init)
        with torch.no_grad():  # padding is zero, so that saving and reading a model changes nothing
            for name in c.padded:
                self.get_parameter(name)[c.vocab_size :] = 0
        # State dicts have no padding.
        self.register_state_dict_post_hook(_without_padding)
        self.register_load_state_dict_pre_hook(_with_padding)


class GPT(LanguageModel):
    """The whole model."""

    cos: Tensor
    sin: Tensor
    flex: bool | None = None  # whether flex_attention takes documents; None: if it can

    def __init__(self, c: ModelConfig):
        super().__init__(c)
        if c.family == "gpt2":
            self.positions = nn.Embedding(c.context_length, c.n_embd)
        else:
            cos, sin = rope_table(c)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.dropout = nn.Dropout(c.rates["embeddings"])
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = make_norm(c)
        self._complete()
        self._compiled: Callable[..., tuple[Tensor, Tensor]] = _run

    @property
    def window(self) -> int:
        return self.config.context_length

    def new_cache(self, batch: int, length: int) -> KVCache:
        return KVCache(self.config, batch, length, self.embedding.weight.device)

    def compile_blocks(self) -> None:
        """Compiles the blocks and the head's loss for training, when they are first used.

        The first block has one compilation, and all others share a second.
        """
        self._compiled = torch.compile(_run, dynamic=False)
        if isinstance(self.head, Head):
            self.head.compiled = True

    def _init(self, module: nn.Module) -> None:
        """Sets GPT-2's initial weights: normal(0.02), scaled down by the depth for weights that
        write to the residual stream."""
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
        cache: KVCache | Ragged | None = None,
        last_only: bool = False,
        branches: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Computes logits or, with targets, the cross-entropy in nats.

        Args:
            tokens: (B, T) int64 ids; with a cache, they follow the tokens in it.
            targets: (B, T) int64 ids, IGNORED where no target counts.
            documents: (B, T) integers, the number of each token's document; they never decrease
                along a row. A token sees only its own document, whose positions start at 0.
            reduction: "mean" over the targets that count (0 if none does), or "none": the loss of
                each target, (B, T), 0 where ignored.
            cache: keys and values of earlier tokens; these tokens are added to it.
            last_only: whether to give logits of the last position only, (B, 1, V).
            branches: (B, T) integers, never decreasing along a row: 0 for a common beginning, then
                1, 2, ... for its continuations, each of which sees the beginning and itself.
            at: (B, T) booleans: returns logits of these places only, (N, V), row by row.

        Returns:
            (B, T, V) logits without targets; with targets the loss, () or (B, T). A classifier has
            logits of its labels instead of V, and no targets.
        """
        c, T = self.config, tokens.size(1)
        length = T if cache is None else cache.longest(T)
        assert length <= c.context_length, f"{length} tokens > context {c.context_length}"
        x = self.embedding(tokens)  # (B, T, C)
        mask: DocumentMask | None = None if cache is None else cache.mask(T)
        # (T,), or with a cache (1, T) or (B, T)
        positions = cache.positions(T) if cache else torch.arange(T, device=tokens.device)
        if documents is not None:  # one mask for all layers
            assert cache is None, "a cache holds one document"
            assert documents.shape == tokens.shape, f"{documents.shape} for {tokens.shape}"
            dropout = c.rates["attention_weights"] if self.training else 0.0
            can_flex = has_flex_kernel(tokens.device, c.head_size, dropout)
            mask = document_mask(documents, can_flex if self.flex is None else self.flex)
        if branches is not None:
            assert cache is None and documents is None
            mask, positions = branch_mask(branches), branch_positions(branches)
        rope = None
        if c.family == "gpt2":
            if documents is not None:
                positions = document_positions(documents)
            x = x + self.positions(positions)
        else:
            # Positions need not restart in a document: RoPE depends only on the distance between
            # query and key, and the mask leaves only pairs within one document.
            # (T, D), or with a cache or branches (B or 1, 1, T, D)
            rope = self.cos[positions], self.sin[positions]
            if cache is not None or branches is not None:
                rope = rope[0].unsqueeze(1), rope[1].unsqueeze(1)
        x, branch = self.dropout(x), None
        for block in self.blocks:
            # Sampling has a new shape at each token, so only training is worth compiling.
            run = self._compiled if torch.is_grad_enabled() else _run
            x, branch = run(block, x, branch, rope, mask, cache, self.recompute)
        x = x + branch
        if cache is not None:
            cache.advance(T)
        if at is not None:
            x = x[at]  # (N, C)
        x = self.norm(x[:, -1:] if last_only else x)
        if c.labels:
            assert targets is None, "an objective makes the loss of a classifier"
            return self.head(x)
        return self.head(x, targets, reduction)


def unpadded(name: str, weight: Tensor, c: ModelConfig) -> Tensor:
    """The rows of a weight that are not padding. `name` is as in GPT's state_dict."""
    return weight[: c.vocab_size] if name in c.padded else weight


def _without_padding(model: LanguageModel, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name in model.config.padded:
        state[prefix + name] = unpadded(name, state[prefix + name], model.config)


def _with_padding(model: LanguageModel, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    c = model.config
    for name in c.padded:
        weight = state.get(prefix + name)
        if weight is not None and len(weight) == c.vocab_size:
            state[prefix + name] = F.pad(weight, (0, 0, 0, c.padded_vocab_size - len(weight)))


def make_norm(c: ModelConfig) -> nn.Module:
    if c.family == "gpt2":
        return nn.LayerNorm(c.n_embd, eps=c.norm_eps, bias=c.has_bias)
    return nn.RMSNorm(c.n_embd, eps=c.norm_eps)
