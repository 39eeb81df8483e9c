"""The loop inside Ray Train: what the driver checks, what each worker sets up, the summary."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer

from manta import cluster, storage
from manta import config as configs
from manta.data import mixture, stream
from manta.data import order as orders
from manta.data.manifest import Manifest
from manta.data.order import Order
from manta.errors import CheckpointError, ConfigError
from manta.model.gpt import GPT, ModelConfig, num_parameters
from manta.model.init import fit_bigrams, initialise
from manta.text.tokenizer import Tokenizer
from manta.train import checkpoint
from manta.train.build import build, compiles, micro_batch
from manta.train.checkpoint import TrainState
from manta.train.device import Device, available_cpus, find_device
from manta.train.logbook import METRICS, Logbook, duration, read_metrics
from manta.train.loop import Run, train
from manta.train.saver import Saver
from manta.train.settings import PretrainConfig


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. `finished_before`: it had already, and nothing was done."""

    folder: str
    checkpoint: str
    state: TrainState
    metrics: list[dict[str, Any]]
    finished_before: bool = False

    @property
    def last_eval(self) -> dict[str, Any]:
        return next((m for m in reversed(self.metrics) if "val_loss" in m), {})


def pretrain(
    c: PretrainConfig,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    callbacks: Callable[[], list[Any]] = list,
) -> Outcome:
    """Trains a model (or goes on training it) as the config says.

    Args:
        say: gets each line meant for a person.
        callbacks: makes Ray Train callbacks, in the process that runs this.

    Raises:
        MantaError: before anything has started, if it cannot work; nothing is half-written.
    """
    # The workers' environment and files may differ from ours.
    c = dataclasses.replace(c, home=c.home_folder, engine=c.engine.inlined())
    cluster.connect()
    cluster.require(c.num_workers, c.cpus_per_worker, c.gpus_per_worker, c.wait_seconds)
    path = checkpoint.latest(c.run_folder)  # once: it reads every file, to check its sha256
    if path is not None and c.resume == "never":
        raise ConfigError(
            f"resume=never, but the run {c.name} exists ({c.run_folder}): give another name=, "
            "delete the folder, or set resume=auto to go on with it"
        )
    if path is not None and is_finished(c, path):
        return outcome(c, path, finished_before=True)
    datasets = mixture.ready(c.data, c.home_folder, say)
    order_of(c, datasets)
    model = with_vocabulary(c.model, datasets[0].load_tokenizer())
    if path is not None:
        check_resumable(c, path, model, datasets)
    elif problems := c.init.conflicts(model):
        raise ConfigError(problems[0])
    storage.write_bytes(storage.join(c.run_folder, "config.yaml"), configs.to_yaml(c).encode())
    say(
        f"run {c.name}: {num_parameters(model) / 1e6:.1f}M parameters, {c.total_steps} steps of "
        f"{c.tokens_per_batch:,} tokens, {c.num_workers} worker(s), ZeRO stage {c.zero_stage}"
    )
    fit(worker, {"config": configs.to_dict(c), "datasets": datasets}, c, say, callbacks())
    path = checkpoint.latest(c.run_folder)
    assert path is not None, "a run that ends has saved"
    return outcome(c, path)


def is_finished(c: PretrainConfig, path: str) -> bool:
    """Whether the run whose newest checkpoint is at `path` has nothing left to do."""
    state = checkpoint.load_state(path)
    if state.data["tokens_per_batch"] != c.tokens_per_batch:
        return False  # steps of another size: `check_resumable` refuses them
    return state.step >= c.total_steps or (state.stopped_early and c.eval.patience is not None)


