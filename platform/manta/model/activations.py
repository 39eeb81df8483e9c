"""Bytes that a forward pass keeps for its backward pass, op by op. Pure arithmetic.

The counts were made by hand from gpt.py under torch's eager autograd: each op's saved tensors, each
storage once, without weights and buffers. tests/model/test_cost.py compares them with the storages
that are really alive. Dropout adds one byte for each element of its mask, as CUDA keeps it; the
mask of `document_mask` is not counted. Attention never holds T x T scores, because the kernels that
the model uses stream them.

Letters are those of gpt.py; N = B T tokens of a micro batch, F hidden channels of the MLP.

The layers of an LSTM keep a workspace whose form only the kernel knows. Its size was measured for
the one of torch's CPUs (oneDNN); cuDNN's is taken to be the same, and has not been measured.
"""

import dataclasses
from typing import Literal

from manta.model import cpu_attention
from manta.model.cost import NO_ADAPTERS, adapters, learning, weights
from manta.model.lora import LoraConfig
from manta.model.loss import loss_chunk
from manta.model.recomputation import Recompute
from manta.model.shape import ModelConfig
from manta.model.trainable import Trainable, blocks_trained

FP32, BF16, INT64 = 4, 2, 8  # bytes
# Bytes of an LSTM layer's workspace for a token and a channel: the gates, the states, their copies.
# Measured for 3 to 2,048 tokens and 32 to 512 channels: 61 to 63 and 43 to 45 where a micro batch
# has a hundred tokens or more.
WORKSPACE = {"fp32": 61.5, "bf16": 43.8}

Dtype = Literal["bf16", "fp32"]
DeviceType = Literal["cuda", "cpu"]


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes that the activations of one micro batch take on one worker."""

    blocks: int
    """Bytes that all blocks hold from forward to backward."""
    ends: int
    """Bytes held outside the blocks: token ids, positions, the last norm."""
    loss: int
    """Bytes that the loss holds: the gradients of the head's input and of its weight, made in the
    forward pass."""
    autocast: int
    """bf16 copies of the blocks' weights, which autocast makes at first use; 0 in fp32."""
    recomputed: int
    """Bytes that backward computes again, one block at a time (activation checkpointing)."""
    block_work: int
    """Peak of the gradients inside one block's backward."""
    loss_work: int
    """Peak at the loss: a chunk's logits, probabilities and their gradient, and temporary copies of
    the head's weight and of its gradient."""

    @property
    def held(self) -> int:
        """Bytes held after the forward; checkpointing leaves at most one block's bf16 copies."""
        return self.blocks + self.ends + self.loss + (0 if self.recomputed else self.autocast)

    @property
    def temporary(self) -> int:
        """The peak beyond `held`, reached at the loss or inside a block's backward."""
        return max(self.at_loss, self.in_backward)

    @property
    def at_loss(self) -> int:
        """Bytes beyond `held` at the end of the forward pass."""
        copies = self.autocast if self.recomputed else 0  # all copies exist at the loss
        return self.loss_work + copies

    @property
    def in_backward(self) -> int:
        """Bytes beyond `held` inside the last block's backward, which comes first."""
        return self.recomputed + self.block_work


