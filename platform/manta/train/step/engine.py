"""The DeepSpeed engine: one module between plain keys and DeepSpeed's config."""

import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manta import storage
from manta.errors import ConfigError
from manta.train.step.device import Device
from manta.train.step.engine_settings import BUCKET_MB, EngineConfig
from manta.train.step.optimizer import OptimizerConfig, make_optimizer
from manta.train.step.reducer import Reducer


def _merged(a: Any, b: Any) -> Any:
    """b over a, in dicts key by key."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return b
    return a | {key: _merged(a[key], value) if key in a else value for key, value in b.items()}


@functools.cache
def _deepspeed(device_type: str) -> Any:
    """DeepSpeed for engines on such a device, imported where it is first needed: its import takes
    seconds, and the processes that only direct the training workers can do without.

    Raises:
        RuntimeError: this process has imported DeepSpeed for another kind of device.
    """
    # It asks once for each process, at its import, and would take the GPU that it sees, or a Mac's,
    # whatever the model is on.
    os.environ["DS_ACCELERATOR"] = device_type
    # Its import and start-up talk; what matters of it reaches a person as an error.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    taken = get_accelerator().device_name()
    if taken != device_type:
        raise RuntimeError(
            f"DeepSpeed was imported for {taken} in this process, and cannot train on {device_type}"
        )
    # DeepSpeed asks this which of its own operations it may compile. Left alone, it tries each of
    # them, which starts compilers, and prints. It needs none: the one that it would take on a CPU,
    # deepspeed_shm_comm, is for inference, and takes 40 s.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def make_engine(
    model: nn.Module,
    optimizer: OptimizerConfig,
    device: Device,
    *,
    zero_stage: int,
    micro_batch_size: int,
    grad_accum_steps: int,
    c: EngineConfig | None = None,
    lr_scales: dict[str, float] | None = None,
) -> Any:
    """A DeepSpeed engine over `model`, in the process group that is already there.

    bf16 is torch's autocast over fp32 weights: the weights, their gradients and the optimizer's
    state are fp32 at every stage, so that all stages train alike and checkpoints are exact.

    Raises:
        ConfigError: this worker cannot offload as `c` says, or DeepSpeed refuses its
            `deepspeed_json`.
    """
    deepspeed, c = _deepspeed(device.torch_device.type), c or EngineConfig()
    rounded = c.communication_dtype == "bf16"
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        # At stage 0 `step` clips.
        "gradient_clipping": optimizer.grad_clip if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage, **_zero_settings(c, zero_stage, device)},
        "zero_allow_untested_optimizer": True,
        # Its own AdamW for the CPU is compiled at the first use; torch's is fused as well.
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": device.dtype == "bf16",
            "dtype": "bfloat16",
            # Whose gradients are reduced in bf16. (In fp32, the next key says it for all.)
            "lower_precision_safe_modules": _module_types(model) if rounded else [],
        },
        "communication_data_type": c.communication_dtype,
        "steps_per_print": 1 << 40,
        # It waits for the device before and after each micro batch; `Meter` takes the time.
        "timers": {"throughput": {"enabled": False}},
    }
    _check_disk(c)
    try:
        engine, *_ = deepspeed.initialize(
            model=model.to(device.torch_device),
            optimizer=make_optimizer(model, optimizer, device.dtype, lr_scales),
            config=_merged(settings, c.extra()),
            dist_init_required=False,
        )
    except (ValueError, AssertionError, TypeError, KeyError) as e:
        if c.deepspeed_json is None:
            raise
        what = " ".join(str(e).split())[:300]
        raise ConfigError(f"engine.deepspeed_json: DeepSpeed refuses it: {what}") from e
    engine.reducer = None  # of Manta's own, at stage 0 on several workers
    if zero_stage:
        _limit_norm(engine.optimizer)
    else:
        engine.enable_backward_allreduce = False  # `reducer` does it while gradients are made
        if dist.get_world_size() > 1:
            dtype = torch.bfloat16 if rounded else torch.float32
            engine.reducer = Reducer(list(model.parameters()), c.reduce_bucket, dtype)
    return engine


def _module_types(model: nn.Module) -> list[str]:
    """The types of module that have weights of their own, as DeepSpeed names them."""
    types = {
        type(m) for m in model.modules() if next(m.parameters(recurse=False), None) is not None
    }
    return sorted(f"{t.__module__}.{t.__name__}" for t in types)


def _zero_settings(c: EngineConfig, zero_stage: int, device: Device) -> dict[str, Any]:
    on_gpu = device.torch_device.type == "cuda"
    found: dict[str, Any] = {
        "reduce_bucket_size": c.reduce_bucket,
        "allgather_bucket_size": (c.allgather_bucket_mb or BUCKET_MB) * 10**6 // 4,
    }
    if zero_stage < 3 or c.overlap_comm is not None:
        found["overlap_comm"] = c.overlaps(zero_stage, dist.get_world_size(), on_gpu)
    offloaded = {"offload_optimizer": c.offload_optimizer, "offload_param": c.offload_parameters}
    for key, place in offloaded.items():
        if place != "none":
            found[key] = {"device": place}
        if place == "nvme":
            found[key]["nvme_path"] = storage.absolute(c.offload_path or "")
    return found


def _check_disk(c: EngineConfig) -> None:
    """Raises ConfigError where this machine cannot offload to its disk."""
    if c.offload_path is None:
        return
    folder = Path(storage.absolute(c.offload_path))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"engine.offload_path={folder}: no folder that this worker can write to; make it on "
            "every machine, or set engine.offload_optimizer=cpu"
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "offloading to nvme needs libaio, which this machine lacks: install libaio-dev, or set "
            "engine.offload_optimizer=cpu and engine.offload_parameters=cpu"
        )


def set_lr(engine: Any, share: float) -> float:
    """Sets the learning rates to this share (0 to 1) of their peaks, which the config gives; the
    one of the blocks' matrices."""
    for group in engine.optimizer.param_groups:
        group["lr"] = share * group["peak_lr"]
    return engine.optimizer.param_groups[0]["lr"]


