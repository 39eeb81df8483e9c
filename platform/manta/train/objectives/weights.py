"""The weight of each micro batch's loss in the mean of a step."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from manta.train.objectives.next_token import Batch


def weighted(
    draw: Callable[[], Batch], count: int, device: torch.device
) -> Iterator[tuple[Batch, float]]:
    """Draws a step's micro batches: each with the weight of its mean loss.

    The mean of the weighted losses, over the micro batches of all ranks, is then the mean over all
    units of the step, however these are spread. Where every target is trained, micro batches are
    drawn one by one, and all weights are 1. All ranks must call this alike.
    """
    first = draw()
    if first.units is None:
        yield first, 1.0
        for _ in range(count - 1):
            yield draw(), 1.0
        return
    batches = [first, *(draw() for _ in range(count - 1))]
    counts = [batch.units or 0 for batch in batches]
    total = torch.tensor(sum(counts), dtype=torch.int64, device=device)
    dist.all_reduce(total)
    whole = max(int(total), 1)  # a step of damaged rows alone has none
    for batch, number in zip(batches, counts, strict=True):
        yield batch, number * count * dist.get_world_size() / whole
