"""The parts of `what=gpu`: each is a function that returns its figures and a line to show.

`python -m manta.bench.gpu_parts NAME TASK ANSWER` runs one part. TASK is a JSON file with the
config and the results of the earlier parts; ANSWER is written when the part is done.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import traceback
import unittest
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from manta import config as configs
from manta.bench.settings import BenchConfig
from manta.model.memory import ALLOWANCE, GIB, costs
from manta.train.settings import memory_setup

ROOT = Path(__file__).parents[3]
Found = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    run: Callable[[BenchConfig, Found], Found]
    """(config, results of the earlier parts) -> figures. Some keys have a meaning: "shown" is the
    part's line, "wrong" says why it failed, "missed" names the goals that it did not reach."""
    what: str
    seconds: float
    """The time-out of the part on a GPU."""
    packages: tuple[str, ...] = ()
    """The packages that the part needs; it is skipped if one is missing."""
    needs_gpu: bool = False
    full_only: bool = False

    def skips(self, c: BenchConfig) -> str | None:
        """The reason to skip this part; None if it runs."""
        if self.needs_gpu and c.device != "cuda":
            return "it needs a GPU"
        if self.full_only and c.size == "tiny":
            return "size=tiny has only one model"
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{', '.join(missing)} is not installed" if missing else None