def set_grad_accum_steps(engine: Any, steps: int) -> None:
    """How many micro batches this worker's next optimizer step is made of."""
    if engine.gradient_accumulation_steps() == steps:
        return
    micro_batch = engine.train_micro_batch_size_per_gpu()
    engine.set_train_batch_size(steps * micro_batch * engine.dp_world_size)
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):  # ZeRO keeps a number of its own
        engine.optimizer.gradient_accumulation_steps = steps


@contextmanager
def casting_once(engine: Any) -> Iterator[None]:
    """While it lasts, autocast casts each weight to bf16 once, and not once for each micro batch.
    It must end before the optimizer's step, which changes the weights: it spans what comes between
    two of these.

    Not where the copies would cost more memory than the forward needs by itself: with activation
    checkpointing, which makes them block by block, and at stage 3, where no worker holds all
    weights. (Compiled blocks cast for themselves.)
    """
    if engine.module.recompute != "none" or engine.zero_optimization_stage() == 3:
        yield
        return
    # The innermost autocast computes; the outermost, which this is, throws the copies away.
    with torch.autocast(engine.device.type, enabled=False):
        yield


def backward_and_step(
    engine: Any, loss: Tensor, grad_clip: float, *, is_last: bool, limit: float = math.inf
) -> Tensor | float | None:
    """`backward` and, if this is the step's last micro batch, `step`. Not within `casting_once`."""
    backward(engine, loss, is_last=is_last)
    return step(engine, grad_clip, limit=limit) if is_last else None


def backward(engine: Any, loss: Tensor, *, is_last: bool) -> None:
    """Adds a micro batch's gradients; the last of a step has them averaged over the workers."""
    # DeepSpeed would count micro batches since the run's start: their number in a step may change.
    engine.set_gradient_accumulation_boundary(is_boundary=is_last)
    reducer = engine.reducer
    if reducer is not None:
        reducer.armed = is_last
    engine.backward(loss)
    if reducer is not None and is_last:
        reducer.finish()


def step(engine: Any, grad_clip: float, *, limit: float = math.inf) -> Tensor | float:
    """The optimizer's step, after a step's last `backward`. It is not taken (on any rank) if the
    gradients are not finite, or their norm is beyond `limit`.

    Returns:
        The global 2-norm of the gradients before clipping, which may still be on the device; not
        finite if the step was not taken.
    """
    if engine.zero_optimization():
        engine.optimizer.norm_limit = limit
        engine.step()
        return engine.get_global_grad_norm()
    # Reduced by now. DeepSpeed clips here too, and forgets the norm, which people watch.
    parameters = list(engine.module.parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    found = float(norm)  # the one wait for the device in a step; ZeRO has it too
    if found <= limit and found < math.inf:  # False for NaN
        engine.step()
        return norm
    engine.zero_grad()
    return math.inf


def _limit_norm(optimizer: Any) -> None:
    """Has a ZeRO optimizer leave out a step whose gradient norm is beyond its `norm_limit`, as it
    does by itself (on all ranks alike) where the norm is not finite."""
    optimizer.norm_limit = math.inf
    if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2

        def limited() -> Any:
            norm = measure()
            if optimizer.norm_limit == math.inf or norm <= optimizer.norm_limit:
                return norm
            return math.inf

        measure, optimizer.scaled_global_norm = optimizer.scaled_global_norm, limited
    else:

        def limited_groups() -> Any:
            norms = groups()
            if optimizer.norm_limit == math.inf:
                return norms
            total = torch.stack([torch.as_tensor(norm) for norm in norms]).norm()
            return norms if total <= optimizer.norm_limit else [math.inf]

        groups, optimizer._get_norm_groups = optimizer._get_norm_groups, limited_groups


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


def to_cpu(_name: str, values: Tensor) -> Tensor:
    """A copy of them, in memory of its own."""
    return values.detach().to("cpu", copy=True)


def full_weights(engine: Any, copy: Callable[[str, Tensor], Tensor] = to_cpu) -> dict[str, Tensor]:
    """Every weight by its name, whole, on rank 0; {} on the others. A tied weight appears once.
    `copy(name, weight)` copies it to the CPU."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    zero = _deepspeed(engine.device.type).zero
    for name, parameter in engine.module.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        # One at a time, so that no rank holds the whole model beside its shards.
        is_sharded = hasattr(parameter, "ds_id")
        with zero.GatheredParameters([parameter], enabled=is_sharded):
            if dist.get_rank() == 0:
                found[name] = copy(name, parameter)
    return found
