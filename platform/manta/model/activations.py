"""Bytes that a forward holds for its backward, op by op. Pure arithmetic.

Counted by hand over gpt.py with torch's eager autograd: each op's saved tensors, each storage
once, weights and buffers not. tests/model/test_cost.py compares the count with the storages that
are really alive. Dropout adds the one byte for each element of a mask that CUDA keeps; the mask of
`document_mask` is not counted. Attention never holds T x T scores: the kernels that the model takes
stream them.

Letters as in gpt.py; N = B T tokens of a micro batch, F hidden channels of the MLP.
"""

import dataclasses
from typing import Literal

from manta.model import cpu_attention
from manta.model.cost import weights
from manta.model.loss import loss_chunk
from manta.model.recomputation import Recompute
from manta.model.shape import ModelConfig

FP32, BF16, INT64 = 4, 2, 8  # bytes

Dtype = Literal["bf16", "fp32"]
DeviceType = Literal["cuda", "cpu"]


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch on one worker."""

    blocks: int
    """Held by all blocks from forward to backward."""
    ends: int
    """Held before and after the blocks: token ids, what says the positions, the last norm."""
    loss: int
    """Held by the loss, which makes its gradients in the forward: those of the head's input and of
    its weight."""
    autocast: int
    """bf16 copies of the blocks' weights, which autocast makes at their first use; 0 in fp32."""
    recomputed: int
    """Built again for one block at a time during backward (activation checkpointing)."""
    block_work: int
    """Gradients inside one block's backward: most at once."""
    loss_work: int
    """A chunk's logits, probabilities and their gradient, and what the head's weight is turned into
    meanwhile: most at once."""

    @property
    def held(self) -> int:
        """After the forward; with checkpointing no more than one block's bf16 copies remain."""
        return self.blocks + self.ends + self.loss + (0 if self.recomputed else self.autocast)

    @property
    def temporary(self) -> int:
        """The most at once beyond `held`: at the loss, or inside a block's backward."""
        copies = self.autocast if self.recomputed else 0  # all of them are there at the loss
        return max(self.loss_work + copies, self.recomputed + self.block_work)


def activations(
    c: ModelConfig,
    micro_batch_size: int,
    seq_len: int,
    dtype: Dtype,
    checkpointing: Recompute = "none",
    device: DeviceType = "cuda",
    compiled_loss: bool = False,
) -> Activations:
    """Bytes of activations of a micro batch of `micro_batch_size` sequences of `seq_len` tokens.

    Args:
        dtype: of the matrix products; the residual stream and the norms are fp32 (autocast).
        checkpointing: none keeps all; selective keeps a block's input and its matrix products' and
            attention's outputs; full keeps a block's input.
        device: cuda has a kernel for RMSNorm that keeps its input alone; on the CPU the normalized
            values are kept, too.
        compiled_loss: the head's loss is compiled (model/loss.py), and holds no fp32 logits.
    """
    C, H, D, F, L = c.n_embd, c.n_head, c.head_size, c.hidden, c.n_layer
    N, a = micro_batch_size * seq_len, BF16 if dtype == "bf16" else FP32
    KD, is_gpt2 = c.kv_heads * D, c.family == "gpt2"
    qkv = a * (C + 2 * KD)
    # Attention on a CPU in bf16 (model/cpu_attention.py) keeps less than torch's own kernels.
    by_products = device == "cpu" and dtype == "bf16" and not c.dropout and cpu_attention.pays()
    attended = a * C + (0 if by_products else FP32 * H)  # the output, and the scores' log-sum-exp

    if is_gpt2:
        norm = FP32 * C + 2 * FP32  # input, mean, 1/std
        heads = qkv
        mlp = a * C + 2 * a * F  # input, GELU's input, GELU's output
        products = qkv + a * C + a * F + a * C
    else:
        norm = FP32 * C + FP32 + (FP32 * C if device == "cpu" else 0)  # input, 1/rms, normalized
        heads = qkv + a * (C + KD)  # v is a view of qkv; RoPE makes new q and k
        if c.qk_norm:  # normalized, 1/rms; in bf16 an fp32 copy of its input too
            copies = 1 if dtype == "fp32" else 2
            heads += copies * FP32 * (C + KD) + FP32 * (H + c.kv_heads)
            if device == "cpu" and not by_products:  # its attention's output has the layout of q,
                heads += a * C  # which this changes: joining the heads makes a copy
        # Autocast copies the input for gate and up apart: it remembers its copies of weights only.
        mlp = a * C * (1 if dtype == "fp32" else 2) + 4 * a * F
        products = qkv + a * C + 2 * a * F + a * C
    masks = 2 * C if c.dropout else 0  # after attention and after the MLP
    whole = N * (2 * norm + a * C + heads + attended + mlp + masks)
    kept = {
        "none": whole,
        "selective": N * (FP32 * C + products + attended),
        "full": N * FP32 * C,
    }[checkpointing]

    ends = N * (INT64 + norm + (C if c.dropout else 0))
    ends += seq_len * (INT64 if is_gpt2 else 2 * FP32 * D)  # positions; RoPE's cos and sin
    V = c.padded_vocab_size
    chunk = min(N, loss_chunk(device, compiled_loss))
    # Logits and probabilities or, compiled, the gradient alone; in bf16 softmax first makes fp32
    # logits of them, and the head's weight is there as a bf16 copy and as a gradient's product.
    at_loss = chunk * V * 2 * FP32
    if dtype == "bf16":
        at_once = 2 * BF16 if compiled_loss else BF16 + 2 * FP32
        copy = BF16 * V * C
        at_loss = copy + max(chunk * V * at_once, chunk * V * BF16 + copy)
    linear = [w for w in weights(c) if w.is_linear]
    autocast = BF16 * sum(w.total for w in linear) if dtype == "bf16" else 0
    # Of the MLP: the gradients of its hidden values, and those of the stream on both sides; and a
    # weight's gradient before it is added to what is there, which autocast makes from a bf16 one.
    weight = max(w.numel for w in linear) * (FP32 + (BF16 if dtype == "bf16" else 0))
    return Activations(
        blocks=L * kept,
        ends=ends,
        loss=N * FP32 * C + FP32 * V * C,
        autocast=autocast,
        recomputed=whole - kept,
        block_work=N * (a * F + 2 * FP32 * C) + weight,
        loss_work=at_loss + N * FP32 * C,
    )
