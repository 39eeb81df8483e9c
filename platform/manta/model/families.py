"""The model of a config, whichever its family."""

import torch

from manta.model.gpt import GPT, LanguageModel, unpadded
from manta.model.lstm import LSTM
from manta.model.shape import ModelConfig


def model_of(c: ModelConfig) -> LanguageModel:
    """Makes a model of this config, with initial weights from torch's random state."""
    return LSTM(c) if c.is_recurrent else GPT(c)


def num_parameters(c: ModelConfig) -> int:
    """Counts the parameters of a model of this config, each once, without the vocabulary's padding.
    Nothing is allocated."""
    with torch.device("meta"):
        return sum(unpadded(n, p, c).numel() for n, p in model_of(c).named_parameters())