def activations(
    c: ModelConfig,
    micro_batch_size: int,
    seq_len: int,
    dtype: Dtype,
    checkpointing: Recompute = "none",
    device: DeviceType = "cuda",
    compiled_loss: bool = False,
    trainable: Trainable = "all",
    lora: LoraConfig = NO_ADAPTERS,
) -> Activations:
    """Computes the bytes of a micro batch of `micro_batch_size` sequences of `seq_len` tokens.

    Args:
        dtype: dtype of the matrix products; the residual stream and the norms are fp32 (autocast).
        checkpointing: none keeps all; selective keeps a block's input and the outputs of its matrix
            products and attention; full keeps a block's input.
        device: on cuda, the kernel for RMSNorm keeps only its input; on the CPU, RMSNorm also keeps
            the normalized values.
        trainable: the weights that learn. Blocks before the first of them keep nothing, as the
            backward pass does not reach them.
        lora: the adapters that learn in place of the model's own weights.
        compiled_loss: whether the head's loss is compiled (model/loss.py) and so holds no fp32
            logits.
    """
    if c.is_recurrent:
        return _of_lstm(c, micro_batch_size, seq_len, dtype, device, compiled_loss)
    C, H, D, F, L = c.n_embd, c.n_head, c.head_size, c.hidden, blocks_trained(trainable, c.n_layer)
    learnt = learning(c, trainable, lora)
    is_whole = lora.rank is None  # whether a block that learns does so with all its weights
    head = "embedding" if c.tie_embeddings else "head"
    head_learns = any(w.kind == head for w in learnt)
    embeds = any(w.kind == "embedding" for w in learnt)
    N, a = micro_batch_size * seq_len, BF16 if dtype == "bf16" else FP32
    HD, KD, is_gpt2 = c.query_size, c.kv_heads * D, c.family == "gpt2"
    qkv, rates = a * (HD + 2 * KD), c.rates
    # Attention on a CPU in bf16 (model/cpu_attention.py) keeps less than torch's own kernels.
    drops = rates["attention_weights"]
    by_products = device == "cpu" and dtype == "bf16" and not drops and cpu_attention.pays()
    attended = a * HD + (0 if by_products else FP32 * H)  # the output, and the scores' log-sum-exp

    if is_gpt2:
        norm = FP32 * C + 2 * FP32  # input, mean, 1/std
        heads = qkv
        mlp = a * C + 2 * a * F  # input, GELU's input, GELU's output
        products = qkv + a * C + a * F + a * C
    else:
        norm = FP32 * C + FP32  # input, 1/rms
        if device == "cpu" and is_whole:
            norm += FP32 * C  # normalized
        heads = qkv + a * (HD + KD)  # v is a view of qkv; RoPE makes new q and k
        if c.qk_norm:  # normalized, 1/rms; in bf16 also an fp32 copy of its input
            copies = 1 if dtype == "fp32" else 2
            copies -= device == "cpu" and not is_whole
            heads += copies * FP32 * (HD + KD) + FP32 * (H + c.kv_heads)
            if device == "cpu" and not by_products:
                # torch's attention lays out its output like q, whose layout QK-norm changes, so
                # that joining the heads makes a copy.
                heads += a * HD
        # Autocast copies the input twice, for gate and for up: it caches only copies of weights.
        mlp = a * C * (1 if dtype == "fp32" else 2) + 4 * a * F
        products = qkv + a * C + 2 * a * F + a * C
    masks = C * bool(rates["attention"]) + F * bool(rates["activations"]) + C * bool(rates["mlp"])
    mlp += _of_adapters(c, lora, dtype)
    products += _products_of_adapters(c, lora, a)
    whole = N * (2 * norm + a * C + heads + attended + mlp + masks)
    kept = {
        "none": whole,
        "selective": N * (FP32 * C + products + attended),
        "full": N * FP32 * C,
    }[checkpointing]

    # What the first norm does not keep, as nothing before it learns: all, if it does not learn
    # either; on a CPU, RMSNorm's input.
    unread = 0
    if not embeds and (not is_whole or (device == "cpu" and not is_gpt2)):
        unread = N * (FP32 * C + FP32 if is_whole else norm)
    ends = N * norm - (0 if L else unread)
    if embeds:
        ends += N * (INT64 + C * bool(rates["embeddings"])) + (seq_len * INT64 if is_gpt2 else 0)
    if L and not is_gpt2:
        ends += seq_len * 2 * FP32 * D  # RoPE's cos and sin
    V = c.head_rows
    chunk = min(N, loss_chunk(device, compiled_loss))
    # The plain loss holds logits and probabilities, the compiled one logits and their gradient. In
    # bf16, softmax first makes fp32 logits, and there are also a bf16 copy of the head's weight and
    # the product that is added to the weight's gradient, if it learns. That gradient counts as held
    # after the loss; while the logits of the first chunk are there, it is not there yet.
    later = FP32 * V * C if head_learns and chunk == N else 0
    logits = chunk * V * FP32
    at_loss = max(2 * logits - later, logits)
    if dtype == "bf16":
        at_once = 2 * BF16 if compiled_loss else BF16 + 2 * FP32
        copy = BF16 * V * C
        made = chunk * V * BF16 + (copy if head_learns else 0)
        at_loss = copy + max(chunk * V * at_once - later, made)
    linear = [w for w in learnt if w.is_linear]
    autocast = BF16 * sum(w.total for w in linear) if dtype == "bf16" else 0
    if not is_whole and dtype == "bf16" and checkpointing == "none":
        # Autocast does not cache the copies of weights that do not learn, but backward needs them.
        autocast += BF16 * sum(w.total for w in weights(c) if w.is_linear)
    # The MLP has the gradients of its hidden values and of the stream on both sides, and a weight's
    # gradient before it is added to the accumulated one; autocast makes it from a bf16 gradient.
    weight = max((w.numel for w in linear), default=0) * (FP32 + (BF16 if dtype == "bf16" else 0))
    return Activations(
        blocks=L * kept - (unread if L and checkpointing == "none" else 0),
        ends=ends,
        loss=N * FP32 * C + (FP32 * V * C if head_learns else 0),
        autocast=autocast,
        recomputed=whole - kept if L else 0,
        block_work=N * (a * F + 2 * FP32 * C) + weight if L else 0,
        loss_work=at_loss + N * FP32 * C,
    )


