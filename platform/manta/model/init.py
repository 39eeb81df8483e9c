"""How a new model's weights start, if not as GPT-2's do.

Blocks can pass their input on, heads can look back or find repeats, and embeddings and head can
know which token follows which. A model then starts with what training would find first, or only
late. No shape changes, so the model exports as usual.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.config import Count, Natural, PositiveFloat, config
from manta.model.gpt import GPT, Attention, LanguageModel, ModelConfig
from manta.model.rope import frequencies

MAX_VOCAB = 8192  # because the counts of all pairs are held at once
# Share of the channel that is alike for all tokens in the embeddings' mean square.
CONSTANT_SHARE = 0.16
# Learning rates of Adam over all pairs at once, with embeddings of RMS 1. Trials found these: they
# are the largest that work.
EMBEDDING_LR, HEAD_LR = 0.3, 0.03
BETAS = (0.8, 0.95)
WARMUP_STEPS = 3
ROWS_AT_ONCE = 1024  # bounds the logits in memory
LARGEST_SCORE = 8.0  # of a repeat, before the softmax: e^8 exceeds the tokens in a context


@config
class InitConfig:
    only_for: ClassVar = (("induction_heads", "kind", ("identity",)),)

    checkpoint: str | None = None
    """A run's name, or a checkpoint's folder, whose weights a new run starts from. Its model
    replaces `model` (except dropout), the other keys here do not count, and the data must use its
    tokenizer: data.tokenizer=FOLDER/encoding.json."""
    kind: Literal["gpt2", "identity"] = "gpt2"
    """gpt2: normal(0.02), less for weights that write to the residual stream (an LSTM: as in
    model/lstm.py). identity: those
    weights and an untied head are zero, so that each block passes its input on; the other matrices
    are normal(0.6 / sqrt(n_embd))."""
    embedding_rms: PositiveFloat | None = None
    """Root mean square of the embeddings; null: 0.5 for identity with an untied head, else 0.02,
    which a head that knows nothing yet needs (an LSTM: 0.3)."""
    previous_tokens: Natural = 0
    """Number of heads of the first block, at most all of them, that look at first at the token
    before, the one before that, and so on; needs qk_norm."""
    bigram_steps: Natural = 0
    """Number of steps, over all pairs at once, that fit embeddings and head before training to how
    often each token follows each other one in the data (its first 16M tokens); 0: no fit. Needs an
    untied head and a vocabulary of at most 8,192."""
    induction_heads: tuple[Count, ...] = ()
    """Heads of the second block, at most all of them, that look at first at the token that came
    after an earlier occurrence of the last n tokens. Gives n for each head, for example
    [1, 1, 2, 2]; n is at most previous_tokens."""

    def conflicts(self, model: ModelConfig) -> list[str]:
        """Lists the settings that cannot work with `model`, with remedies."""
        if self.checkpoint is not None:
            return []
        found = []
        if model.is_recurrent and (self.kind != "gpt2" or self.bigram_steps):
            found.append(
                "init.kind=identity and init.bigram_steps are for GPTs: omit them for an LSTM"
            )
        if self.bigram_steps and model.tie_embeddings:
            found.append(
                f"init.bigram_steps={self.bigram_steps}: the head is tied to the embeddings; set "
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
        if self.induction_heads:
            found += [f"init.induction_heads: {problem}" for problem in self._problems(model)]
        return found

    def _problems(self, model: ModelConfig) -> list[str]:
        """Lists the problems of induction heads with `model`."""
        found = []
        most = max(self.induction_heads[: model.n_head])
        if self.kind != "identity":  # what else the first block writes would drown the signatures
            found.append("need init.kind=identity: set it, or omit them")
        if most > self.previous_tokens:
            found.append(
                f"a match of {most} tokens needs as many heads that look back: set "
                f"init.previous_tokens={most}, or match fewer tokens"
            )
        if most > model.n_head:
            found.append(
                f"a match of {most} tokens needs as many heads that look back, and a block has "
                f"{model.n_head}: set model.n_head={most} or more, or match fewer tokens"
            )
        if model.n_layer < 2:
            found.append("are in the second block: set model.n_layer=2 or more, or omit them")
        if self.previous_tokens and not _slow_pairs(model):
            found.append(
                f"model.rope_theta={model.rope_theta:g} turns too much over {model.context_length} "
                f"tokens: set model.rope_theta={model.context_length**2}, or omit them"
            )
        return found

    def signature(self, model: ModelConfig) -> int:
        """The number of channels that a head writes next to a token's own to tell tokens apart.

        They fit in the slow half of a head, and those of all heads in a quarter of the stream. The
        number is 0 without induction heads.
        """
        if not self.induction_heads:
            return 0
        room = model.n_embd // (4 * max(self.induction_heads))
        return min(2 * len(_slow_pairs(model)), max(2, room // 2 * 2))

    def reserved(self, model: ModelConfig) -> slice:
        """The channels that embeddings leave free for heads to write to."""
        return slice(1, 1 + self.signature(model) * max(self.induction_heads, default=0))

    def rms(self, model: ModelConfig) -> float:
        """The root mean square of the embeddings."""
        is_small = self.kind == "gpt2" or model.tie_embeddings
        return self.embedding_rms or (0.02 if is_small else 0.5)


@torch.no_grad()
def initialise(
    model: LanguageModel, c: InitConfig, fit: Callable[[GPT], None] = lambda _: None
) -> None:
    """Sets the weights of a new model, in place, from torch's random state. `fit` may set the
    embeddings and the head of a GPT from data."""
    if not isinstance(model, GPT):
        if c.embedding_rms is not None:
            nn.init.normal_(_embeddings(model), std=c.embedding_rms)
        return
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
        nn.init.normal_(_embeddings(model), std=c.rms(model.config))
    if c.previous_tokens:
        _embeddings(model)[:, c.reserved(model.config)] = 0
        _embeddings(model)[:, 0] = _constant(model) * c.rms(model.config)
        _look_back(model, min(c.previous_tokens, model.config.n_head))
    with torch.enable_grad():
        fit(model)
    if c.induction_heads:
        _find_repeats(model, c)


def _embeddings(model: LanguageModel) -> Tensor:
    """The embeddings without the padding, (V, C)."""
    return model.embedding.weight.data[: model.config.vocab_size]


def _constant(model: GPT) -> float:
    """The value of channel 0 in embeddings of RMS 1."""
    return (CONSTANT_SHARE * model.config.n_embd) ** 0.5


def _attention(model: GPT, layer: int) -> tuple[Attention, Tensor]:
    """Returns a layer's attention, and its query, key and value weights by head, (H + 2K, D, C)."""
    attention = model.blocks[layer].get_submodule("attention")
    assert isinstance(attention, Attention)
    return attention, attention.qkv.weight.data.view(
        -1, model.config.head_size, model.config.n_embd
    )


