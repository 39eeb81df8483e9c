"""How a new model's weights start, where not as GPT-2's do: blocks that pass their input on, heads
that look back, embeddings and head that know which token follows which.

What training would find first, found sooner: it changes no shape, so that a model exports as ever.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.config import Natural, PositiveFloat, config
from manta.model.gpt import GPT, Attention, ModelConfig

MAX_VOCAB = 8192  # the counts of all pairs are held at once
# Of the channel that is alike for all tokens, in the embeddings' RMS over all channels, squared.
CONSTANT_SHARE = 0.16
# Of Adam over all pairs at once, on embeddings of RMS 1: found by trial, as the largest that work.
EMBEDDING_LR, HEAD_LR = 0.3, 0.03
BETAS = (0.8, 0.95)
WARMUP_STEPS = 3
ROWS_AT_ONCE = 1024  # bounds the logits held


@config
class InitConfig:
    kind: Literal["gpt2", "identity"] = "gpt2"
    """gpt2: normal(0.02), less for what writes to the residual stream; identity: what writes to it,
    and a head of its own, are zero, so that each block passes its input on; the other matrices are
    normal(0.6 / sqrt(n_embd))."""
    embedding_rms: PositiveFloat | None = None
    """Root mean square of the embeddings; null: 0.02 for gpt2, 0.5 for identity."""
    previous_tokens: Natural = 0
    """So many heads of the first block, at most all of them, look at the token before, the one
    before that, ... at first; for qk_norm."""
    bigram_steps: Natural = 0
    """Before training, embeddings and head are fitted to how often each token follows each other
    one in the data (its first 16M tokens), in so many steps over all pairs at once; 0: not. For a
    head of its own and vocabularies up to 8,192."""

    def conflicts(self, model: ModelConfig) -> list[str]:
        """What of this cannot work with a model."""
        found = []
        if self.bigram_steps and model.tie_embeddings:
            found.append(
                f"init.bigram_steps={self.bigram_steps}: the embeddings are the head too; set "
                "model.tie_embeddings=false, or init.bigram_steps=0"
            )
        if self.bigram_steps and (model.vocab_size or 0) > MAX_VOCAB:
            found.append(
                f"init.bigram_steps={self.bigram_steps} is for vocabularies up to {MAX_VOCAB}, not "
                f"{model.vocab_size}: set init.bigram_steps=0"
            )
        if self.previous_tokens and not (model.family == "modern" and model.qk_norm):
            found.append(
                f"init.previous_tokens={self.previous_tokens} needs model.qk_norm=true and the "
                "modern family: set them, or init.previous_tokens=0"
            )
        return found

    @property
    def rms(self) -> float:
        return self.embedding_rms or (0.02 if self.kind == "gpt2" else 0.5)


@torch.no_grad()
def initialise(model: GPT, c: InitConfig) -> None:
    """Sets the weights of a new model, in place, from torch's random state."""
    if c.kind == "identity":
        for block in model.blocks:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.6 * model.config.n_embd**-0.5)
                if name.endswith((".out", ".down")):
                    nn.init.zeros_(module.weight)
        if not model.config.tie_embeddings:
            nn.init.zeros_(model.head.weight)
    if c.kind == "identity" or c.embedding_rms is not None:
        nn.init.normal_(_embeddings(model), std=c.rms)
    if c.previous_tokens:
        _embeddings(model)[:, 0] = _constant(model) * c.rms
        _look_back(model, min(c.previous_tokens, model.config.n_head))


def _embeddings(model: GPT) -> Tensor:
    """(V, C), without the padding."""
    return model.embedding.weight.data[: model.config.vocab_size]


def _constant(model: GPT) -> float:
    """Of channel 0, where the embeddings' RMS is 1."""
    return (CONSTANT_SHARE * model.config.n_embd) ** 0.5


def _look_back(model: GPT, heads: int) -> None:
    """The first heads of the first block look 1, 2, ... tokens back.

    Channel 0, alike for all tokens, gives them a key k that is alike at all positions, and the
    query R(d) k. RoPE turns a query and a key by their positions' angles, so that the two agree
    most at the distance d. Only the fastest quarter of the pairs tells neighbours apart.
    """
    c, attention = model.config, model.blocks[0].get_submodule("attention")
    assert isinstance(attention, Attention)
    half = c.head_size // 2
    fast = max(1, half // 4)
    weight = attention.qkv.weight.data.view(-1, c.head_size, c.n_embd)  # (H + 2K, D, C)
    size = 4.0 / _constant(model)  # so that it outweighs the other channels, which are for learning
    frequencies = c.rope_theta ** (-torch.arange(fast) / half)
    for head in range(heads):
        query, key = weight[head], weight[c.n_head + head * c.kv_heads // c.n_head]
        for row in (query, key) if head * c.kv_heads % c.n_head == 0 else (query,):
            row *= 0.1
            row[:, 0] = 0
        angles = (head + 1) * frequencies
        key[:fast, 0] = size
        query[:fast, 0] = size * angles.cos()
        query[half : half + fast, 0] = -size * angles.sin()
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.data.mul_(2**0.5)  # a softmax sharp enough to pick one of 16 neighbours


def fit_bigrams(model: GPT, counts: Tensor, c: InitConfig) -> float:
    """Fits embeddings and head, in place, to (V, V) counts of which token follows which: minimises
    the cross-entropy of head(norm(embedding)), what a model whose blocks do nothing computes.

    Returns:
        That cross-entropy over the pairs counted, in nats.
    """
    device, V = model.embedding.weight.device, len(counts)
    counts = counts.to(device)
    seen = counts.sum(1, keepdim=True)
    share = seen / seen.sum()
    following = counts.sum(0) / seen.sum()
    wanted = (counts + following) / (seen + 1) * share  # one pseudo-count, for tokens not seen
    embeddings = torch.randn(V, model.config.n_embd).to(device).requires_grad_()
    head = torch.zeros_like(embeddings).requires_grad_()
    weights = [embeddings, head]
    groups = [
        {"params": [weight], "lr": lr, "peak": lr}
        for weight, lr in zip(weights, (EMBEDDING_LR, HEAD_LR), strict=True)
    ]
    # Of many tokens, there is hardly any gradient: what matters is its sign.
    adam = torch.optim.AdamW(groups, betas=BETAS, eps=1e-12, weight_decay=0.0, fused=True)
    for step in range(c.bigram_steps + 1):
        if c.previous_tokens:
            embeddings.data[:, 0] = _constant(model)
        loss = 0.0
        for some, targets in zip(
            embeddings.split(ROWS_AT_ONCE), wanted.split(ROWS_AT_ONCE), strict=True
        ):
            part = -(targets * F.log_softmax(model.norm(some) @ head.T, dim=-1)).sum()
            if step < c.bigram_steps:
                part.backward(inputs=weights)
            loss += part.item()
        if step < c.bigram_steps:
            left = min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / c.bigram_steps)
            for group in adam.param_groups:
                group["lr"] = left * group["peak"]
            adam.step()
            adam.zero_grad()
    scale = c.rms / embeddings.detach().square().mean().sqrt()
    model.embedding.weight.data[:V] = scale * embeddings.detach()
    model.head.weight.data[:V] = head.detach()
    return loss
