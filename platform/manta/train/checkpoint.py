"""Checkpoints: whole or absent.

checkpoints/step-00001000/model.safetensors    weights, fp32, readable without Manta
                          config.json          the model's config
                          encoding.json        the tokenizer
                          state.json           where training was (TrainState)
                          engine/              optimizer state, private to the run
                          MANIFEST.json        every file's size and sha256, written LAST
"""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pyarrow import fs as pafs
from safetensors.torch import load_file, save_file

from manta import config as configs
from manta import storage
from manta.errors import CheckpointError, DataError
from manta.model.gpt import GPT, ModelConfig, unpadded
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer
from manta.train import engine as engines

MANIFEST = "MANIFEST.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
STATE = "state.json"
ENGINE = "engine"


@dataclasses.dataclass
class TrainState:
    """Everything that a run needs to go on as if it had not stopped, beside weights and optimizer.

    The position in the data is `step`: global batch k is made of the same tokens wherever it is
    read. Randomness in a step is drawn from (seed, step, rank), so there is no state of it.
    """

    step: int = 0
    best_val_loss: float | None = None
    evals_since_best: int = 0
    train_seconds: float = 0.0
    stopped_early: bool = False
    dtype: str = ""
    optimizer: str = ""
    compiled: bool | None = None
    micro_batch: int = 0
    """Sequences that a worker computes at once: what was decided at the start is kept, so that a
    run that goes on computes as one that never stopped."""
    world_size: int = 1
    zero_stage: int = 0
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What decides the order of the data: it must be the same to go on."""
    datasets: list[str] = dataclasses.field(default_factory=list)
    """Where the datasets were."""


def path_of(run: str, step: int) -> str:
    return storage.join(run, "checkpoints", f"step-{step:08d}")


def save(run: str, engine: Any, state: TrainState, model: ModelConfig, tokenizer: Tokenizer) -> str:
    """Writes a checkpoint (a collective call: all ranks, same arguments); its path.

    Each rank writes its own files; the manifest, written last by rank 0, makes them a checkpoint.
    """
    final = path_of(run, state.step)
    rank = dist.get_rank()
    if rank == 0:
        storage.delete_folder(final)  # what a save that was cut short may have left
        storage.make_folder(storage.join(final, ENGINE))
    dist.barrier()
    staging = _staging_folder(final, rank)
    try:
        (staging / ENGINE).mkdir(parents=True, exist_ok=True)
        engines.save_state(engine, str(staging))
        weights = {n: unpadded(n, w, model) for n, w in engines.full_weights(engine).items()}
        if rank == 0:
            save_file(weights, staging / WEIGHTS, metadata={"format": "pt"})
            (staging / CONFIG).write_text(json.dumps(configs.to_dict(model), indent=1))
            (staging / tokenizers.FILE_NAME).write_bytes(tokenizer.serialized)
            (staging / STATE).write_text(json.dumps(dataclasses.asdict(state), indent=1))
        written = {}
        for file in sorted(p for p in staging.rglob("*") if p.is_file()):
            name = str(file.relative_to(staging))
            if file.suffix == ".py":
                continue  # DeepSpeed adds scripts; the weights are in model.safetensors
            written[name] = {
                "size": file.stat().st_size,
                "sha256": storage.sha256(str(file)),
            }
            _move(file, storage.join(final, name))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, written)
    if rank == 0:
        files = {name: entry for share in everyone for name, entry in share.items()}
        storage.write_json(storage.join(final, MANIFEST), {"files": files})
    dist.barrier()
    return final


def load_engine(path: str, engine: Any) -> None:
    """Weights, optimizer state and counters into the engine (a collective call)."""
    if storage.is_local(path):
        engines.load_state(engine, storage.filesystem(path)[1])
        return
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        for name in _files(path):
            if name.startswith(ENGINE + "/"):
                storage.download(storage.join(path, name), Path(folder) / name)
        engines.load_state(engine, folder)


def load_state(path: str) -> TrainState:
    content = storage.read_json(storage.join(path, STATE))
    try:
        return TrainState(**content)
    except TypeError as e:
        raise CheckpointError(f"{path}: saved by another version of Manta ({e})") from None


def load_model_config(path: str) -> ModelConfig:
    return configs.from_dict(ModelConfig, storage.read_json(storage.join(path, CONFIG)))


def load_tokenizer(path: str) -> Tokenizer:
    return tokenizers.load(storage.join(path, tokenizers.FILE_NAME))


def load_model(path: str, device: torch.device | None = None) -> GPT:
    """The checkpoint's model, in eval mode.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are of another model.
    """
    verify(path, only=WEIGHTS)
    model = GPT(load_model_config(path))
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        file = storage.join(path, WEIGHTS)
        if storage.is_local(file):
            weights = load_file(storage.filesystem(file)[1])
        else:
            storage.download(file, Path(folder) / WEIGHTS)
            weights = load_file(Path(folder) / WEIGHTS)
    # A tied head is saved once, as the embedding.
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"head.weight"} if model.config.tie_embeddings else set()
    if unexpected or set(missing) - tied:
        names = ", ".join([*unexpected, *(set(missing) - tied)][:3])
        raise CheckpointError(f"{path}: {WEIGHTS} is not of the model in {CONFIG} ({names} ...)")
    return model.to(device or torch.device("cpu")).eval()


def find(run: str) -> list[str]:
    """The run's committed checkpoints, oldest first."""
    folder = storage.join(run, "checkpoints")
    names = [
        item.base_name
        for item in storage.list_files(folder, recursive=False)
        if item.type == pafs.FileType.Directory and item.base_name.startswith("step-")
    ]
    paths = [storage.join(folder, name) for name in names]
    return [path for path in paths if storage.exists(storage.join(path, MANIFEST))]


