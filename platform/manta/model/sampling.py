"""The choice of the next token among all, from the logits and a drawn number."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from manta.model.inference import send

DRAWN_AT_ONCE = 256  # random numbers for each row, one per token
SORTED = 1024  # probabilities that are looked at before all are sorted


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits."""

    temperature: float = 1.0
    """Divides the logits; 0: always the likeliest token."""
    top_k: int | None = None
    """The number of likeliest tokens to choose among; None: all."""
    top_p: float = 1.0
    """Choose among the fewest of the likeliest tokens whose probability, after temperature and
    top_k, is at least this (nucleus sampling, Holtzman et al. 2020); 1: all."""
    vocab_size: int | None = None
    """The number of ids that the tokenizer has. Ids beyond it, which a model may have, stand for no
    text and are never chosen. None: all of the model's."""
    min_p: float = 0.0
    """Choose among the tokens whose probability, after all else, is at least this share of the
    likeliest one's (Nguyen et al. 2024); 0: all."""


EVERY_TOKEN = Sampling()


def draws(seeds: list[int], device: torch.device) -> Iterator[Tensor]:
    """Yields (B,) numbers in [0, 1) for each token, the next of each seed's own sequence.

    The CPU draws them, many at once, so that a seed gives the same numbers on every device.
    """
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        drawn = [torch.rand(DRAWN_AT_ONCE, generator=r, dtype=torch.float64) for r in randoms]
        yield from send(torch.stack(drawn, dim=1), device)


def pick(logits: Tensor, sampling: Sampling, numbers: Tensor) -> Tensor:
    """Picks (B,) ids from (B, V) logits. A temperature of 0 takes the likeliest ids, any other the
    ids on which `numbers` fall: (B,) float64, drawn evenly from [0, 1)."""
    logits = logits[:, : sampling.vocab_size]
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    if sampling.top_k is not None and sampling.top_k < logits.size(1):
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    # Take the first id at which the sum passes the number's share of the whole. This needs a tenth
    # of the time of torch.multinomial, which draws a number for each id.
    logits = logits.double() - logits.max(dim=1, keepdim=True).values  # at most 0: none overflows
    shares = torch.softmax(logits / sampling.temperature, dim=1)
    if sampling.top_p < 1:
        shares = nucleus(shares, sampling.top_p)
    if sampling.min_p > 0:
        shares = shares.masked_fill(shares < sampling.min_p * shares.amax(1, keepdim=True), 0.0)
    sums = shares.cumsum(1)
    whole = sums[:, -1:]
    below = whole.nextafter(torch.zeros_like(whole))  # for products that round up to the whole
    places = (numbers.unsqueeze(1) * whole).minimum(below)
    return torch.searchsorted(sums, places, right=True).squeeze(1)


def nucleus(shares: Tensor, top_p: float) -> Tensor:
    """Keeps of each row of (B, V) probabilities the largest ones, as few as have a sum of at least
    `top_p`, and sets the others to 0. Of equal ones, those with lower ids are kept."""
    # On a CPU, finding the largest few, which nearly always are enough, takes a tenth of the time
    # of sorting all. A GPU sorts fast, and looking at its sums would mean to wait for it.
    ordered, is_enough = shares, False
    if shares.device.type == "cpu" and shares.size(1) > SORTED:
        ordered = shares.topk(SORTED).values
        is_enough = bool((ordered.sum(1) >= top_p).all())
    if not is_enough:
        ordered = shares.sort(dim=1, descending=True).values
    larger = F.pad(ordered.cumsum(1)[:, :-1], (1, 0))  # the sum of those before each
    count = (larger < top_p).sum(1, keepdim=True)
    least = ordered.gather(1, count - 1)
    above, equal = shares > least, shares == least
    room = count - above.sum(1, keepdim=True)
    return shares.where(above | (equal & (equal.cumsum(1) <= room)), 0.0)
