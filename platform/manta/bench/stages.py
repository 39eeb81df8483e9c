"""Measures the memory that each ZeRO stage takes on two workers, against model/memory.py.

Two plain processes on the CPU (gloo, no Ray) train with Manta's own engine for two steps in fp32.
The sequences are so short that activations do not count. Memory is measured at three moments at
which nothing temporary is alive: the engine is made; the first step is done (the optimizer has its
state); a micro batch of the second step is done (gradients accumulate). Each time, two figures are
taken: the bytes of all live tensors, each storage once, and the growth of the process (USS: the
memory that only it has). Only glibc gives freed memory back when it is told to, so the process's
figures are too large with any other C library.
"""

import ctypes
import dataclasses
import functools
import gc
import os
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist

from manta.bench.settings import BenchConfig
from manta.model.activations import FP32
from manta.model.cost import NO_ADAPTERS, adapters, parameters, weights
from manta.model.families import model_of
from manta.model.lora import LoraConfig, attach
from manta.model.memory import PERSISTENT, Setup, costs
from manta.model.shape import ModelConfig
from manta.train.alone import together
from manta.train.step.device import Device
from manta.train.step.engine import Engine
from manta.train.step.engine_settings import EngineConfig
from manta.train.step.optimizer import OptimizerConfig

# 27.7 million parameters, so that their memory is far above the noise in a process's size.
MODEL = ModelConfig(n_layer=6, n_embd=512, n_head=8, vocab_size=8192, tie_embeddings=False)
WARM_UP = ModelConfig(n_layer=1, n_embd=32, vocab_size=128)
SEQ_LEN = 8
# DeepSpeed's default is 2,000 MB; a worker on a CPU would show only the part that it writes to.
BUCKET_MB = 8
STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
MOMENTS = ("made", "stepped", "accumulating")
M_MMAP_THRESHOLD = -3


def stages(c: BenchConfig) -> dict[str, Any]:
    """Measures MODEL, or the config's model if that is larger, on two workers (see `measure`)."""
    model = max(MODEL, _with_vocabulary(c.model), key=lambda model: parameters(model).total)
    only = STAGES if c.optimizer.kind == "adamw" else STAGES[:3]  # Muon needs whole matrices
    return measure(model, optimizer=c.optimizer, only=only, lora=c.lora)


def measure(
    model: ModelConfig,
    workers: int = 2,
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
    only: tuple[Literal[0, 1, 2, 3], ...] = STAGES,
    lora: LoraConfig = NO_ADAPTERS,
) -> dict[str, Any]:
    """Predicted and measured bytes of worker 0 at each stage.

    Args:
        model: the model; without a vocab_size, it gets that of MODEL.
        workers: processes on this machine.
        only: the stages to measure.
        lora: the adapters, if these learn in place of the model's own weights.
    """
    model = _with_vocabulary(model)
    measured = together(workers, "gloo", _work, only, model, optimizer, lora)
    predicted = functools.partial(_predicted, model, workers, optimizer, lora)
    return {
        "parameters": parameters(model).total,
        "workers": workers,
        "optimizer": optimizer.kind,
        "stages": [
            {"stage": stage, "predicted": predicted(stage), **found}
            for stage, found in zip(only, measured, strict=True)
        ],
    }


def _with_vocabulary(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, vocab_size=model.vocab_size or MODEL.vocab_size)


def _predicted(
    model: ModelConfig,
    workers: int,
    optimizer: OptimizerConfig,
    lora: LoraConfig,
    stage: Literal[0, 1, 2, 3],
) -> dict[str, int]:
    """Bytes at each of MOMENTS; "unwritten": bytes of the last that nothing was written to yet."""
    found = costs(
        Setup(
            model,
            SEQ_LEN,
            num_workers=workers,
            zero_stage=stage,
            dtype="fp32",
            optimizer_kind=optimizer.kind,
            lora=lora,
            reduce_bucket=BUCKET_MB * 10**6 // 4,
            device="cuda",  # where memory counts when it is asked for, as that of tensors does here
        )
    )
    at_first = found.weights + found.master_weights
    later = found.gradients + found.buffers
    if stage == 3:  # stage 3 has its gradients and buffers from the start
        at_first, later = at_first + later, 0
    stepped = at_first + found.optimizer_state
    # Stage 3 gathers the weights that it does not shard when they are first used.
    small = [w for w in weights(model) + adapters(model, lora) if w.numel < PERSISTENT]
    gathered = FP32 * sum(w.total for w in small) if stage == 3 and workers > 1 else 0
    # Stage 1 writes to its bucket only with the step's last micro batch.
    unwritten = found.buffers if stage == 1 else 0
    sizes = (at_first - gathered, stepped, stepped + later)
    return {**dict(zip(MOMENTS, sizes, strict=True)), "unwritten": unwritten}