def with_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model for this tokenizer. Raises ConfigError when its own vocabulary is too small."""
    if model.vocab_size is not None and model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size} ids ({tokenizer.name}): omit it, or raise it"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or tokenizer.vocab_size)


def order_of(c: PretrainConfig, datasets: tuple[Manifest, ...]) -> Order:
    """Which tokens each step reads. Raises DataError when there are too few."""
    phases = c.data.phases(c.sequence_length)
    return mixture.make_order(datasets, phases, c.stages, c.seed, c.sequence_length)


def decisions(c: PretrainConfig, datasets: tuple[Manifest, ...]) -> dict[str, Any]:
    """What decides which tokens each step reads; a run keeps to it."""
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
    """Raises CheckpointError when the checkpoint is not of this model, tokenizer, data order or
    optimizer. It may be of another number of workers, or another ZeRO stage."""
    remedy = "use the run's own value, or give another name="
    saved, wanted = (configs.to_dict(m) for m in (checkpoint.load_model_config(path), model))
    for key in saved:
        if key not in ("preset", "depth") and saved[key] != wanted[key]:
            raise CheckpointError(
                f"{path} is of another model: its model.{key} is {saved[key]}, the config says "
                f"{wanted[key]}; {remedy}"
            )
    state = checkpoint.load_state(path)
    done = order_of(c, datasets).sequences_planned(state.step)
    was = {**state.data, "mix": mixture.so_far(state.data.get("mix", {}), done)}
    for key, value in decisions(c, datasets).items():
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


def worker(arguments: dict[str, Any], say: Callable[[str], None]) -> None:
    """One rank: sets up and runs the loop. Runs in Ray Train's worker process."""
    c = configs.from_dict(PretrainConfig, arguments["config"])
    datasets: tuple[Manifest, ...] = arguments["datasets"]
    tokenizer = datasets[0].load_tokenizer()
    model = with_vocabulary(c.model, tokenizer)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    path, state = _where_to_start(c)
    run = setup(c, datasets, tokenizer, model, state, path, rank, world_size, say)
    run.report = lambda metrics: ray.train.report(dict(metrics))
    if rank == 0:
        started = f"resuming at step {state.step} from {path}" if path else "starting"
        how = ", compiled" if state.compiled else ""
        say(
            f"{started} on {run.device.description}, {run.device.dtype}{how}, micro batches of "
            f"{state.micro_batch} sequences"
        )
    try:
        train(run)
    finally:
        run.saver.wait()
    if run.logbook is not None:
        run.logbook.close()


