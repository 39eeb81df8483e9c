"""The DeepSpeed engine: one module between plain keys and DeepSpeed's config."""

import dataclasses
import functools
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manta import storage
from manta.config import Count, config
from manta.errors import ConfigError, DataError, MantaError
from manta.train.device import Device
from manta.train.optimizer import OptimizerConfig, make_optimizer

# DeepSpeed's own is 500 million values, of which a worker holds a buffer: more than a small model.
BUCKET_MB = 64
# Keys of DeepSpeed's config that Manta decides, and what decides them here.
OWN_KEYS = {
    "train_batch_size": "set tokens_per_batch",
    "train_micro_batch_size_per_gpu": "set micro_batch_size",
    "gradient_accumulation_steps": "it follows from tokens_per_batch and micro_batch_size",
    "optimizer": "set optimizer.kind and its other keys",
    "scheduler": "set schedule.kind and its other keys",
    "gradient_clipping": "set optimizer.grad_clip",
    "steps_per_print": "set log_every",
    "fp16": "set dtype",
    "bf16": "set dtype",
    "torch_autocast": "set dtype",
    "data_types": "weights are fp32, and gradients are summed in fp32",
    "communication_data_type": "set engine.communication_dtype",
    "zero_allow_untested_optimizer": "omit it",
    "zero_force_ds_cpu_optimizer": "omit it",
    "zero_optimization.stage": "set zero_stage",
    "zero_optimization.overlap_comm": "set engine.overlap_comm",
    "zero_optimization.reduce_bucket_size": "set engine.reduce_bucket_mb",
    "zero_optimization.allgather_bucket_size": "set engine.allgather_bucket_mb",
    "zero_optimization.offload_optimizer.device": "set engine.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "set engine.offload_path",
    "zero_optimization.offload_param.device": "set engine.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "set engine.offload_path",
}


@config
class EngineConfig:
    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass still computes (on GPUs, at ZeRO stages 1 to 3);
    null: DeepSpeed's choice, which is to do so at stage 3."""
    reduce_bucket_mb: Count | None = None
    """Megabytes of gradients that are reduced at once (ZeRO stages 1 to 3); a buffer of that size
    is held. null: 64."""
    allgather_bucket_mb: Count | None = None
    """Megabytes of new weights that are gathered at once (ZeRO stages 1 and 2); null: 64."""
    communication_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients travel between workers; bf16 halves the traffic and rounds them."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's state lives instead of on the GPU: cpu (ZeRO stages 1 to 3) or nvme, a
    local disk (stage 3)."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where weights live until they are computed with, at ZeRO stage 3: cpu, or nvme, a local
    disk."""
    offload_path: str | None = None
    """Folder on each worker's local disk, for nvme."""
    deepspeed_json: str | None = None
    """For experts: path of a file of DeepSpeed's own settings (JSON), or the JSON itself; goes over
    what Manta tells DeepSpeed. Keys that Manta decides are refused."""

    def problems(self) -> list[str]:
        found = []
        to_disk = [
            k for k in ("offload_optimizer", "offload_parameters") if getattr(self, k) == "nvme"
        ]
        if to_disk and self.offload_path is None:
            found.append(
                f"{to_disk[0]}=nvme needs a folder on a local disk: set engine.offload_path"
            )
        if self.offload_path is not None and not to_disk:
            found.append(
                f"offload_path={self.offload_path}: nothing goes there; omit it, or set "
                "engine.offload_optimizer=nvme or engine.offload_parameters=nvme"
            )
        try:
            self.extra()
        except MantaError as e:
            found.append(str(e))
        return found

    def conflicts(self, zero_stage: int, on_gpu: bool, optimizer: OptimizerConfig) -> list[str]:
        """What of this would do nothing, or cannot work, with the rest of a run's config."""
        to_disk = self.offload_optimizer == "nvme"
        keys: list[tuple[str, Any, tuple[int, ...]]] = [
            ("overlap_comm", self.overlap_comm, (1, 2, 3)),
            ("reduce_bucket_mb", self.reduce_bucket_mb, (1, 2, 3)),
            ("allgather_bucket_mb", self.allgather_bucket_mb, (1, 2)),
            ("offload_optimizer", self.offload_optimizer, (3,) if to_disk else (1, 2, 3)),
            ("offload_parameters", self.offload_parameters, (3,)),
        ]
        found = []
        for key, value, stages in keys:
            if value in (None, "none"):
                continue
            given = f"engine.{key}={str(value).lower()} does nothing"
            if zero_stage not in stages:
                wanted = " or ".join(map(str, stages))
                found.append(
                    f"{given} at zero_stage={zero_stage}: omit it, or set that to {wanted}"
                )
            elif not on_gpu and (key == "overlap_comm" or value == "cpu"):
                found.append(f"{given} on CPUs: omit it, or set gpus_per_worker=1")
        if optimizer.kind == "muon" and self._reorders():
            found.append(
                "engine.deepspeed_json: round_robin_gradients and parameter_alignment move weights "
                "from where Muon looks for them: omit them, or set optimizer.kind=adamw"
            )
        return found

    @property
    def reduce_bucket(self) -> int:
        """Gradients that are reduced at once."""
        return (self.reduce_bucket_mb or BUCKET_MB) * 10**6 // self.bytes_of_gradient

    @property
    def bytes_of_gradient(self) -> int:
        return 2 if self.communication_dtype == "bf16" else 4

    def _reorders(self) -> bool:
        moving = ("round_robin_gradients", "parameter_alignment")
        return any(_has(self.extra(), ["zero_optimization", key]) for key in moving)

    def extra(self) -> dict[str, Any]:
        """What `deepspeed_json` says. Raises MantaError where it is not valid."""
        given = self.deepspeed_json
        if given is None:
            return {}
        is_text = given.lstrip().startswith(("{", "["))
        what = "deepspeed_json" if is_text else f"deepspeed_json={given}"
        try:
            tree = json.loads(given if is_text else storage.read_bytes(storage.absolute(given)))
        except DataError:
            raise ConfigError(f"{what}: no such file; give the path of a JSON file") from None
        except OSError as e:
            raise ConfigError(f"{what} cannot be read ({e.strerror}): give a JSON file") from None
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{what} is not JSON: {e}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{what} is not a JSON object: {{...}} is expected")
        for key, remedy in OWN_KEYS.items():
            if _has(tree, key.split(".")):
                raise ConfigError(f"{what} sets {key}, which Manta decides: {remedy}")
        return tree

    def inlined(self) -> "EngineConfig":
        """With the content of `deepspeed_json` in place of its path: the workers may not have the
        file, and the run's config.yaml keeps what was run."""
        if self.deepspeed_json is None:
            return self
        return dataclasses.replace(self, deepspeed_json=json.dumps(self.extra()))