def _work(
    only: tuple[int, ...], model: ModelConfig, optimizer: OptimizerConfig, lora: LoraConfig
) -> list[dict[str, Any]]:
    """The bytes of the tensors and of the process at each moment, for each stage, as one worker
    finds them. Only the first worker returns bytes."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return_freed_memory()
    torch.set_num_threads(1)
    # A warm-up run loads what Python, DeepSpeed and gloo load at their first use, which no stage
    # should count.
    found = []
    for stage in only:
        _train(WARM_UP, stage, optimizer, NO_ADAPTERS, looks=False)
        gc.collect()
        gc.freeze()  # `_tensor_bytes` then looks only at newer objects
        found.append(_train(model, stage, optimizer, lora, looks=dist.get_rank() == 0))
    dist.barrier()
    return found


def _train(
    c: ModelConfig, stage: int, optimizer: OptimizerConfig, lora: LoraConfig, looks: bool
) -> dict[str, dict[str, int]]:
    """Trains two steps of two micro batches. If it `looks`, returns the bytes by which all tensors
    and the process have grown at each of MOMENTS."""
    found: dict[str, dict[str, int]] = {"tensors": {}, "process": {}}

    def look(moment: str) -> None:
        dist.barrier()  # gloo's thread holds the tensors of a reduction until it has ended it
        if looks:
            gc.collect()
            found["tensors"][moment] = _tensor_bytes()
            found["process"][moment] = _process_bytes()

    look("before")
    torch.manual_seed(0)
    model = model_of(c)
    if lora.rank is not None:
        attach(model, lora)
    engine = Engine(
        model,
        optimizer,
        Device(torch.device("cpu"), "fp32", 1.0, "CPU"),
        zero_stage=stage,
        micro_batch_size=1,
        grad_accum_steps=2,
        c=EngineConfig(reduce_bucket_mb=BUCKET_MB) if stage else EngineConfig(),
    )
    look("made")
    assert c.vocab_size is not None
    tokens = torch.randint(c.vocab_size, (1, SEQ_LEN + 1))
    for step in range(2):
        for is_last in (False, True):
            loss = engine(tokens[:, :-1], tokens[:, 1:].contiguous())
            engine.backward(loss, is_last=is_last)
            if is_last:
                engine.step(optimizer.grad_clip)
            del loss
            if step == 1 and not is_last:
                look("accumulating")
        if step == 0:
            look("stepped")
    return {
        kind: {moment: size - sizes["before"] for moment, size in sizes.items()}
        for kind, sizes in found.items()
        if sizes
    }


def _tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach; each storage counts once."""
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            both = [thing]
            if thing.is_leaf and thing.grad is not None:
                both.append(thing.grad)
            for tensor in both:
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def trim() -> None:
    """Gives back to the system what is freed already, if the C library is glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _process_bytes() -> int:
    trim()
    return psutil.Process().memory_full_info().uss


def return_freed_memory() -> None:
    """Makes glibc give freed tensors back to the system at once. By default, glibc begins to keep
    blocks of up to 32 MB, and a process stays as large as it once was."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 16)


def table(result: dict[str, Any]) -> str:
    """Table of the bytes at the fullest moment, while gradients accumulate."""
    lines = [
        f"{result['parameters']:,} parameters, {result['workers']} workers, "
        f"{result['optimizer']}, fp32; MB of one worker while gradients accumulate",
        "stage   predicted     tensors  tensors/pred.     process  process/pred.",
    ]
    for row in result["stages"]:
        predicted = row["predicted"]["accumulating"]
        written = predicted - row["predicted"]["unwritten"]
        tensors, process = (row[kind]["accumulating"] for kind in ("tensors", "process"))
        lines.append(
            f"{row['stage']:>5}{predicted / 1e6:>12.1f}{tensors / 1e6:>12.1f}"
            f"{tensors / predicted:>15.3f}{process / 1e6:>12.1f}{process / written:>15.3f}"
        )
    return "\n".join(lines)