def latest(run: str) -> str | None:
    """The newest checkpoint whose files are all there and whole; damaged ones are named and
    skipped."""
    for path in reversed(find(run)):
        try:
            verify(path)
            return path
        except CheckpointError as e:
            print(f"skipping a damaged checkpoint: {e}", flush=True)
    return None


def resolve(checkpoint: str, home: str) -> str:
    """The checkpoint that a person names: a run's name or folder (its newest), or a checkpoint's.

    Raises:
        CheckpointError: there is none.
    """
    runs = storage.join(home, "runs")
    for folder in (storage.join(runs, checkpoint), storage.absolute(checkpoint)):
        if storage.exists(storage.join(folder, MANIFEST)):
            return folder
        found = latest(folder)
        if found is not None:
            return found
    names = [item.base_name for item in storage.list_files(runs, recursive=False)]
    names = [name for name in names if find(storage.join(runs, name))]
    there = f"runs with one: {', '.join(names)}" if names else f"no run under {runs} has one yet"
    raise CheckpointError(
        f"checkpoint={checkpoint}: no checkpoint there; give a run's name or a folder ({there})"
    )


def verify(path: str, only: str | None = None) -> None:
    """Checks size and sha256 of the files (or of one) against the manifest.

    Raises:
        CheckpointError: naming the file that is missing or differs.
    """
    for name, entry in _files(path).items():
        if only is None or name == only:
            file = storage.join(path, name)
            storage.check_file(file, entry["size"], entry["sha256"], CheckpointError)


def prune(run: str, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, each from its manifest on: one that is half
    deleted does not look whole."""
    for path in find(run)[:-keep]:
        storage.delete_file(storage.join(path, MANIFEST))
        storage.delete_folder(path)


def _files(path: str) -> dict[str, dict[str, Any]]:
    try:
        return storage.read_json(storage.join(path, MANIFEST))["files"]
    except (DataError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path}: not a whole checkpoint ({e})") from None


def _staging_folder(final: str, rank: int) -> Path:
    """Where a rank writes before its files take their place: on the same disk when that is local,
    so that moving costs nothing."""
    if storage.is_local(final):
        return Path(storage.filesystem(final)[1]) / f".rank-{rank}"
    return Path(tempfile.mkdtemp(prefix="manta-"))


def _move(file: Path, path: str) -> None:
    if storage.is_local(path):
        file.replace(storage.filesystem(path)[1])
    else:
        storage.upload(file, path)
