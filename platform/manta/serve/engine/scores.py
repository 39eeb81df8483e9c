"""Log-probabilities of tokens, with those of the likeliest ids.

Shapes: R texts, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from manta.model.inference import send
from manta.serve.engine.request import Token


def scored(logits: Tensor, ids: Sequence[int], counts: Sequence[int]) -> list[Token]:
    """The tokens `ids`, each with its log-probability under a row of (R, V) logits and those of so
    many of the likeliest ids as `counts` says."""
    logprobs = torch.log_softmax(logits.float(), dim=1)
    own = logprobs.gather(1, index_of(ids, logits).unsqueeze(1)).squeeze(1).tolist()
    most = min(max(counts), logits.size(1))
    values, likeliest = (part.tolist() for part in logprobs.topk(most, dim=1))
    return [
        Token(id, logprob, tuple(zip(names[:count], likely[:count], strict=True)))
        for id, logprob, names, likely, count in zip(
            ids, own, likeliest, values, counts, strict=True
        )
    ]


def index_of(places: Sequence[int], like: Tensor) -> Tensor:
    """Numbers as a tensor, (n,), on the device of another one."""
    return send(torch.tensor(places, dtype=torch.long), like.device)
