"""Settings that every use of a trained model shares: its precision and its attention."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def inference(device: torch.device, dtype: str) -> Iterator[None]:
    """Runs code without gradients and without cuDNN's attention, in the precision `dtype`: "fp32",
    or "bf16" by autocast.

    Autocast makes its bf16 copies of the weights once per use of this context, so a whole
    generation belongs inside it.
    """
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"),
        without_cudnn_attention(),
    ):
        yield


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leaves attention to kernels other than cuDNN's; afterwards restores what training uses.

    cuDNN makes an execution plan for each length, and a growing text has a new one at each token.
    """
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host to the device; the host does not wait for the copy."""
    if device.type == "cuda":
        values = values.pin_memory()  # a copy from other memory waits for all queued work
    return values.to(device, non_blocking=True)
