"""What the job that runs on a cluster asks for, read from its arguments, and whether it fits."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml


def of(arguments: Sequence[str]) -> dict[str, Any]:
    """The values that `[config.yaml ...] [key=value ...]` set, groups as dotted keys. What is not
    readable is left out: the job itself says what is wrong with its arguments."""
    found: dict[str, Any] = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        try:
            if not sign and Path(argument).suffix == ".yaml" and Path(argument).is_file():
                found |= dict(_dotted(yaml.safe_load(Path(argument).read_text())))
            elif sign:
                found[key] = yaml.safe_load(value)
        except (OSError, yaml.YAMLError):
            continue
    return found


def _dotted(tree: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            yield from _dotted(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def problems(asked: dict[str, Any], room: dict[str, float], spot: bool) -> Iterator[str]:
    """Why a job with these values cannot run on a cluster of at most `room` CPUs and GPUs, or loses
    its work on machines that are taken back."""
    workers = asked.get("num_workers", 1)
    fewest = workers[0] if isinstance(workers, list) and workers else workers
    for key, resource in (("gpus_per_worker", "GPU"), ("cpus_per_worker", "CPU")):
        each = asked.get(key, 0)
        if not isinstance(fewest, int) or not isinstance(each, int | float):
            continue
        if fewest * each > room[resource]:
            yield (
                f"num_workers={workers} with {key}={each} need {fewest * each:g} {resource}s, and "
                f"the cluster grows to {room[resource]:g}: set num_workers="
                f"{int(room[resource] // each)}, or raise the cluster's largest size"
            )
    never = "checkpoint.every" in asked and asked["checkpoint.every"] is None
    if (
        spot
        and never
        and not any(asked.get(f"checkpoint.{key}") for key in ("every_tokens", "every_minutes"))
    ):
        yield (
            "checkpoint.every=null on spot machines: all steps are lost when one is taken back; "
            "set checkpoint.every_minutes=auto"
        )
