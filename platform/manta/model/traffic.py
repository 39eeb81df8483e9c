"""Bytes that the head's loss moves through memory between its matrix products. Pure arithmetic.

The counts were made by hand from loss.py: each operation reads its operands once and writes its
result once, as torch's own do. tests/model/test_loss.py compares the plain form's count with the
operations that really run.
"""

FP32 = 4


def loss_traffic(
    tokens: int,
    channels: int,
    vocab: int,
    chunk: int,
    dtype_bytes: int,
    device_type: str,
    compiled: bool,
) -> int:
    """Counts bytes read and written between the products of a forward that makes its gradient.

    Args:
        vocab: number of ids, with the padding.
        chunk: number of tokens whose logits exist at once.
        dtype_bytes: bytes of one logit: 2 in bf16, 4 in fp32.
    """
    a, is_bf16 = dtype_bytes, dtype_bytes < FP32
    if compiled:
        # Read once for largest and sum, and once for the gradient; the gradient is written.
        logit = 3 * a
    else:
        logit = a + FP32 + FP32 + FP32  # the largest logit; softmax; the largest probability
        if is_bf16:
            logit += (a + FP32) + (FP32 + a)  # logits to fp32 before softmax; the gradient to bf16
        if device_type == "cuda":
            logit += 2 * FP32  # ignored rows are set to zero
    moved = tokens * vocab * logit
    if is_bf16:  # in fp32 the product itself adds to the weight's gradient
        weight, chunks = vocab * channels, -(-tokens // chunk)
        moved += weight * (FP32 + a)  # the weight in bf16
        moved += weight * (a + FP32)  # its gradient from the first chunk, in fp32
        moved += (chunks - 1) * weight * (a + 2 * FP32)  # those from the others, added
    return moved
