"""Measures the whole platform (Ray Train, DeepSpeed, Ray Data, the loop with its records) against a
bare PyTorch loop (with DistributedDataParallel on more than one worker). Both have the same model,
dtype and batch, and run in the same worker processes."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from manta import config as configs
from manta import layout, ownership, storage
from manta.bench.memory import COUNTED, MemoryWatch
from manta.bench.settings import BenchConfig
from manta.data import mixture
from manta.data.manifest import Manifest
from manta.model.families import model_of
from manta.train.eval_settings import EvalConfig, SampleConfig
from manta.train.faults.signals import Signals
from manta.train.kept import Kept
from manta.train.loop import no_garbage_collection, train
from manta.train.objectives.next_token import Batch
from manta.train.ranks import Rank
from manta.train.records.logbook import read_metrics
from manta.train.run import Run
from manta.train.step.device import DTYPES
from manta.train.step.optimizer import OptimizerConfig, make_optimizer
from manta.train.supervise import fit
from manta.train.worker import setup

NEVER = 1 << 40


def overhead(c: BenchConfig) -> dict[str, Any]:
    steps = (c.rounds + 1) * c.steps_per_round
    c = dataclasses.replace(
        c,
        total_tokens=steps * c.tokens_per_batch,
        batch_ramp={},  # the bare loop has only one batch size
        eval=EvalConfig(every=NEVER, tokens=c.sequence_length),
        sample=SampleConfig(prompts=()),
    )
    datasets = mixture.open_datasets(c.data, c.home_folder, print)
    found: list[dict[str, Any]] = []
    with (
        ownership.scratch(layout.runs_folder(c.home_folder), "bench-overhead") as folder,
        MemoryWatch() as memory,
    ):
        c = dataclasses.replace(c, name=folder.rpartition("/")[2])
        arguments = {"config": configs.to_dict(c), "datasets": datasets}
        fit(_measure, arguments, c, found.append, [])
    return {**found[-1], "peak_memory_bytes": memory.peak}


def _measure(arguments: dict[str, Any], put: Callable[[Any], None]) -> None:
    """Runs rounds of the bare loop and of the platform's in turn, in the training worker."""
    c = configs.from_dict(BenchConfig, arguments["config"])
    datasets: tuple[Manifest, ...] = arguments["datasets"]
    rank = Rank.here()
    run = setup(c, datasets, None, rank, signals=Signals([]), say=lambda _: None, kept=Kept())
    torch.manual_seed(c.seed)
    bare = _BareLoop(c, run)
    rates: dict[str, list[float]] = {"bare": [], "platform": []}
    with no_garbage_collection():  # `train` alone would do this once for all steps
        for _ in range(c.rounds + 1):
            started = time.perf_counter()
            bare.train(c.steps_per_round)
            between = time.perf_counter()
            train(run, until=run.state.step + c.steps_per_round)
            ended = time.perf_counter()
            tokens = c.steps_per_round * c.tokens_per_batch
            rates["bare"].append(tokens / (between - started))
            rates["platform"].append(tokens / (ended - between))
    if run.logbook is None:
        return
    run.logbook.close()
    records = read_metrics(storage.join(c.run_folder, layout.METRICS))
    waits = [r["data_wait_seconds"] / r["step_seconds"] for r in records if "loss" in r]
    bare_rates, platform_rates = rates["bare"][1:], rates["platform"][1:]
    ratios = [b / a for a, b in zip(bare_rates, platform_rates, strict=True)]
    put(
        {
            "device": run.device.description,
            "workers": rank.world_size,
            "dtype": run.device.dtype,
            "bare_tokens_per_second": statistics.median(bare_rates),
            "platform_tokens_per_second": statistics.median(platform_rates),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "data_wait_share": statistics.median(waits[c.steps_per_round :]),
        }
    )


class _BareLoop:
    """The loop that one would write by hand: model, optimizer, autocast, one batch in memory."""

    def __init__(self, c: BenchConfig, run: Run):
        model, device = model_of(run.model), run.device
        model.recompute = c.activation_checkpointing
        if run.state.compiled:
            model.compile_blocks()
        self._model: nn.Module = model.to(device.torch_device)
        self._optimizer = make_optimizer(model, c.optimizer, device.dtype)
        if run.config.workers > 1:
            self._model = DistributedDataParallel(self._model)
        self._settings: OptimizerConfig = c.optimizer
        self._device = device
        self._accum = run.config.grad_accum_steps(0)
        tokens = torch.randint(
            run.model.vocab_size or 1, (run.config.micro_batch, c.sequence_length + 1)
        )
        self._batch = Batch(tokens.numpy()).to(device.torch_device)

    def train(self, steps: int) -> None:
        tokens, targets = self._batch
        for _ in range(steps):
            for index in range(self._accum):
                with _averaging(self._model, is_last=index == self._accum - 1):
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


def _averaging(model: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
    """Context of a backward pass. Gradients are summed on each worker, and averaged over workers
    after the last pass of a step."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return nullcontext()


def table(result: dict[str, Any]) -> str:
    ratios = result["ratios"]
    return "\n".join(
        [
            f"device              {result['device']}, {result['dtype']}",
            f"workers             {result['workers']:>10}",
            f"bare loop           {result['bare_tokens_per_second']:>10,.0f} tok/s",
            f"platform            {result['platform_tokens_per_second']:>10,.0f} tok/s",
            f"platform / bare     {result['ratio']:>10.1%}  (median of {len(ratios)} rounds, "
            f"{min(ratios):.1%} to {max(ratios):.1%})",
            f"data wait           {result['data_wait_share']:>10.2%} of a step (median)",
            f"peak memory         {result['peak_memory_bytes'] / 2**30:>10.2f} GiB, "
            f"driver, Ray and workers together, {COUNTED}",
        ]
    )
