"""Checks whether a run can start, can resume, or has nothing left to do."""

from typing import Any

from manta import config as configs
from manta import layout, storage
from manta.data import mixture
from manta.data import order as orders
from manta.data.manifest import Manifest
from manta.errors import CheckpointError, ConfigError
from manta.model.gpt import ModelConfig
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint
from manta.train.plan import order_of
from manta.train.settings import PretrainConfig


def is_finished(c: PretrainConfig, path: str) -> bool:
    """Whether the run whose newest checkpoint is at `path` has nothing left to do."""
    state = checkpoint.load_state(path)
    if state.data.get("tokens_per_batch") != c.tokens_per_batch:
        return False  # the steps had another size: `check_resumable` refuses that
    return state.step >= c.total_steps or (state.stopped_early and c.eval.patience is not None)


def check_tokenizer(path: str, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if the weights at `path` were trained with another tokenizer."""
    theirs = checkpoint.load_tokenizer(path)
    if theirs.sha256 != tokenizer.sha256:
        raise ConfigError(
            f"init.checkpoint={path} has the tokenizer {theirs.name}, the data has "
            f"{tokenizer.name}: set data.tokenizer={storage.join(path, layout.ENCODING)}, and "
            "another data.name="
        )


def check_enough_data(c: PretrainConfig, datasets: tuple[Manifest, ...]) -> None:
    """Raises DataError if the datasets hold less than one batch."""
    order_of(c, datasets)


def data_identity(c: PretrainConfig, datasets: tuple[Manifest, ...]) -> dict[str, Any]:
    """The values that decide which tokens each step reads; they stay the same for a whole run."""
    return {
        "order": orders.VERSION,
        "seed": c.seed,
        "seq_len": c.sequence_length,
        "tokens_per_batch": c.tokens_per_batch,
        "batch_ramp": {str(size): until for size, until in c.batch_ramp.items()},
        "packing": c.data.packing,
        "document_mask": c.document_mask,
        "tokenizer": datasets[0].tokenizer_sha256,
        "mix": mixture.shares(datasets, c.data.phases(c.sequence_length)),
    }


def check_resumable(
    c: PretrainConfig, path: str, model: ModelConfig, datasets: tuple[Manifest, ...]
) -> None:
    """Raises CheckpointError if the checkpoint has another model, tokenizer, data order, dtype or
    optimizer. It may come from another number of workers or another ZeRO stage."""
    remedy = "use the run's own value, or give another name="
    saved, wanted = (configs.to_dict(m) for m in (checkpoint.load_model_config(path), model))
    for key in saved:
        if key not in ("preset", "depth") and saved[key] != wanted[key]:
            raise CheckpointError(
                f"{path} has another model: its model.{key} is {saved[key]}, the config says "
                f"{wanted[key]}; {remedy}"
            )
    state = checkpoint.load_state(path)
    done = order_of(c, datasets).sequences_planned(state.step)
    was = {**state.data, "mix": mixture.so_far(state.data.get("mix", {}), done)}
    for key, value in data_identity(c, datasets).items():
        value = mixture.so_far(value, done) if key == "mix" else value
        if was.get(key) != value:
            where = ", ".join(manifest.path for manifest in datasets)
            raise CheckpointError(
                f"{path} was trained with another {key} ({was.get(key)}; the config and "
                f"{where} give {value}): its place in the data would be lost; {remedy}"
            )
    if c.dtype not in ("auto", state.dtype):
        raise CheckpointError(
            f"{path} was trained in {state.dtype}, the config says dtype={c.dtype}; {remedy}"
        )
    if state.optimizer != c.optimizer.kind:
        raise CheckpointError(
            f"{path} holds the state of {state.optimizer or 'an earlier version'}, the config says "
            f"optimizer.kind={c.optimizer.kind}; {remedy}"
        )
