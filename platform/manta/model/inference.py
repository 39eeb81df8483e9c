"""What all that asks a trained model has in common: its precision, its attention."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def inference(device: torch.device, dtype: str) -> Iterator[None]:
    """What runs inside has no gradients, is in this precision ("fp32", or "bf16" by autocast), and
    does not use cuDNN's attention.

    Autocast makes its bf16 copies of the weights once for as long as this lasts: a generation
    belongs into it as a whole.
    """
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"),
        without_cudnn_attention(),
    ):
        yield


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Attention is left to the other kernels: cuDNN makes an execution plan for each length, and a
    text that grows has another one at each token. What holds outside, as for training, holds again
    afterwards."""
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def send(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device; the host does not wait until it is there."""
    if device.type == "cuda":
        values = values.pin_memory()  # from other memory, the copy waits for all that is queued
    return values.to(device, non_blocking=True)