def machine(c: BenchConfig, _before: Found) -> Found:
    """The setup: versions, the card, the speed of its matrix products, what can be compiled."""
    from manta.model.attention import fused_kernels
    from manta.train.build import missing_to_compile
    from manta.train.step.device import available_cpus, find_device

    device = find_device(c.dtype, c.device == "cuda", available_cpus())
    names = ("torch", "triton", "deepspeed", "ray", "transformers", "numpy", "lm-eval")
    found: Found = {
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in names},
        "cuda": torch.version.cuda,
        "card": device.description,
        "dtype": device.dtype,
        "product_flops": device.measured,
        "data_sheet_flops": device.data_sheet,
        "missing_to_compile": missing_to_compile(c.device),
    }
    if c.device == "cuda":
        properties = torch.cuda.get_device_properties(device.torch_device)
        found["memory_bytes"] = properties.total_memory
        found["capability"] = f"{properties.major}.{properties.minor}"
        dtype = torch.bfloat16 if device.dtype == "bf16" else torch.float32
        found["attention"] = {
            str(size): fused_kernels(device.torch_device, dtype, size) for size in (64, 128)
        }
    found["shown"] = f"{device.description}, {device.dtype} products "
    found["shown"] += f"{device.measured / 1e12:,.1f} TFLOP/s"
    if device.data_sheet:
        found["shown"] += f" of {device.data_sheet / 1e12:,.0f} by its data sheet"
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def tests(c: BenchConfig, _before: Found) -> Found:
    """Runs tests/bench/test_gpu.py, which needs no pytest."""
    file = ROOT / "tests" / "bench" / "test_gpu.py"
    if not file.is_file():
        raise unittest.SkipTest(f"{file} is not there: run from a checkout of Manta")
    os.environ["MANTA_TEST_DEVICE"] = c.device
    spec = importlib.util.spec_from_file_location("test_gpu", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["test_gpu"] = module
    spec.loader.exec_module(module)
    found: Found = {"passed": [], "skipped": {}, "failed": {}}
    for name, test in vars(module).items():
        if not name.startswith("test_") or not callable(test):
            continue
        print(name, flush=True)
        try:
            test()
            found["passed"].append(name)
        except unittest.SkipTest as e:
            found["skipped"][name] = str(e)
        except Exception as e:
            traceback.print_exc()
            found["failed"][name] = " ".join(f"{type(e).__name__}: {e}".split())[:600]
    counts = {key: len(value) for key, value in found.items()}
    found["shown"] = ", ".join(f"{count} {key}" for key, count in counts.items())
    if found["failed"]:
        found["wrong"] = "; ".join(f"{name}: {why}" for name, why in found["failed"].items())
    return found


# By size: the model, sequences in a micro batch, micro batches in a step, and the goal for the MFU.
# The MFU counts attention as nanoGPT does. The goals are what llm.c and others reach on one H100,
# and more.
SIZES = {
    "124m": ("gpt2-124m", 32, 8, 0.45),
    "350m": ("gpt2-350m", 16, 8, 0.50),
    "1.5b": ("gpt2-1.5b", 8, 8, 0.55),
}
TINY = ["model.n_layer=2", "model.n_head=2", "model.n_embd=64", "model.context_length=64"]
MEMORY_TOLERANCE = 0.08  # as a share of the cost model's prediction


def _config(c: BenchConfig, size: str, *more: str) -> BenchConfig:
    """The config of the bench of one model, or of a tiny one if `c` says so."""
    preset, micro, steps, _ = SIZES[size]
    shape = [f"model.preset={preset}", "model.vocab_size=50257", "dtype=auto", "compile=blocks"]
    tokens = 1024
    if c.size == "tiny":
        shape = [*TINY, "model.vocab_size=500", "dtype=fp32", "compile=none"]
        micro, steps, tokens = 2, 2, 64
    arguments = [
        *shape,
        f"micro_batch_size={micro}",
        f"tokens_per_batch={micro * steps * tokens}",
        f"gpus_per_worker={c.gpus_per_worker}",
        f"threads_per_worker={c.threads_per_worker or 'null'}",
        f"home={c.home}",
        "rounds=3" if c.size == "full" else "rounds=1",
        "steps_per_round=2",
    ]
    return configs.load(BenchConfig, [*arguments, *more])


def step(size: str) -> Callable[[BenchConfig, Found], Found]:
    """The training step of a model: time, MFU, and memory against the cost model."""

    def run(c: BenchConfig, _before: Found) -> Found:
        from manta.bench.model import model

        mine = _config(c, size)
        found = model(mine)
        kind: Any = c.device
        setup = memory_setup(mine, mine.expected_model, found["dtype"], kind, found["compiled"])
        setup = dataclasses.replace(setup, micro_batch_size=found["micro_batch_size"])
        # Torch's allocator does not count the CUDA context and NCCL's buffers.
        predicted = costs(setup).peak - ALLOWANCE
        found["predicted_memory_bytes"] = predicted
        ratio = found["peak_memory_bytes"] / predicted
        found["shown"] = (
            f"{found['tokens_per_second']:,.0f} tok/s, MFU {found['mfu']:.1%} "
            f"({found['mfu_of_measured']:.1%} of the measured product)"
        )
        if c.device == "cuda":
            found["memory_ratio"] = ratio
            found["shown"] += (
                f", {found['peak_memory_bytes'] / GIB:.1f} GiB, {ratio:.2f} of the cost model's"
            )
            goal = SIZES[size][3]
            missed = []
            if found["mfu"] < goal and c.size == "full":
                missed.append(f"an MFU of {goal:.0%} is the goal")
            if abs(ratio - 1) > MEMORY_TOLERANCE and c.size == "full":
                missed.append(f"the memory is not within {MEMORY_TOLERANCE:.0%} of the cost model")
            found["missed"] = "; ".join(missed)
        return found

    return run


def deterministic(c: BenchConfig, before: Found) -> Found:
    """Measures what deterministic=true costs in a step of the smallest model."""
    from manta.bench.model import model

    found = model(_config(c, "124m", "deterministic=true"))
    found["shown"] = f"{found['tokens_per_second']:,.0f} tok/s"
    free = before.get("step-124m", {}).get("step_seconds")
    if free is not None:
        found["cost"] = found["step_seconds"] / free - 1
        found["shown"] += f", a step takes {found['cost']:.1%} longer"
    return found


def head(c: BenchConfig, _before: Found) -> Found:
    """Measures the head's loss and gradient, plain and compiled, by the size of its chunks."""
    from manta.bench.head import head as measure

    return measure(c)


def checkpoint(c: BenchConfig, _before: Found) -> Found:
    """Measures what a save costs training."""
    from manta.bench.checkpoints import checkpoints

    found = checkpoints(_config(c, "124m", "rounds=1"))
    found["shown"] = (
        f"{found['bytes'] / 1e9:.2f} GB, training waits {found['copy_seconds']:.2f} s "
        f"({found['copy_steps']:.2f} steps) and loses {found['lost_steps']:.2f} steps"
    )
    return found


def generation(c: BenchConfig, _before: Found) -> Found:
    """Tokens/s at batches of 1, 8 and 64."""
    from manta.bench.generation import generation as measure

    tokens = 8 if c.size == "tiny" else 128
    found = measure(_config(c, "124m", f"new_tokens={tokens}", "rounds=1"))
    found["shown"] = ", ".join(
        f"{found[f'{key}_tokens_per_second']:,.0f} tok/s at batch {batch}"
        for key, batch in (("cached", 1), ("batched", 8), ("large_batch", 64))
    )
    return found


def platform(c: BenchConfig, _before: Found) -> Found:
    """The platform (Ray Train, Ray Data, DeepSpeed) against a bare loop in the same process."""
    from manta.bench.overhead import overhead
    from manta.cluster import connection

    tiny = [*TINY, "dtype=fp32", "compile=none"]
    shape = tiny if c.size == "tiny" else ["model.preset=gpt2-124m", "compile=blocks"]
    tokens = 256 if c.size == "tiny" else 131072
    mine = configs.load(
        BenchConfig,
        [
            *shape, *_corpus(c), f"tokens_per_batch={tokens}", f"home={c.home}",
            f"gpus_per_worker={c.gpus_per_worker}", "rounds=4", "steps_per_round=5",
        ],
    )  # fmt: skip
    connection.connect(own=True)
    found = overhead(mine)
    found["shown"] = f"{found['ratio']:.1%} of a bare loop's {found['bare_tokens_per_second']:,.0f}"
    if found["ratio"] < 0.98 and c.size == "full":
        found["missed"] = "98% is the goal"
    return found


def _corpus(c: BenchConfig) -> list[str]:
    """Writes a generated text and returns its settings, so that no corpus is needed."""
    file = Path(c.home_folder) / "numbers.txt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        count = 200_000 if c.size == "full" else 2_000
        lines = (f"{i} squared is {i * i}, and its third power {i**3}.\n\n" for i in range(count))
        file.write_text("".join(lines))
    return [f"data.source={file}", "data.vocab_size=500", "data.document_bytes=2000"]


def pretraining(c: BenchConfig, _before: Found) -> Found:
    """A whole run through Ray; on a GPU, it runs out of memory once and then continues."""
    from manta.cluster import connection
    from manta.train.pretrain import pretrain
    from manta.train.settings import PretrainConfig

    shape = TINY if c.size == "tiny" else ["model.preset=gpt2-124m"]
    length = 64 if c.size == "tiny" else 1024
    micro = 2
    if c.device == "cuda":
        micro = _too_large(configs.load(PretrainConfig, [*shape, "gpus_per_worker=1"]))
    mine = configs.load(
        PretrainConfig,
        [
            *shape, *_corpus(c), "name=gpu-bench", f"home={c.home}", "compile=none", "dtype=auto",
            f"gpus_per_worker={c.gpus_per_worker}", f"micro_batch_size={micro}",
            f"tokens_per_batch={micro * length}", f"total_tokens={4 * micro * length}",
            "eval.tokens=4096", "sample.tokens=4", "log_every=1", "checkpoint.every=2",
        ],
    )  # fmt: skip
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    connection.connect(own=True)
    done = pretrain(mine, say)
    halved = [line for line in lines if line.startswith("out of memory")]
    found: Found = {"lines": lines, "steps": done.state.step, "micro_batch": done.state.micro_batch}
    found["shown"] = f"{done.state.step} steps, saved; micro batches of {done.state.micro_batch}"
    if c.device == "cuda":
        found["shown"] += f" after {micro} ran out of memory" if halved else ""
        if len(halved) != 1 or done.state.micro_batch != micro // 2:
            found["wrong"] = f"it ran out of memory {len(halved)} times, once was expected"
    else:
        found["shown"] += " (running out of memory is for GPUs)"
    return found


def _too_large(run: Any) -> int:
    """An even micro batch size that needs 1.3 times this GPU's memory by the cost model, so that
    half of it fits."""
    from manta.train.step.device import choose_dtype

    memory = torch.cuda.get_device_properties(0).total_memory
    dtype: Any = choose_dtype(torch.device("cuda"))
    setup, size = memory_setup(run, run.expected_model, dtype, "cuda"), 2
    while costs(dataclasses.replace(setup, micro_batch_size=size)).peak < 1.3 * memory:
        size += 2
    return size


TRAINS = ("deepspeed", "psutil", "safetensors")
RAY = (*TRAINS, "ray", "pyarrow", "tokenizers", "tensorboardX", "matplotlib")
PARTS = {
    "machine": Part(machine, "versions, the card, matrix products", 60),
    "tests": Part(tests, "tests/bench/test_gpu.py", 150, TRAINS),
    "step-124m": Part(step("124m"), "a training step of GPT-2 124M", 90, TRAINS),
    "step-350m": Part(step("350m"), "a training step of GPT-2 350M", 100, TRAINS, full_only=True),
    "step-1.5b": Part(step("1.5b"), "a training step of GPT-2 1.5B", 120, TRAINS, full_only=True),
    "head": Part(head, "the head's loss, plain and compiled", 45),
    "checkpoint": Part(checkpoint, "what a save costs", 120, TRAINS),
    "generation": Part(generation, "tokens/s at batches of 1, 8 and 64", 60),
    "deterministic": Part(deterministic, "what determinism costs", 75, TRAINS, needs_gpu=True),
    "platform": Part(platform, "training on Ray, against a bare loop", 150, RAY),
    "pretraining": Part(pretraining, "a run on Ray, out of memory once", 200, RAY),
}


def main(name: str, task: str, answer: str) -> None:
    given = json.loads(Path(task).read_text())
    c = configs.from_dict(BenchConfig, given["config"])
    folder = tempfile.mkdtemp(prefix="manta-gpu-home-")
    try:
        c = dataclasses.replace(c, home=folder)
        found = PARTS[name].run(c, given["before"])
        wrong, missed = found.pop("wrong", ""), found.pop("missed", "")
        status = "fail" if wrong else "missed" if missed else "pass"
        outcome = {"status": status, **found, "why": wrong or missed}
    except unittest.SkipTest as e:
        outcome = {"status": "skipped", "why": str(e)}
    except Exception as e:
        traceback.print_exc()
        said = traceback.format_exc().splitlines()[-6:]
        why = " ".join(f"{type(e).__name__}: {e}".split())[:600]
        outcome = {"status": "fail", "why": why, "said": said}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    file = Path(answer)
    file.with_suffix(".part").write_text(json.dumps(outcome, default=str))
    file.with_suffix(".part").rename(file)
    sys.stdout.flush()
    os._exit(0)  # library threads may hang when the interpreter exits


if __name__ == "__main__":
    main(*sys.argv[1:])
