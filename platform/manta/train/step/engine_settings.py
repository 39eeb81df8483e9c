"""The keys of DeepSpeed's engine: what they mean, and where they would have no effect."""

import dataclasses
import json
from typing import Any, Literal

from manta import storage
from manta.config import Count, config
from manta.errors import ConfigError, DataError, MantaError
from manta.model.memory import BUCKET_MB
from manta.train.step.optimizer import OptimizerConfig

# Keys of DeepSpeed's config that Manta decides, and what a person can set instead.
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
    """Whether gradients are reduced while the backward pass still computes, at ZeRO stages 1 to 3
    on GPUs (at stage 0 on GPUs they always are). null: yes, if there are several GPUs."""
    reduce_bucket_mb: Count | None = None
    """Megabytes of gradients that are reduced at once; a buffer of that size stays allocated. null:
    64."""
    allgather_bucket_mb: Count | None = None
    """Megabytes of updated weights that are gathered at once (ZeRO stages 1 and 2); null: 64."""
    communication_dtype: Literal["fp32", "bf16"] = "fp32"
    """The dtype in which gradients travel between workers; bf16 halves the traffic and rounds the
    gradients."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Place that the optimizer's state is offloaded to: cpu (ZeRO stages 1 to 3), or nvme, a local
    disk (stage 3). none: it is not offloaded."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Place that weights are offloaded to until they are needed, at ZeRO stage 3: cpu, or nvme, a
    local disk. none: they are not offloaded."""
    offload_path: str | None = None
    """Folder on each worker's local disk, for nvme."""
    deepspeed_json: str | None = None
    """DeepSpeed's own settings, for experts: path of a JSON file, or the JSON itself. They override
    what Manta tells DeepSpeed. Keys that Manta decides are rejected."""

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
                f"offload_path={self.offload_path}: nothing is offloaded to disk; omit it, or set "
                "engine.offload_optimizer=nvme or engine.offload_parameters=nvme"
            )
        try:
            self.extra()
        except MantaError as e:
            found.append(str(e))
        return found

    def conflicts(self, zero_stage: int, on_gpu: bool, optimizer: OptimizerConfig) -> list[str]:
        """Messages about keys that would have no effect, or cannot work, with the rest of a run's
        config."""
        to_disk = self.offload_optimizer == "nvme"
        keys: list[tuple[str, Any, tuple[int, ...]]] = [
            ("overlap_comm", self.overlap_comm, (1, 2, 3)),
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

    def overlaps(self, zero_stage: int, num_workers: int, on_gpu: bool) -> bool:
        """Whether ZeRO (stages 1 to 3) reduces gradients while the backward pass computes."""
        if self.overlap_comm is not None:
            return self.overlap_comm
        return on_gpu and num_workers > 1 and zero_stage > 0

    @property
    def reduce_bucket(self) -> int:
        """The number of gradients that are reduced at once."""
        return (self.reduce_bucket_mb or BUCKET_MB) * 10**6 // self.bytes_of_gradient

    @property
    def bytes_of_gradient(self) -> int:
        return 2 if self.communication_dtype == "bf16" else 4

    def _reorders(self) -> bool:
        moving = ("round_robin_gradients", "parameter_alignment")
        return any(_has(self.extra(), ["zero_optimization", key]) for key in moving)

    def extra(self) -> dict[str, Any]:
        """The content of `deepspeed_json`. Raises MantaError if it is not valid."""
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
            why = e.strerror or e
            raise ConfigError(f"{what} cannot be read ({why}): give a JSON file") from None
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{what} is not JSON: {e}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{what} is not a JSON object: {{...}} is expected")
        for key, remedy in OWN_KEYS.items():
            if _has(tree, key.split(".")):
                raise ConfigError(f"{what} sets {key}, which Manta decides: {remedy}")
        return tree

    def inlined(self) -> "EngineConfig":
        """This config with the content of `deepspeed_json` in place of its path: the workers may
        not have the file, and the run's config.yaml records what was run."""
        if self.deepspeed_json is None:
            return self
        return dataclasses.replace(self, deepspeed_json=json.dumps(self.extra()))


def _has(tree: Any, names: list[str]) -> bool:
    for name in names:
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True
