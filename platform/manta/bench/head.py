"""Measures the head's loss and its gradients, plain and compiled in turn, by the size of the
chunks."""

import statistics
import time
from typing import Any

import torch

from manta.bench.settings import BenchConfig
from manta.model import loss
from manta.model.traffic import loss_traffic
from manta.train.step.device import DTYPES, available_cpus, find_device

# (tokens, channels, vocabulary, its padded size), and the chunk sizes to try
FULL = (16384, 768, 50257, 50304), (2048, 4096, 8192)
TINY = (256, 64, 500, 512), (64, 128)


def head(c: BenchConfig) -> dict[str, Any]:
    """Milliseconds of a forward and backward pass of the head under autocast, and the bytes that
    each form moves."""
    on_gpu = bool(c.gpus_per_worker)
    device = find_device(c.dtype, on_gpu, c.threads_per_worker or available_cpus())
    (tokens, channels, vocab, padded), chunks = TINY if c.size == "tiny" else FULL
    torch.manual_seed(0)
    made = loss.Head(channels, vocab, padded).to(device.torch_device)
    x = torch.randn(tokens, channels, device=device.torch_device, requires_grad=True)
    targets = torch.randint(vocab, (tokens,), device=device.torch_device)
    losses: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    for index in range(3 + 1):
        for compiled in (False, True):
            made.compiled = compiled
            for chunk in chunks:
                loss.CPU_CHUNK = loss.GPU_CHUNK = loss.COMPILED_GPU_CHUNK = chunk
                name = f"{'compiled' if compiled else 'plain'} {chunk}"
                started = time.perf_counter()
                with torch.autocast(
                    device.torch_device.type, torch.bfloat16, enabled=device.dtype == "bf16"
                ):
                    found = made(x, targets)
                found.backward()
                losses[name] = found.item()  # waits for the device
                if index:  # the first round compiles
                    times.setdefault(name, []).append(1e3 * (time.perf_counter() - started))
    milliseconds = {name: statistics.median(found) for name, found in times.items()}
    size = DTYPES[device.dtype].itemsize
    traffic = {
        name: loss_traffic(
            tokens, channels, padded, int(name.split()[1]), size, device.torch_device.type,
            compiled=name.startswith("compiled"),
        )
        for name in milliseconds
    }  # fmt: skip
    best = {form: min((v, n) for n, v in milliseconds.items() if n.startswith(form))
            for form in ("plain", "compiled")}  # fmt: skip
    spread = max(losses.values()) - min(losses.values())
    return {
        "device": device.description,
        "tokens": tokens,
        "milliseconds": milliseconds,
        "traffic_bytes": traffic,
        "losses": losses,
        "shown": ", ".join(f"{name} {value:.1f} ms" for value, name in best.values()),
        "wrong": f"the losses differ by {spread}" if spread > 2e-3 else "",
    }
