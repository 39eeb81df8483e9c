"""Measures the peak memory of a training step on two workers, against model/memory.py.

Twelve models of many shapes, each at every ZeRO stage, train with Manta's own engine in two plain
processes on the CPU (gloo, no Ray). The peak is that of the first process: by how much it grows at
most, from before the engine is made. Freed memory is given back at once, so that the peak is that
of what is alive. What is predicted is the peak without the allowance, which stands for what other
machines need.

The peak is in a step that is not the first (the optimizer has its state), in its last micro batch
(gradients have been added up, and are reduced). So the micro batches before that one have a few
tokens only, which takes a quarter of the time.
"""

import dataclasses
import gc
import os
import statistics
from typing import Any, Literal

import torch
import torch.distributed as dist

from manta import config as configs
from manta.bench.settings import BenchConfig
from manta.bench.stages import STAGES, return_freed_memory, trim
from manta.job import hint
from manta.model.memory import ALLOWANCE, costs
from manta.train.alone import Step, together
from manta.train.objectives.next_token import Batch
from manta.train.peak_memory import PeakMemory
from manta.train.settings import PretrainConfig, memory_setup
from manta.train.step.device import Device

WORKERS = 2
BUCKET_MB = 8
SHORT = 16  # tokens of the micro batches that do not count
CLOSE = 0.05


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its micro batch."""

    name: str
    n_layer: int
    n_embd: int
    seq_len: int
    micro_batch: int
    vocab_size: int
    dtype: Literal["fp32", "bf16"] = "fp32"
    recompute: str = "none"
    family: str = "modern"
    more: tuple[tuple[str, Any], ...] = ()
    """More keys of the model."""

    def config(self, stage: int) -> PretrainConfig:
        tokens = WORKERS * 2 * self.micro_batch * self.seq_len
        model = {
            "family": self.family, "n_layer": self.n_layer, "n_embd": self.n_embd,
            "n_head": self.n_embd // 64, "context_length": self.seq_len,
            "vocab_size": self.vocab_size, **dict(self.more),
        }  # fmt: skip
        tree = {
            "model": model, "num_workers": WORKERS, "zero_stage": stage, "dtype": self.dtype,
            "micro_batch_size": self.micro_batch, "tokens_per_batch": tokens,
            "total_tokens": tokens, "compile": "none", "activation_checkpointing": self.recompute,
            "engine": {"reduce_bucket_mb": BUCKET_MB} if stage else {},
        }  # fmt: skip
        return configs.from_dict(PretrainConfig, tree)


CASES = (
    Case("modern", 6, 512, 128, 4, 8192),
    Case("gpt2", 6, 512, 256, 4, 8192, family="gpt2"),
    Case("bf16", 4, 256, 256, 8, 16384, "bf16"),
    Case("long", 8, 384, 512, 2, 2048, "bf16"),
    Case("gpt2, wide, bf16", 4, 768, 128, 2, 4096, "bf16", family="gpt2"),
    Case("selective", 6, 512, 256, 8, 8192, recompute="selective"),
    Case("full, bf16", 6, 512, 512, 4, 8192, "bf16", recompute="full"),
    Case("QK-norm, GQA", 6, 512, 256, 4, 8192, more=(("qk_norm", True), ("n_kv_head", 2))),
    Case("untied", 4, 512, 128, 4, 16384, more=(("tie_embeddings", False),)),
    Case("two wide blocks", 2, 1024, 64, 2, 8192),
    Case("deep, bf16", 16, 256, 256, 4, 4096, "bf16"),
    Case("one block, many ids", 1, 512, 128, 8, 32768),
)
WARM_UP = Case("warm-up", 1, 64, 16, 1, 512)


def peaks(c: BenchConfig) -> dict[str, Any]:
    """Measures the cases; `parts=` names some of them."""
    chosen: tuple[Case, ...] = CASES
    if c.parts is not None:
        wanted = [name.strip() for name in c.parts.split(";")]
        chosen = tuple(case for case in CASES if case.name in wanted)
    measured = together(WORKERS, "gloo", _work, chosen)
    rows = [
        {
            "name": case.name, "stage": stage, "predicted": predict(case, stage),
            "measured": found,
        }
        for case, at_stages in zip(chosen, measured, strict=True)
        for stage, found in zip(STAGES, at_stages, strict=True)
    ]  # fmt: skip
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    return {
        "workers": WORKERS, "rows": rows, "median_error": statistics.median(errors),
        "worst_error": max(errors), "close": sum(error <= CLOSE for error in errors),
    }  # fmt: skip


def predict(case: Case, stage: int) -> int:
    """Bytes of the first worker's peak, by the cost model."""
    c = case.config(stage)
    setup = memory_setup(c, c.expected_model, case.dtype, "cpu")
    setup = dataclasses.replace(setup, micro_batch_size=case.micro_batch)
    return costs(setup).peak - ALLOWANCE


def _work(cases: tuple[Case, ...]) -> list[list[int]]:
    """The peaks of each case at each stage, as one worker finds them."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return_freed_memory()
    torch.set_num_threads(1)
    found: list[list[int]] = []
    warm: set[Case] = set()
    for case in cases:
        found.append([])
        _train(case, 0)  # makes the kernels of these shapes, which stay
        for stage in STAGES:
            # What else is loaded at its first use is loaded by a small model.
            small = dataclasses.replace(
                WARM_UP, name=f"stage {stage}", dtype=case.dtype, family=case.family,
                recompute=case.recompute,
            )  # fmt: skip
            if small not in warm:
                _train(small, stage)
                warm.add(small)
            gc.collect()
            trim()
            memory = PeakMemory(torch.device("cpu"))
            _train(case, stage)
            found[-1].append(memory.bytes)
        if dist.get_rank() == 0:
            hint(f"{case.name}: {', '.join(f'{size / 1e6:,.0f}' for size in found[-1])} MB")
    return found


def _train(case: Case, stage: int) -> None:
    linear = torch.nn.functional.linear
    dist.barrier()
    step = Step(case.config(stage), Device(torch.device("cpu"), case.dtype, 1e12, "CPU"))
    whole = step.batch
    step.batch = Batch(whole.ids[:1, : SHORT + 1])
    step.run()

    def then_whole(part: str) -> None:
        if part == "backward":  # that of the step's first micro batch
            step.batch = whole

    step.run(then_whole)
    dist.barrier()
    torch.nn.functional.linear = linear  # stage 3 puts DeepSpeed's in its place, for good


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['workers']} workers; MB of the first one at the peak of a step, predicted / "
        "measured (ratio)",
        f"{'':<22}" + "".join(f"{f'stage {stage}':>24}" for stage in STAGES),
    ]
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        cells = [
            f"{row['predicted'] / 1e6:,.0f} / {row['measured'] / 1e6:,.0f} "
            f"({row['predicted'] / row['measured']:.3f})"
            for row in result["rows"]
            if row["name"] == name
        ]
        lines.append(f"{name:<22}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append(
        f"error: median {result['median_error']:.1%}, worst {result['worst_error']:.1%}; within "
        f"{CLOSE:.0%}: {result['close']} of {len(result['rows'])}"
    )
    return "\n".join(lines)