def _has(tree: Any, names: list[str]) -> bool:
    for name in names:
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _merged(a: Any, b: Any) -> Any:
    """b over a, in dicts key by key."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return b
    return a | {key: _merged(a[key], value) if key in a else value for key, value in b.items()}


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
    deepspeed, c = _deepspeed(), c or EngineConfig()
    rounded = c.communication_dtype == "bf16"
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        # At stage 0 `backward_and_step` clips.
        "gradient_clipping": optimizer.grad_clip if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage, **_zero_settings(c)},
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
    if zero_stage == 0 and dist.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # copies all gradients, to average them with none
    return engine


def _module_types(model: nn.Module) -> list[str]:
    """The types of module that have weights of their own, as DeepSpeed names them."""
    types = {
        type(m) for m in model.modules() if next(m.parameters(recurse=False), None) is not None
    }
    return sorted(f"{t.__module__}.{t.__name__}" for t in types)


def _zero_settings(c: EngineConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "reduce_bucket_size": c.reduce_bucket,
        "allgather_bucket_size": (c.allgather_bucket_mb or BUCKET_MB) * 10**6 // 4,
    }
    if c.overlap_comm is not None:
        found["overlap_comm"] = c.overlap_comm
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


def backward_and_step(
    engine: Any, loss: Tensor, grad_clip: float, *, is_last: bool
) -> Tensor | float | None:
    """Backward and, if this is the step's last micro batch, the optimizer's step; as `step`."""
    backward(engine, loss, is_last=is_last)
    return step(engine, grad_clip, is_last=is_last)


def backward(engine: Any, loss: Tensor, *, is_last: bool) -> None:
    """Adds a micro batch's gradients; the last of a step has them averaged over the workers."""
    # DeepSpeed would count micro batches since the run's start: their number in a step may change.
    engine.set_gradient_accumulation_boundary(is_boundary=is_last)
    engine.backward(loss)


def step(engine: Any, grad_clip: float, *, is_last: bool) -> Tensor | float | None:
    """Ends a micro batch; the last of a step with the optimizer's step.

    Returns:
        The global 2-norm of the gradients, before clipping, if a step was taken; still on the
        device at stage 0.
    """
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


def to_cpu(name: str, values: Tensor) -> Tensor:
    """A copy of them, in memory of its own."""
    return values.detach().to("cpu", copy=True)


def full_weights(engine: Any, copy: Callable[[str, Tensor], Tensor] = to_cpu) -> dict[str, Tensor]:
    """Every weight by its name, whole, on rank 0; {} on the others. A tied weight appears once.
    `copy(name, weight)` copies it to the CPU."""
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
                found[name] = copy(name, parameter)
    return found
