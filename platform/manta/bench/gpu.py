"""One command that checks Manta on a GPU, part by part, each part in its own process.

Parts that need no Ray come first, and the JSON file has a part's results as soon as it ends. So the
other parts' results are safe if the GPU is there for some minutes only, or if a part hangs or
crashes.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import manta
from manta import config as configs
from manta import storage
from manta.bench.gpu_parts import PARTS, Part
from manta.bench.settings import BenchConfig
from manta.errors import ConfigError
from manta.train.step.device import pick_device

LEAST_SECONDS = 10.0  # no part starts with less time left
TAIL = 12  # last lines of a failed part's output that are kept


def gpu(c: BenchConfig) -> dict[str, Any]:
    """Runs the parts one after the other, for at most `c.seconds` seconds. A part's status is
    "pass", "missed" (correct, but short of a goal), "fail" or "skipped", with the reason.

    Raises:
        ConfigError: `c.parts` names an unknown part, or `c.device` a GPU that this machine lacks.
    """
    chosen = _chosen(c.parts)
    device = pick_device(c.device)
    on_gpu = device.type == "cuda"
    c = dataclasses.replace(
        c, device="cuda" if on_gpu else "cpu", gpus_per_worker=1 if on_gpu else 0
    )
    started, found = time.monotonic(), dict[str, dict[str, Any]]()
    result: dict[str, Any] = {"device": device.type, "size": c.size, "parts": found}
    for name, part in chosen.items():
        left = c.seconds - (time.monotonic() - started)
        print(f"{name:<14}{part.what} ...", flush=True)
        found[name] = outcome = _run(name, part, c, left, found)
        print(f"{'':<14}{_line(outcome)}", flush=True)
        if c.json is not None:
            storage.write_json(storage.absolute(c.json), result)
    result["seconds"] = time.monotonic() - started
    result["failed"] = [name for name, part in found.items() if part["status"] == "fail"]
    return result


def _chosen(names: str | None) -> dict[str, Part]:
    """The parts with these names, in the order of the names; all parts if there are no names."""
    if names is None:
        return PARTS
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in PARTS:
            raise ConfigError(f"parts={names}: {name!r} is none of {', '.join(PARTS)}")
    return {name: PARTS[name] for name in wanted}


def _run(
    name: str, part: Part, c: BenchConfig, left: float, before: dict[str, Any]
) -> dict[str, Any]:
    """Runs one part and returns its outcome. All processes that it started have ended by then."""
    reason = part.skips(c)
    if reason is None and left < LEAST_SECONDS:
        reason = f"no time was left of seconds={c.seconds:g}"
    if reason is not None:
        return {"status": "skipped", "why": reason}
    limit, started = min(part.seconds * c.patience, left), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="manta-gpu-") as folder:
        task, answer, log = (Path(folder) / file for file in ("task.json", "answer.json", "log"))
        task.write_text(json.dumps({"config": configs.to_dict(c), "before": before}))
        command = [sys.executable, "-m", "manta.bench.gpu_parts", name, str(task), str(answer)]
        root = str(Path(manta.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": path},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children can be ended with it
            )
            try:
                process.wait(limit)
                why = None
            except subprocess.TimeoutExpired:
                why = f"took more than {limit:.0f} s, and was ended"
            finally:
                _end(process)
        seconds = time.monotonic() - started
        if answer.is_file():  # even if it hung after its work was done
            return {**json.loads(answer.read_text()), "seconds": seconds}
        said = log.read_text(errors="replace").splitlines()
        why = why or f"ended with code {process.returncode} and no result"
        return {"status": "fail", "why": why, "seconds": seconds, "said": said[-TAIL:]}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a part's process and the rest of its process group. (If the part started Ray, Ray ends
    by itself once that process is gone.)"""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _line(outcome: dict[str, Any]) -> str:
    parts = [outcome["status"]]
    if "seconds" in outcome:
        parts[0] += f" in {outcome['seconds']:.0f} s"
    parts += [str(outcome[key]) for key in ("why", "shown") if outcome.get(key)]
    return "; ".join(parts)


def table(result: dict[str, Any]) -> str:
    lines = ["", f"torch {torch.__version__}, {result['device']}, {result['seconds']:.0f} s in all"]
    for name, outcome in result["parts"].items():
        lines.append(f"{outcome['status']:<8} {name:<14} {outcome.get('shown', '')}".rstrip())
        if outcome.get("why"):
            lines.append(f"{'':<24}{outcome['why']}")
        lines += [f"{'':<24}| {line}" for line in outcome.get("said", [])]
    counts = [outcome["status"] for outcome in result["parts"].values()]
    lines.append(", ".join(f"{counts.count(s)} {s}" for s in ("pass", "missed", "fail", "skipped")))
    return "\n".join(lines)
