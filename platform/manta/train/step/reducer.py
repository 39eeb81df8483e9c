"""Averages gradients over the workers while the backward pass still computes (ZeRO stage 0).

At stage 0, DeepSpeed itself reduces only after the whole backward pass. Here the gradients are
grouped into buckets in the order in which the backward pass makes them, and a bucket is sent as
soon as it is full.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Reducer:
    """Averages the gradients of `parameters` over all workers, in each backward pass for which it
    is armed. All ranks must make it and use it alike."""

    def __init__(self, parameters: list[nn.Parameter], bucket_values: int, dtype: torch.dtype):
        """Sets up the buckets. A bucket has at most `bucket_values` gradients (or those of one
        larger parameter), which are sent in `dtype`."""
        self.armed = False
        self._dtype = dtype
        self._buckets: list[list[nn.Parameter]] = []
        size = bucket_values
        for parameter in reversed(parameters):  # the last layer's gradients come first
            if size + parameter.numel() > bucket_values:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.numel()
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent: list[tuple[Tensor, Any]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def _ready(self, parameter: Tensor) -> None:
        if not self.armed:
            return
        self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]  # a Parameter
        # Buckets are sent in order, which is the same on all ranks: collective calls must match.
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send(self._buckets[len(self._sent)])

    def _send(self, bucket: list[nn.Parameter]) -> None:
        flat = torch.cat([_gradient(p).flatten() for p in bucket]).to(self._dtype)
        # The backward pass goes on at once, on a CPU too: gloo's threads work while this one would
        # wait for the slowest worker.
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Waits for the averages, which become the gradients. (On a GPU, the stream waits, and this
        process does not.)"""
        for bucket in self._buckets[len(self._sent) :]:  # some weights got no gradient
            self._send(bucket)
        world_size = dist.get_world_size()
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            average = flat.float().div_(world_size)
            parts = average.split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)  # a copy would cost a pass through memory
        self._sent.clear()
        self._missing = [len(bucket) for bucket in self._buckets]
        self.armed = False


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
