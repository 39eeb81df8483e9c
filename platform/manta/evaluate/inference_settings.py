"""Settings of a job that runs a trained model in its own process, and what `device` and `dtype`
mean there."""

from typing import Literal

import torch

from manta.config import Count, NonNegativeFloat, PositiveFraction, Seed, config
from manta.model.sampling import Sampling
from manta.storage import HomeConfig
from manta.train.step.device import choose_dtype, pick_device


@config
class InferenceConfig(HomeConfig):
    """The keys of a job that runs a model in its own process."""

    checkpoint: str = "quickstart"
    """A run's name or folder (its newest checkpoint), or a checkpoint's folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model. auto: a GPU if torch can use one, else the CPU."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the matrix products; the weights stay fp32. auto: bf16 on a GPU that computes in
    it, else fp32."""


@config
class DrawConfig(InferenceConfig):
    """The keys of a job that draws tokens."""

    max_tokens: Count = 128
    """Most tokens to add; the model may end its text earlier."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature; 0: always the likeliest token."""
    top_k: Count | None = 50
    """Sample among this many of the likeliest tokens; null: all."""
    top_p: PositiveFraction = 1.0
    """Sample among the fewest of the likeliest tokens whose probability, after temperature and
    top_k, is at least this; 1: all."""
    seed: Seed = 0
    """Seed of the draws: the same seed gives the same text again on the same device."""

    def sampling(self, vocab_size: int) -> Sampling:
        """How tokens are chosen among the ids that a tokenizer has."""
        return Sampling(self.temperature, self.top_k, self.top_p, vocab_size)


@config
class GenerateConfig(DrawConfig):
    prompt: str = "def main("
    """Text to complete."""
    prompts: tuple[str, ...] = ()
    """Several texts to complete, all at once, instead of `prompt`."""
    num_samples: Count = 1
    """Completions of each text; several are printed all at once, at the end."""


@config
class ChatConfig(DrawConfig):
    system: str | None = None
    """Message before the conversation, which is never dropped; null: none."""
    max_tokens: Count = 512
    """Most tokens of an answer; the model may end it earlier."""
    transcript: bool = False
    """Whether the model continues a transcript ("User: ...", "Assistant: ...") although its
    checkpoint has a chat template. One without a template always does."""


def place_of(c: InferenceConfig) -> tuple[torch.device, str]:
    """The device that a config names, and the precision there: "fp32" or "bf16".

    Raises:
        ConfigError: device=cuda, and torch has no GPU to use.
    """
    device = pick_device(c.device)
    return device, inference_dtype(c.dtype, device)


def inference_dtype(wanted: str, device: torch.device) -> str:
    """The precision that a key dtype= names. auto is fp32 on a CPU, so that any other CPU draws the
    same text again."""
    if wanted != "auto":
        return wanted
    return choose_dtype(device) if device.type == "cuda" else "fp32"
