"""The DeepSpeed engine: one module between plain keys and DeepSpeed's config."""

import functools
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manta.train.device import Device
from manta.train.optimizer import OptimizerConfig, make_optimizer


@functools.cache
def _deepspeed() -> Any:
    """DeepSpeed, imported where it is first needed: its import takes seconds, and the processes
    that only direct the training workers can do without."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its import and start-up talk; what matters of it reaches a person as an error.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Used for inference only, and compiled for 40 s at the first start otherwise.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def make_engine(
    model: nn.Module,
    optimizer: OptimizerConfig,
    device: Device,
    *,
    zero_stage: int,
    micro_batch_size: int,
    grad_accum_steps: int,
) -> Any:
    """A DeepSpeed engine over `model`, in the process group that is already there.

    bf16 is torch's autocast over fp32 weights: the weights, their gradients and the optimizer's
    state are fp32 at every stage, so that all stages train alike and checkpoints are exact.
    """
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        # At stage 0 `backward_and_step` clips.
        "gradient_clipping": optimizer.grad_clip if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": device.dtype == "bf16",
            "dtype": "bfloat16",
            # Whose gradients are reduced in bf16: none.
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 1 << 40,
    }
    engine, *_ = _deepspeed().initialize(
        model=model.to(device.torch_device),
        optimizer=make_optimizer(model, optimizer),
        config=settings,
        dist_init_required=False,
    )
    return engine


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def set_grad_accum_steps(engine: Any, steps: int) -> None:
    """How many micro batches this worker's next optimizer step is made of."""
    if engine.gradient_accumulation_steps() == steps:
        return
    micro_batch = engine.train_micro_batch_size_per_gpu()
    engine.set_train_batch_size(steps * micro_batch * engine.dp_world_size)
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):  # ZeRO keeps a number of its own
        engine.optimizer.gradient_accumulation_steps = steps


def backward_and_step(
    engine: Any, loss: Tensor, grad_clip: float, *, is_last: bool
) -> Tensor | float | None:
    """Backward and, if this is the step's last micro batch, the optimizer's step.

    Returns:
        The global 2-norm of the gradients, before clipping, if a step was taken; still on the
        device at stage 0.
    """
    # DeepSpeed would count micro batches since the run's start: their number in a step may change.
    engine.set_gradient_accumulation_boundary(is_boundary=is_last)
    engine.backward(loss)
    norm: Tensor | float | None = None
    if is_last and not engine.zero_optimization():
        # Reduced by now. DeepSpeed clips here too, and forgets the norm, which people watch.
        parameters = list(engine.module.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    engine.step()
    return engine.get_global_grad_norm() if is_last and norm is None else norm


@contextmanager
def evaluating(engine: Any) -> Iterator[nn.Module]:
    """The model in eval mode, without gradients, in the engine's dtype; calls go through it on
    every rank alike (at stage 3 each call gathers the weights)."""
    engine.eval()
    try:
        with torch.no_grad():
            yield engine
    finally:
        engine.train()


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Every weight by its name, whole, on the CPU, on rank 0; {} on the others. A tied weight
    appears once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in engine.module.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        # One at a time, so that no rank holds the whole model beside its shards.
        is_sharded = hasattr(parameter, "ds_id")
        with _deepspeed().zero.GatheredParameters([parameter], enabled=is_sharded):
            if dist.get_rank() == 0:
                found[name] = parameter.detach().to("cpu", copy=True)
    return found


def save_state(engine: Any, folder: str) -> None:
    """Writes this rank's share of the resume state under `folder`/engine (a collective call)."""
    engine.save_checkpoint(folder, tag="engine", save_latest=False)


def load_state(engine: Any, folder: str) -> None:
    """Reads back what `save_state` wrote, on as many ranks (a collective call)."""
    path, _ = engine.load_checkpoint(folder, tag="engine")
    assert path is not None, f"{folder}/engine holds no state"
