"""Where a trained model is asked, and in which precision: what `device` and `dtype` stand for."""

import torch

from manta.model.inference import InferenceConfig
from manta.train.step.device import choose_dtype, pick_device


def place_of(c: InferenceConfig) -> tuple[torch.device, str]:
    """The device that a job asks for, and the precision there: "fp32" or "bf16".

    Raises:
        ConfigError: device=cuda where torch has no GPU to use.
    """
    device = pick_device(c.device)
    return device, inference_dtype(c.dtype, device)


def inference_dtype(wanted: str, device: torch.device) -> str:
    """The precision that a key dtype= names: auto is fp32 on a CPU, so that a text that has been
    drawn once is drawn again on any other one."""
    if wanted != "auto":
        return wanted
    return choose_dtype(device) if device.type == "cuda" else "fp32"
