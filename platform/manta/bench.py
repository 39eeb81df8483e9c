"""Measurements of Manta itself: ratios within one run, medians, A and B in turn.

overhead: the whole platform (Ray Train, DeepSpeed, Ray Data, the loop with its records) against a
bare PyTorch loop over the same model, dtype and batch, in the same worker process.
"""

import dataclasses
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import psutil
import torch

from manta import cluster, storage
from manta import config as configs
from manta.config import Count, config
from manta.data.manifest import Manifest
from manta.model.gpt import GPT
from manta.train.checkpoint import TrainState
from manta.train.device import DTYPES, Device
from manta.train.logbook import METRICS, read_metrics
from manta.train.loop import EvalConfig, SampleConfig, to_device, train
from manta.train.optimizer import OptimizerConfig, make_optimizer
from manta.train.pretrain import PretrainConfig, fit, ready_data, setup, with_vocabulary

NEVER = 1 << 40
RAY_PROCESSES = ("ray::", "raylet", "gcs_server", "/ray/", "ray.util", "ray-dashboard")


@config
class BenchConfig(PretrainConfig):
    what: Literal["overhead"] = "overhead"
    """What to measure. overhead: the platform against a bare PyTorch loop."""
    json: str | None = None
    """Where to write the figures as JSON; null: nowhere."""
    rounds: Count = 8
    """Times that A and B are measured in turn; one more round warms up."""
    steps_per_round: Count = 10
    """Steps of A, then of B, in a round."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.num_workers != 1:
            found.append("num_workers: what=overhead compares one worker with one process; omit it")
        return found


def bench(c: BenchConfig) -> dict[str, Any]:
    """Measures, prints a table, writes JSON, returns the figures."""
    steps = (c.rounds + 1) * c.steps_per_round
    c = dataclasses.replace(
        c,
        home=c.home_folder,
        name="bench-overhead",
        total_tokens=steps * c.tokens_per_batch,
        eval=EvalConfig(every=NEVER, tokens=c.sequence_length),
        sample=SampleConfig(prompts=()),
    )
    cluster.connect()
    cluster.require(1, c.cpus_per_worker, c.gpus_per_worker, c.wait_seconds)
    manifest = ready_data(c, print)
    storage.delete_folder(c.run_folder)
    found: list[dict[str, Any]] = []
    arguments = {"config": configs.to_dict(c), "manifest": manifest}
    try:
        with _MemoryWatch() as memory:
            fit(_overhead, arguments, c, found.append, [])
    finally:
        storage.delete_folder(c.run_folder)
    result = {**found[-1], "peak_memory_bytes": memory.peak, "config": arguments["config"]}
    print(_table(result), flush=True)
    if c.json is not None:
        storage.write_json(storage.absolute(c.json), result)
        print(f"written to {c.json}")
    return result


def _overhead(arguments: dict[str, Any], put: Callable[[Any], None]) -> None:
    """In the training worker: rounds of the bare loop and of the platform's, in turn."""
    c = configs.from_dict(BenchConfig, arguments["config"])
    manifest: Manifest = arguments["manifest"]
    tokenizer = manifest.load_tokenizer()
    model = with_vocabulary(c.model, tokenizer)
    run = setup(c, manifest, tokenizer, model, TrainState(), 0, 1, lambda line: None)
    torch.manual_seed(c.seed)
    bare = _BareLoop(GPT(model), c, run.device)
    rates: dict[str, list[float]] = {"bare": [], "platform": []}
    for _ in range(c.rounds + 1):
        started = time.perf_counter()
        bare.train(c.steps_per_round)
        between = time.perf_counter()
        train(run, until=run.state.step + c.steps_per_round)
        ended = time.perf_counter()
        tokens = c.steps_per_round * c.tokens_per_batch
        rates["bare"].append(tokens / (between - started))
        rates["platform"].append(tokens / (ended - between))
    assert run.logbook is not None
    run.logbook.close()
    records = read_metrics(storage.join(c.run_folder, METRICS))
    waits = [r["data_wait_seconds"] / r["step_seconds"] for r in records if "loss" in r]
    bare_rates, platform_rates = rates["bare"][1:], rates["platform"][1:]
    ratios = [b / a for a, b in zip(bare_rates, platform_rates, strict=True)]
    put(
        {
            "what": "overhead",
            "device": run.device.description,
            "dtype": run.device.dtype,
            "bare_tokens_per_second": statistics.median(bare_rates),
            "platform_tokens_per_second": statistics.median(platform_rates),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "data_wait_share": statistics.median(waits[c.steps_per_round :]),
        }
    )


class _BareLoop:
    """What a person would write by hand: model, AdamW, autocast, one batch, kept in memory."""

    def __init__(self, model: GPT, c: BenchConfig, device: Device):
        self._model = model.to(device.torch_device)
        self._optimizer = make_optimizer(model, c.optimizer)
        self._settings: OptimizerConfig = c.optimizer
        self._device = device
        self._accum = c.grad_accum_steps
        vocab_size = model.config.vocab_size or 1
        tokens = torch.randint(vocab_size, (c.micro_batch, c.sequence_length + 1))
        self._batch = to_device(tokens.numpy(), device)

    def train(self, steps: int) -> None:
        tokens, targets = self._batch
        for _ in range(steps):
            for _ in range(self._accum):
                with torch.autocast(
                    self._device.torch_device.type,
                    torch.bfloat16,
                    enabled=DTYPES[self._device.dtype] == torch.bfloat16,
                ):
                    loss = self._model(tokens, targets)
                (loss / self._accum).backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.grad_clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        if self._device.torch_device.type == "cuda":
            torch.cuda.synchronize()


class _MemoryWatch:
    """The most memory that this process and all of Ray's on this machine held together, looked at
    once a second; shared pages (the object store's) are counted once (PSS)."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            total = 0
            for process in psutil.process_iter(["cmdline"]):
                command = " ".join(process.info["cmdline"] or [])
                if process.pid == psutil.Process().pid or any(n in command for n in RAY_PROCESSES):
                    try:
                        total += process.memory_full_info().pss
                    except (psutil.Error, AttributeError):
                        continue  # it ended, or is another user's
            self.peak = max(self.peak, total)


def _table(result: dict[str, Any]) -> str:
    ratios = result["ratios"]
    return "\n".join(
        [
            f"device              {result['device']}, {result['dtype']}",
            f"bare loop           {result['bare_tokens_per_second']:>10,.0f} tok/s",
            f"platform            {result['platform_tokens_per_second']:>10,.0f} tok/s",
            f"platform / bare     {result['ratio']:>10.1%}  (median of {len(ratios)} rounds, "
            f"{min(ratios):.1%} to {max(ratios):.1%})",
            f"data wait           {result['data_wait_share']:>10.2%} of a step (median)",
            f"peak memory         {result['peak_memory_bytes'] / 2**30:>10.2f} GiB, "
            "driver, Ray and workers together",
        ]
    )
