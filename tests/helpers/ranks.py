"""Small models trained in DeepSpeed on ranks, which are processes of their own, on gloo."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from manta import layout
from manta.config import from_dict
from manta.model.families import model_of
from manta.model.gpt import LanguageModel, ModelConfig
from manta.train.checkpoints import fragments
from manta.train.step.device import Device
from manta.train.step.engine import Engine
from manta.train.step.optimizer import OptimizerConfig

STEPS, RANKS, ACCUMULATED, MICRO_BATCH = 4, 3, 2, 2
SHARES = [1.0, 0.8, 0.5, 0.3]  # of the peak learning rate, step by step

# Matrices of many shapes, tall and wide; the ranks' slices cut them somewhere.
MODELS = {
    "modern": {
        "n_layer": 2, "n_embd": 48, "n_head": 4, "n_kv_head": 2, "mlp_hidden": 80,
        "context_length": 16, "vocab_size": 128,
    },
    "gpt2": {
        "family": "gpt2", "n_layer": 2, "n_embd": 24, "n_head": 2, "context_length": 16,
        "vocab_size": 128, "qkv_bias": False, "tie_embeddings": False,
    },
    "lstm": {
        "family": "lstm", "n_layer": 2, "n_embd": 24, "context_length": 16, "vocab_size": 128,
    },
}  # fmt: skip


def make_model(name: str) -> LanguageModel:
    torch.manual_seed(1)
    return model_of(from_dict(ModelConfig, MODELS[name]))


def batches(model: LanguageModel) -> Iterator[Tensor]:
    """One (sequences, tokens) batch per step, of all ranks together."""
    generator = torch.Generator().manual_seed(2)
    size = RANKS * ACCUMULATED * MICRO_BATCH
    for _ in range(STEPS):
        yield torch.randint(0, model.config.vocab_size or 0, (size, 17), generator=generator)


def device(dtype: Any = "fp32") -> Device:
    return Device(torch.device("cpu"), dtype, 1e9, "CPU")


def engine_of(
    name: str,
    c: OptimizerConfig,
    stage: int,
    dtype: str = "fp32",
    start: dict[str, Tensor] | None = None,
) -> Any:
    model = make_model(name)
    if start is not None:
        model.load_state_dict(start, strict=False)  # a tied head is the embedding
    return Engine(
        model,
        c,
        device(dtype),
        zero_stage=stage,
        micro_batch_size=MICRO_BATCH,
        grad_accum_steps=ACCUMULATED,
    )


def save(engine: Any, rank: int, folder: Path) -> Any:
    """Saves weights, optimizer state and its index."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = fragments.write(fragments.copy_state(engine), folder / layout.rank_file(rank))
    entries: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(entries, entry)
    weights = engine.full_weights()
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
        (folder / "index.json").write_text(json.dumps(fragments.index_of(entries)))
    dist.barrier()
    return json.loads((folder / "index.json").read_text())


def on_ranks(function: Any, world_size: int, folder: Path) -> dict[str, Any]:
    """Runs `function(rank, world_size, folder)` in a process per rank; returns what rank 0
    found."""
    mp.spawn(_on_rank, (function, world_size, str(folder)), nprocs=world_size)
    return torch.load(folder / "found.pt")


def _on_rank(rank: int, function: Any, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "TORCH_GLOO_LAZY_INIT": "1"}  # as in a run
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    found = function(rank, world_size, folder)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative difference of a weight."""
    assert a.keys() == b.keys()
    return max(((a[k].double() - b[k]).norm() / b[k].double().norm()).item() for k in a)


def train(engine: Any, which: range) -> dict[str, Tensor]:
    """Trains these steps, each with the same batch for any number of ranks; returns the weights."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    every = list(batches(engine.module))
    for step in which:
        # 12 sequences, which 1, 2 and 3 divide.
        mine = every[step].chunk(world_size)[rank].split(MICRO_BATCH)
        engine.set_grad_accum_steps(len(mine))
        for index, micro in enumerate(mine):
            loss = engine(micro[:, :-1], micro[:, 1:])
            engine.backward(loss, is_last=index == len(mine) - 1)
            if index == len(mine) - 1:
                engine.step(1.0)
    return engine.full_weights()