def _of_adapters(c: ModelConfig, lora: LoraConfig, dtype: Dtype) -> int:
    """Bytes a token that a block keeps because of its adapters; less than 0 where layers without
    an adapter do not learn, and keep no input."""
    if lora.rank is None:
        return 0
    a, C, F = BF16 if dtype == "bf16" else FP32, c.n_embd, c.hidden
    targets = lora.for_model(c).targets or ()
    into = {"qkv": C, "out": c.query_size, "gate": C, "up": C, "down": F}
    found = len(targets) * a * lora.rank  # B's input
    found -= 0 if "qkv" in targets else a * C
    found -= 0 if "down" in targets else a * F
    ups = [name for name in ("gate", "up") if c.family == "modern" or name == "up"]
    read = sum(name in targets for name in ups)
    if dtype == "fp32":  # one input for gate and up
        found -= 0 if read else a * C
    else:
        found -= a * C * (len(ups) - read)
    if lora.dropout:
        found += sum(into[name] for name in targets)  # the masks
        if dtype == "fp32" and read == 2:
            found += a * C  # one input each
    return found


def _products_of_adapters(c: ModelConfig, lora: LoraConfig, a: int) -> int:
    """Bytes a token of the matrix products of a block's adapters."""
    return a * sum(w.shape[0] * w.count for w in adapters(c, lora)) // c.n_layer


def _of_lstm(
    c: ModelConfig,
    micro_batch_size: int,
    seq_len: int,
    dtype: Dtype,
    device: DeviceType,
    compiled_loss: bool,
) -> Activations:
    """Computes the bytes of an LSTM, whose layers are always kept whole."""
    C, L, N = c.n_embd, c.n_layer, micro_batch_size * seq_len
    a, is_bf16 = (BF16, True) if dtype == "bf16" else (FP32, False)
    # Its head is a GPT's.
    gpt = dataclasses.replace(c, family="gpt2", n_head=1)
    head = activations(
        gpt, micro_batch_size, seq_len, dtype, device=device, compiled_loss=compiled_loss
    )
    layer = N * C * (a + WORKSPACE[dtype])  # the output and the workspace
    dropped = N * C * ((L - 1) * (a + 1) + 1) if c.dropout else 0  # masks; copies between layers
    linear = [w for w in weights(c) if w.kind == "lstm"]
    largest = max(w.numel for w in linear)
    return Activations(
        blocks=int(L * layer) + dropped,
        ends=N * (INT64 + a * C),  # token ids and embeddings
        loss=head.loss - (FP32 - a) * N * C,  # the gradient of its input is of the input's type
        autocast=BF16 * sum(w.total for w in linear) if is_bf16 else 0,
        recomputed=0,
        # Gradients of a layer's input and output, and of its two matrices.
        block_work=N * C * 2 * FP32 + 2 * largest * (FP32 + (BF16 if is_bf16 else 0)),
        loss_work=head.loss_work - (FP32 - a) * N * C,
    )
