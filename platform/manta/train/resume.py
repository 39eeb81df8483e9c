"""Checks whether a run can start, can resume, or has nothing left to do."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from manta import config as configs
from manta import layout, storage
from manta.data import mixture, stream
from manta.data import order as orders
from manta.data.manifest import Manifest
from manta.errors import CheckpointError, ConfigError
from manta.model.gpt import ModelConfig
from manta.text.tokenizer import Tokenizer
from manta.train import kinds
from manta.train.checkpoints import checkpoint
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.plan import order_of
from manta.train.settings import PretrainConfig
from manta.train.step.schedule import Extension, lr_at, warmup_steps


def is_finished(c: PretrainConfig, path: str) -> bool:
    """Whether the run whose newest checkpoint is at `path` has nothing left to do."""
    state = checkpoint.load_state(path)
    if state.data.get("tokens_per_batch") != c.tokens_per_batch:
        return False  # the steps had another size: `check_resumable` refuses that
    return state.step >= c.total_steps or (state.stopped_early and c.eval.patience is not None)


def check_tokenizer(path: str, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if the weights at `path` were trained with another tokenizer than this one
    or one that it extends."""
    theirs = checkpoint.load_tokenizer(path)
    if theirs.sha256 != tokenizer.sha256 and not tokenizer.extends(theirs):
        raise ConfigError(
            f"init.checkpoint={path} has the tokenizer {theirs.name}, the data has "
            f"{tokenizer.name}: set data.tokenizer={storage.join(path, layout.ENCODING)}, and "
            "another data.name="
        )


def check_enough_data(c: PretrainConfig, datasets: tuple[Manifest, ...]) -> None:
    """Raises DataError if the datasets hold less than one batch."""
    order_of(c, datasets)


def data_identity(c: PretrainConfig, datasets: tuple[Manifest, ...]) -> dict[str, Any]:
    """The values that decide which tokens each step reads and learns. They stay the same for a
    whole run."""
    return {
        "order": orders.version(c.stages, c.sequence_length),
        "seed": c.seed,
        "seq_len": c.sequence_length,
        "tokens_per_batch": c.tokens_per_batch,
        "batch_ramp": {str(size): until for size, until in c.batch_ramp.items()},
        "packing": c.data.packing,
        "document_mask": c.document_mask,
        "tokenizer": datasets[0].tokenizer_sha256,
        "mix": mixture.shares(datasets, c.data.phases(c.sequence_length)),
        **kinds.identity(datasets),
    }


def val_sample(c: PretrainConfig, datasets: tuple[Manifest, ...]) -> dict[str, int]:
    """The number of val targets that are measured, by identity of the val split."""
    wanted, length = c.val_tokens(len(datasets)), c.sequence_length
    return {
        mixture.identity(manifest, "val"): stream.val_targets(
            sum(shard.tokens for shard in manifest.split("val")), wanted, length
        )
        for manifest in datasets
    }


def with_sample(
    state: TrainState, sample: dict[str, int], say: Callable[[str], None]
) -> TrainState:
    """The state of a run that measures val loss on this sample from now on. If its val losses so
    far are of another sample, a line says so, and none of them counts as the best any more."""
    if state.val_sample != sample and state.best_val_loss is not None:
        say(
            f"val loss is of another sample of the val split than before step {state.step}: now of "
            f"{sum(sample.values()):,} tokens spread evenly over it (eval.tokens). The two are not "
            "comparable, so the search for the best val loss begins again"
        )
        state = dataclasses.replace(state, val_loss=None, best_val_loss=None, evals_since_best=0)
    return dataclasses.replace(state, val_sample=sample)


def with_length(
    c: PretrainConfig, state: TrainState, peak: float, say: Callable[[str], None]
) -> TrainState:
    """The state of a run that has this config's length from now on. A line says if the learning
    rate, with its peak at `peak`, is no longer what it would have been."""
    step, was, length = state.step, state.total_steps, c.total_steps
    extension = state.extension
    if was and was != length:
        extension = None
        if c.schedule.extend == "continue" and state.lr is not None:
            warmup = warmup_steps(was, c.schedule, state.extension)
            extension = Extension(step, state.lr / peak, warmup)
    if state.lr is not None and 0 < step < length:
        before, after = (lr_at(at, length, peak, c.schedule, extension) for at in (step - 1, step))
        how = f"the learning rate goes from {state.lr:.2e} (step {step}) to {after:.2e}"
        jumps = not math.isclose(before, state.lr, rel_tol=1e-6)
        if was != length:
            other = "; schedule.extend=continue goes on from where it is" if jumps else ""
            say(
                f"the run ends at step {length} instead of {was}: {how} "
                f"(schedule.extend={c.schedule.extend}{other})"
            )
        elif jumps:
            say(f"the config has another schedule or peak than before: {how}")
    return dataclasses.replace(state, total_steps=length, extension=extension)


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
    if c.schedule.extend == "continue" and state.step and not state.total_steps:
        raise CheckpointError(
            f"schedule.extend=continue: {path} was saved by an earlier version, which did not keep "
            "how long the run was to be; use schedule.extend=rewarm"
        )