def _slow_pairs(c: ModelConfig) -> list[int]:
    """Lists the pairs of channels, in the slower half, that RoPE turns by at most a right angle
    over the whole context. These pairs can tell what a token is wherever it stands."""
    slow = frequencies(c) * c.context_length <= math.pi / 2
    half = c.head_size // 2
    return [i for i in range(half // 2, half) if slow[i]]


def _look_back(model: GPT, heads: int) -> None:
    """Makes the first heads of the first block look 1, 2, ... tokens back.

    Channel 0, which is alike for all tokens, gives these heads a key k that is alike at all
    positions, and the query R(d) k. RoPE turns a query and a key by their positions' angles, so
    they agree most at the distance d. Only the fastest quarter of the pairs tells neighbours apart.
    """
    c, (attention, weight) = model.config, _attention(model, 0)
    half = c.head_size // 2
    fast = max(1, half // 4)
    size = 4.0 / _constant(model)  # outweighs the other channels, which are for learning
    turns = frequencies(c)[:fast]
    for head in range(heads):
        query, key = weight[head], weight[c.n_head + head * c.kv_heads // c.n_head]
        for row in (query, key) if head * c.kv_heads % c.n_head == 0 else (query,):
            row *= 0.1
            row[:, 0] = 0
        angles = (head + 1) * turns
        key[:fast, 0] = size
        query[:fast, 0] = size * angles.cos()
        query[half : half + fast, 0] = -size * angles.sin()
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.data.mul_(2**0.5)  # makes the softmax sharp enough to pick one of 16 neighbours


def _find_repeats(model: GPT, c: InitConfig) -> None:
    """Sets up induction heads (Olsson et al. 2022), which training alone finds late if at all.

    Heads of the first block that look b tokens back write that token's signature, so that each
    place tells what came before it. A head of the second block compares signatures: its key has
    those of the tokens 1, 2, ... back, and its query those of the token itself, 1 back, and so on.
    Where they agree, the tokens before that place equal the last ones, so the token at that place
    may come again. Training decides what to do with it.
    """
    shape, size = model.config, c.signature(model.config)
    first, values = _attention(model, 0)
    second, weight = _attention(model, 1)
    D, H, K = shape.head_size, shape.n_head, shape.kv_heads
    code = _signatures(model, size)
    written = range(max(c.induction_heads[:H]))
    channels = [slice(1 + back * size, 1 + (back + 1) * size) for back in written]
    unit = c.rms(shape) * torch.eye(size)
    for back in written:
        values[H + K + back * K // H, :size] = code
        first.out.weight.data[:, back * D : (back + 1) * D] *= 0.1
        first.out.weight.data[channels[back], back * D : back * D + size] = unit
    pairs = _slow_pairs(shape)[-size // 2 :]
    for head in range(len(c.induction_heads[:H])):
        query, key = weight[head], weight[H + head * K // H]
        leader = head * K // H * H // K  # the first of the heads that share a key
        alike = c.induction_heads[leader]
        query.zero_()
        if head == leader:
            key.zero_()
        for back in range(alike):
            rows = [row for i in pairs[back::alike] for row in (i, i + D // 2)]
            which = torch.arange(len(rows))
            if back == 0:
                query[rows] = code[: len(rows)]
            else:
                query[rows, channels[back - 1].start + which] = 1.0
            if head == leader:
                key[rows, channels[back].start + which] = 1.0
    for norm in (second.q_norm, second.k_norm):
        norm.weight.data.mul_((LARGEST_SCORE / D**0.5) ** 0.5)


def _signatures(model: GPT, size: int) -> Tensor:
    """Returns the matrix, (size, C), that turns a token's normalized embedding into its signature.

    Over the vocabulary, a signature's numbers have mean 0, variance 1 and no correlation, so that
    different tokens are as unlike as possible.
    """
    x = F.rms_norm(_embeddings(model).float(), (model.config.n_embd,))
    mean = x.mean(0)
    variances, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    used = variances > 1e-3 * variances.max()
    turned = F.normalize(torch.randn(int(used.sum()), size), dim=0).to(x)
    code = (directions[:, used] / variances[used].sqrt() @ turned).T
    code[:, 0] -= code @ mean / mean[0]  # the channel that all tokens share removes the mean
    return code


def fit_bigrams(model: GPT, counts: Tensor, c: InitConfig) -> float:
    """Fits embeddings and head, in place, to (V, V) counts of which token follows which.

    Minimises the cross-entropy of head(norm(embedding)), which is what a model computes whose
    blocks do nothing.

    Returns:
        That cross-entropy over the counted pairs, in nats.
    """
    device, V = model.embedding.weight.device, len(counts)
    counts = counts.to(device)
    seen = counts.sum(1, keepdim=True)
    share = seen / seen.sum()
    following = counts.sum(0) / seen.sum()
    wanted = (counts + following) / (seen + 1) * share  # one pseudo-count, for unseen tokens
    embeddings = torch.randn(V, model.config.n_embd).to(device).requires_grad_()
    head = torch.zeros_like(embeddings).requires_grad_()
    weights = [embeddings, head]
    groups = [
        {"params": [weight], "lr": lr, "peak": lr}
        for weight, lr in zip(weights, (EMBEDDING_LR, HEAD_LR), strict=True)
    ]
    # Many tokens have hardly any gradient. The tiny eps keeps its sign, which is what matters.
    adam = torch.optim.AdamW(groups, betas=BETAS, eps=1e-12, weight_decay=0.0, fused=True)
    for step in range(c.bigram_steps + 1):
        if c.previous_tokens:
            embeddings.data[:, c.reserved(model.config)] = 0
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
    scale = c.rms(model.config) / embeddings.detach().square().mean().sqrt()
    model.embedding.weight.data[:V] = scale * embeddings.detach()
    model.head.weight.data[:V] = head.detach()
    return loss
