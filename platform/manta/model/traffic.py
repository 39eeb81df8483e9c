"""Bytes that the head's loss moves through memory between its matrix products. Pure arithmetic.

Counted by hand over loss.py: each operation reads its operands once and writes its result once, as
torch's own do. tests/model/test_loss.py compares the plain form's count with what really runs.
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
    """Bytes read and written between the products of a forward with its gradient.

    Args:
        vocab: ids, with the padding.
        chunk: tokens whose logits exist at once.
        dtype_bytes: of one logit: 2 in bf16, 4 in fp32.
    """
    a, is_bf16 = dtype_bytes, dtype_bytes < FP32
    if compiled:
        # Read for the sums (largest and sum in one pass) and for the gradient, which is written.
        logit = 3 * a
    else:
        logit = a + FP32 + FP32 + FP32  # the largest logit; softmax; the largest probability
        if is_bf16:
            logit += (a + FP32) + (FP32 + a)  # logits to fp32 before softmax; the gradient to bf16
        if device_type == "cuda":
            logit += 2 * FP32  # what is ignored set to zero
    moved = tokens * vocab * logit
    if is_bf16:  # (in fp32 a product adds to the weight's gradient by itself)
        weight, chunks = vocab * channels, -(-tokens // chunk)
        moved += weight * (FP32 + a)  # the weight in bf16
        moved += weight * (a + FP32)  # its gradient by the first chunk, in fp32
        moved += (chunks - 1) * weight * (a + 2 * FP32)  # by the others, added
    return moved
