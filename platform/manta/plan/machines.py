"""The devices that a run is planned for: this machine's, or those of a cluster's file."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch

from manta.cluster.check import documents, kuberay, launcher
from manta.errors import ClusterError, ConfigError
from manta.model.memory import GIB, USABLE
from manta.plan import prices
from manta.plan.prices import Listed
from manta.plan.settings import PlanConfig
from manta.train.build import memory_of_worker
from manta.train.settings import PretrainConfig
from manta.train.step.device import GPU_PEAKS, Device, find_device, gpu_peak, threads_of


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices that the workers of a run are on."""

    kind: Literal["cpu", "cuda"]
    device: str
    """One device, as a run says it."""
    dtype: Literal["fp32", "bf16"]
    memory: float | None
    """Bytes of one device; None: not known."""
    usable: float | None
    """Bytes of it that a worker may use."""
    most_workers: int | None
    """Workers for which the cluster has devices; None: as many as wanted."""
    per_node: int | None = None
    peak: float | None = None
    """FLOP/s of one device by its data sheet; None: not known."""
    is_here: bool = True
    instance: str | None = None
    region: str | None = None
    spot: bool = False
    listed: Listed | None = None
    computes: Device | None = None
    """This machine's device, if it is this machine's."""
    unknown: tuple[str, ...] = ()
    """What the cluster's file does not say, each with what would say it."""


def machine_of(c: PlanConfig, run: PretrainConfig) -> Machine:
    """The devices that this plan is for.

    Raises:
        MantaError: the cluster's file or the file of prices cannot be used.
    """
    if c.cluster is not None:
        return _of_cluster(c, run)
    on_gpu = run.gpus_per_worker > 0
    if on_gpu and not torch.cuda.is_available():
        if c.gpu is None:
            raise ConfigError(
                f"gpus_per_worker={run.gpus_per_worker}: this machine has no GPU that torch can "
                "use; give the cluster's file (cluster=clusters/a100x8.yaml), or gpu=NAME and "
                "memory_per_device=GIB"
            )
        return _described(c, run)
    threads = run.threads_per_worker or threads_of(run.most_workers)
    device = find_device(run.dtype, on_gpu, threads)
    share = float(run.gpus_per_worker or 1)
    usable = memory_of_worker(run, device, run.most_workers, share)
    memory = usable
    if on_gpu:
        memory = share * torch.cuda.get_device_properties(device.torch_device).total_memory
    if c.memory_per_device is not None:
        memory = c.memory_per_device * GIB
        usable = memory * (USABLE if on_gpu else 1.0)
    return Machine(
        "cuda" if on_gpu else "cpu", device.description, device.dtype, memory, usable,
        torch.cuda.device_count() if on_gpu else None, peak=device.data_sheet, computes=device,
    )  # fmt: skip


def _described(c: PlanConfig, run: PretrainConfig) -> Machine:
    """GPUs that only the arguments describe."""
    memory = c.memory_per_device and c.memory_per_device * GIB
    unknown = () if memory else ("the GPU's memory: give memory_per_device=GIB",)
    return Machine(
        "cuda", str(c.gpu), "fp32" if run.dtype == "fp32" else "bf16", memory,
        memory and USABLE * memory, None, peak=_peak(c.gpu, run), is_here=False, unknown=unknown,
    )  # fmt: skip


def _peak(gpu: str | None, run: PretrainConfig) -> float | None:
    return gpu_peak(gpu) if gpu is not None and run.dtype != "fp32" else None


def _of_cluster(c: PlanConfig, run: PretrainConfig) -> Machine:
    file = Path(str(c.cluster))
    value = documents.mapping(file)
    listed = prices.load(c.prices)
    room, instance, region, spot = _contents(file, value)
    found = listed.get(instance or "")
    gpu = c.gpu or (found.gpu if found else None)
    gib = c.memory_per_device or (found.gpu_memory_gib if found else None)
    unknown = []
    if gpu is None:
        unknown.append(
            f"the GPU's name, which {file} does not say: give gpu=NAME, one of "
            f"{', '.join(sorted(GPU_PEAKS))}"
        )
    if gib is None:
        unknown.append(f"the GPU's memory, which {file} does not say: give memory_per_device=GIB")
    return Machine(
        "cuda" if run.gpus_per_worker else "cpu",
        gpu or "GPUs without a name",
        "fp32" if run.dtype == "fp32" or not run.gpus_per_worker else "bf16",
        gib and gib * GIB,
        gib and USABLE * gib * GIB,
        int(room / (run.gpus_per_worker or 1)) if room else None,
        per_node=found.gpus if found else None,
        peak=_peak(gpu, run),
        is_here=False,
        instance=instance,
        region=region,
        spot=spot if c.spot is None else c.spot,
        listed=found,
        unknown=tuple(unknown) if run.gpus_per_worker else (),
    )


def _contents(file: Path, value: dict[str, Any]) -> tuple[float, str | None, str | None, bool]:
    """The GPUs that a cluster can have at most (0: not known), its GPU machines' type and region,
    and whether these may be taken back."""
    try:
        if "available_node_types" in value:
            types = value["available_node_types"]
            with_gpus = [it for it in types.values() if it["resources"].get("GPU")]
            if not with_gpus:
                raise ClusterError(f"cluster={file}: none of its node types has a GPU")
            node = with_gpus[0]["node_config"]
            instance = node.get("InstanceType") or node.get("machineType")
            region = (value.get("provider") or {}).get("region")
            return launcher.room(value)["GPU"], instance, region, launcher.is_spot(node)
        spec = value.get("spec") or {}
        spec = spec.get("rayClusterSpec", spec)
        if "workerGroupSpecs" in spec:
            return kuberay.room(spec)["GPU"], None, None, False
        if "resources" in value:  # SkyPilot's
            resources = value["resources"]
            count = str(resources.get("accelerators", "")).partition(":")[2] or "0"
            spot = bool(resources.get("use_spot"))
            return float(count) * value.get("num_nodes", 1), None, None, spot
        if "provider" in value:  # machines of a person's own
            return 0.0, None, None, False
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ClusterError(
            f"cluster={file}: not as a cluster's file is ({type(e).__name__}: {e}); python -m "
            f"manta.cluster check {file} says what is wrong"
        ) from None
    raise ClusterError(
        f"cluster={file}: neither a file for `ray up` nor for KubeRay or SkyPilot; give one of "
        "clusters/*.yaml, or gpu=NAME and memory_per_device=GIB without cluster="
    )
