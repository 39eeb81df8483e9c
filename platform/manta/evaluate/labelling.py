"""A classifier at work: the probabilities of its labels for texts."""

from collections.abc import Sequence

import numpy as np
import torch

from manta.model.gpt import LanguageModel
from manta.model.inference import send

TOKENS_AT_ONCE = 1 << 14


@torch.no_grad()
def probabilities(model: LanguageModel, texts: Sequence[np.ndarray]) -> np.ndarray:
    """(N, K) fp32: the probability of each of K labels for N texts.

    Args:
        model: a classifier, whose device is used.
        texts: the ids of each text, from the start token on, at most `context_length`.
    """
    device = model.embedding.weight.device
    found = np.empty((len(texts), len(model.config.labels)), np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    while order:
        longest = len(texts[order[-1]])
        count = max(1, TOKENS_AT_ONCE // longest)
        batch, order = order[-count:], order[:-count]
        # Padding comes after a text, where nothing in the text sees it.
        ids = np.zeros((len(batch), longest), np.int64)
        at = np.zeros(ids.shape, bool)
        for row, index in enumerate(batch):
            ids[row, : len(texts[index])] = texts[index]
            at[row, len(texts[index]) - 1] = True
        tokens, places = (send(torch.from_numpy(values), device) for values in (ids, at))
        logits = model(tokens, at=places).float()
        found[batch] = logits.softmax(1).cpu().numpy()
    return found