def setup(
    c: PretrainConfig,
    datasets: tuple[Manifest, ...],
    tokenizer: Tokenizer,
    model: ModelConfig,
    state: TrainState,
    path: str | None,
    rank: int,
    world_size: int,
    say: Callable[[str], None],
) -> Run:
    """Everything that the loop works on, for this rank, at the state's step: that of the checkpoint
    at `path`, if there is one."""
    threads = c.threads_per_worker or _share_of_cpus()
    if c.gpus_per_worker:
        torch.cuda.set_device(ray.train.torch.get_device())
    dtype = state.dtype or _agreed(find_device(c.dtype, bool(c.gpus_per_worker), threads).dtype)
    device = find_device(dtype, bool(c.gpus_per_worker), threads)
    c = _decided(c, model, device, state)
    may_skip = c.data.on_corrupt == "skip"
    best_fit = c.data.packing == "best_fit"
    reader = stream.Reader(datasets, order_of(c, datasets), rank, world_size, best_fit, may_skip)
    batches = stream.train_batches(
        reader, start=state.step, stop=c.total_steps, micro_batch_size=c.micro_batch, say=say
    )
    state.dtype, state.optimizer = dtype, c.optimizer.kind
    state.world_size, state.zero_stage = world_size, c.zero_stage
    state.data = decisions(c, datasets)
    state.datasets = [manifest.path for manifest in datasets]
    if path is None:
        fit = functools.partial(_fit_bigrams, c, reader, say)
        start = functools.partial(initialise, c=c.init, fit=fit)
    else:
        start = functools.partial(checkpoint.load_weights, path)
    engine = build(
        c,
        model,
        device,
        size=c.micro_batch,
        steps=c.grad_accum_steps(state.step),
        compiled=bool(state.compiled),
        start=start,
    )
    if path is not None:
        checkpoint.load_optimizer(path, engine)
    val = {
        manifest.name: stream.val_batches(
            manifest,
            tokens=max(1, c.eval.tokens // len(datasets)),
            seq_len=c.sequence_length,
            micro_batch_size=c.micro_batch,
            rank=rank,
            world_size=world_size,
        )
        for manifest in datasets
    }
    logbook = Logbook(c.run_folder, say, state.step) if rank == 0 else None
    saver = Saver(c.run_folder, c.checkpoint, model, tokenizer, say)
    return Run(
        c.run_folder, c, model, tokenizer, device, engine, saver, state, batches, val, logbook,
        log_fingerprint=c.data.log_fingerprint, may_skip=may_skip,
    )  # fmt: skip


def _fit_bigrams(
    c: PretrainConfig, reader: stream.Reader, say: Callable[[str], None], model: GPT
) -> None:
    """Embeddings and head as the counts of token pairs have them."""
    if not c.init.bigram_steps:
        return
    started = time.perf_counter()
    assert model.config.vocab_size is not None
    counts = torch.from_numpy(reader.count_pairs(model.config.vocab_size))
    threads = torch.get_num_threads()
    torch.set_num_threads(available_cpus())  # the other workers of this machine wait
    loss = fit_bigrams(model, counts, c.init)
    torch.set_num_threads(threads)
    say(
        f"embeddings and head fitted to {counts.sum() / 1e6:.1f}M pairs of tokens: loss "
        f"{loss:.4f} as a bigram model, {time.perf_counter() - started:.1f} s"
    )


def _decided(
    c: PretrainConfig, model: ModelConfig, device: Device, state: TrainState
) -> PretrainConfig:
    """The config with what the machine decides; a run keeps to what it was started with."""
    local = ray.train.get_context().get_local_world_size()
    if state.compiled is None or c.compile != "auto":
        state.compiled = _agreed(compiles(c, model, device))
    if c.micro_batch_size != "auto":
        state.micro_batch = c.micro_batch
    elif state.micro_batch not in c.micro_batches:
        # The least that any worker has room for.
        size = torch.tensor(micro_batch(c, model, device, local), device=device.torch_device)
        dist.all_reduce(size, op=dist.ReduceOp.MIN)
        state.micro_batch = int(size)
    return dataclasses.replace(c, micro_batch_size=state.micro_batch)


def _where_to_start(c: PretrainConfig) -> tuple[str | None, TrainState]:
    """The newest whole checkpoint, as rank 0 sees it: all ranks start from the same."""
    path = _agreed(checkpoint.latest(c.run_folder) if dist.get_rank() == 0 else None)
    state = checkpoint.load_state(path) if path else TrainState()
    state.stopped_early = False  # `finished` let us pass: the config no longer stops it
    return path, state


def _agreed(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _share_of_cpus() -> int:
    return max(1, available_cpus() // ray.train.get_context().get_local_world_size())


def fit(
    function: Callable[[dict[str, Any], Callable[[Any], None]], None],
    arguments: dict[str, Any],
    c: PretrainConfig,
    say: Callable[[Any], None],
    callbacks: list[Any],
) -> None:
    """Runs `function(arguments, say)` on c.num_workers Ray Train workers; what they say arrives
    here, as it is said.

    Raises:
        MantaError: the workers' own, if that is what ended them.
    """
    use_gpu = bool(c.gpus_per_worker)
    resources = {"CPU": c.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    records_filesystem, records = storage.filesystem(storage.join(c.home_folder, "ray"))
    with cluster.listening(say) as queue:
        trainer = TorchTrainer(
            _Worker(function, queue),
            train_loop_config=arguments,
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=c.num_workers, use_gpu=use_gpu, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                # Ray Train's own records; the run's are in its folder and do not depend on them.
                name=f"{c.name.replace('/', '-')}-{os.getpid()}-{time.time_ns()}",
                storage_path=records,
                storage_filesystem=records_filesystem,
                failure_config=ray.train.FailureConfig(
                    max_failures=c.max_failures,
                    controller_failure_limit=3,  # type: ignore[call-arg]  # Train V2's
                ),
                callbacks=callbacks,
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as e:
            raise cluster.cause_of(e) from None


class _Worker:
    """What Ray Train calls on each worker."""

    def __init__(self, function: Callable[..., None], queue: Any):
        self.function, self.queue = function, queue

    def __call__(self, arguments: dict[str, Any]) -> None:
        self.function(arguments, self.queue.put)


def outcome(c: PretrainConfig, path: str, finished_before: bool = False) -> Outcome:
    """How the run whose last checkpoint is at `path` ended."""
    metrics = read_metrics(storage.join(c.run_folder, METRICS))
    state = checkpoint.load_state(path)
    return Outcome(c.run_folder, path, state, metrics, finished_before)


def summary(c: PretrainConfig, done: Outcome) -> str:
    """What a person reads at the end."""
    state, last = done.state, done.last_eval
    tokens = c.tokens_before(state.step)
    lines = []
    if done.finished_before:
        why = "stopped early" if state.stopped_early else "is finished"
        lines.append(f"run {c.name} {why}, at step {state.step}; nothing was done")
    lines += [
        f"run          {done.folder}",
        f"checkpoint   {done.checkpoint}",
        f"trained      {state.step} steps, {tokens:,} tokens, {duration(state.train_seconds)}",
        f"val loss     {float(last.get('val_loss', 'nan')):.4f}   "
        f"bits per byte {float(last.get('val_bpb', 'nan')):.4f}",
        f"curve        {storage.join(done.folder, 'loss.png')}",
        f"tensorboard  tensorboard --logdir {storage.join(done.folder, 'tensorboard')}",
    ]
    config = storage.join(done.folder, "config.yaml")
    extend = f"total_tokens={2 * max(tokens, c.total_tokens)}"
    if state.stopped_early:
        extend += " eval.patience=null"
    lines += [
        f"next         python jobs/evaluate.py checkpoint={c.name}",
        f'             python jobs/generate.py checkpoint={c.name} prompt="..."',
        f"extend       python jobs/pretrain.py {config} {extend}",
        f"start anew   python jobs/pretrain.py {config} name=another-name",
    ]
    return "\n".join(lines)
