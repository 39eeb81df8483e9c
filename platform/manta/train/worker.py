"""One rank of a run, in Ray Train's worker process: sets up and runs the loop."""

import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from manta import config as configs
from manta import layout, storage
from manta.data import stream
from manta.data.manifest import Manifest
from manta.messages import Decided, mailbox
from manta.model.gpt import GPT, ModelConfig
from manta.model.init import fit_bigrams, initialise
from manta.text.tokenizer import Tokenizer
from manta.train import rollbacks
from manta.train.build import build, compiles, micro_batch, slow_attention
from manta.train.checkpoints import checkpoint
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.checkpoints.saver import Saver
from manta.train.faults.signals import Asked, Moving, Signals, sigterm
from manta.train.faults.spikes import Detector, Found
from manta.train.faults.watchdog import Watchdog
from manta.train.loop import train
from manta.train.records.gauges import gauges
from manta.train.records.ledger import Ledger
from manta.train.records.logbook import Logbook
from manta.train.resume import data_identity, order_of, with_vocabulary
from manta.train.run import Interrupted, Rollback, Run
from manta.train.settings import PretrainConfig
from manta.train.step.device import Device, available_cpus, find_device, make_deterministic


def worker(arguments: dict[str, Any], say: Callable[[str | Decided], None]) -> None:
    """One rank: sets up and runs the loop, and again where the run has to go back. Runs in Ray
    Train's worker process."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    c = configs.from_dict(PretrainConfig, arguments["config"])
    c = dataclasses.replace(c, num_workers=world_size)
    requested: list[Asked] = []
    if rank == 0 and arguments["requests"] is not None:
        mailbox(arguments["requests"], requested.append)
    with sigterm() as told_to_go:
        sources = [told_to_go, lambda: max(requested, default=Asked.NOTHING)]
        while found := _until_rollback(c, arguments["datasets"], rank, say, sources):
            if rank == 0:
                rollbacks.go_back(c.run_folder, c.spikes, found, say)
            dist.barrier()
            gc.collect()  # the engine that was: there is no room for two


def _until_rollback(
    c: PretrainConfig,
    datasets: tuple[Manifest, ...],
    rank: int,
    say: Callable[[str | Decided], None],
    sources: list[Callable[[], Asked]],
) -> Found | None:
    """Trains from the newest checkpoint to the end, or until it is told to stop; or what was found,
    if the run has to go back. Raises Moving when it is saved, and to go on in another process."""
    tokenizer = datasets[0].load_tokenizer()
    model = with_vocabulary(c.model, tokenizer)
    path, state = _where_to_start(c, say)
    run = setup(c, datasets, tokenizer, model, state, path, rank, c.workers, say)
    run.passed_over = rollbacks.passed_over(c.run_folder)
    run.signals.sources += sources
    run.signals.shared = _preempted
    run.report = lambda metrics: ray.train.report(dict(metrics))
    if rank == 0:
        say(_beginning(run, path))
    try:
        train(run)
    except Interrupted as e:
        if Asked.STOP not in e.asked:
            raise Moving(f"a worker's machine is to go: saved at step {run.state.step}") from None
    except Rollback as e:
        return e.found
    finally:
        run.close()
    return None


def _beginning(run: Run, path: str | None) -> str:
    state = run.state
    started = f"resuming at step {state.step} from {path}" if path else "starting"
    workers = f"{run.config.workers} workers, each " if run.config.workers > 1 else ""
    how = ", compiled" if state.compiled else ""
    return (
        f"{started} on {workers}{run.device.description}, {run.device.dtype}{how}, micro batches "
        f"of {state.micro_batch} sequences"
    )


def _preempted() -> Asked:
    """Ray knows of nodes that are about to go."""
    return Asked.NOTHING if ray.train.get_preemption_info() is None else Asked.MOVE


def setup(
    c: PretrainConfig,
    datasets: tuple[Manifest, ...],
    tokenizer: Tokenizer,
    model: ModelConfig,
    state: TrainState,
    path: str | None,
    rank: int,
    world_size: int,
    say: Callable[[str | Decided], None],
) -> Run:
    """Everything that the loop works on, for this rank, at the state's step: that of the checkpoint
    at `path`, if there is one."""
    threads = c.threads_per_worker or _share_of_cpus()
    if c.deterministic:
        make_deterministic()
    if c.gpus_per_worker:
        torch.cuda.set_device(ray.train.torch.get_device())
    device = find_device(state.dtype or c.dtype, bool(c.gpus_per_worker), threads)
    dtype = _agreed(device.dtype)
    if dtype != device.dtype:
        device = find_device(dtype, bool(c.gpus_per_worker), threads)
    c = _decided(c, model, device, state)
    if rank == 0:
        say(Decided(c.micro_batch))
    may_skip = c.data.on_corrupt == "skip"
    best_fit = c.data.packing == "best_fit"
    reader = stream.Reader(datasets, order_of(c, datasets), rank, world_size, best_fit, may_skip)
    batches = stream.train_batches(
        reader, start=state.step, stop=c.total_steps, micro_batch_size=c.micro_batch, say=say
    )
    state.dtype, state.optimizer = dtype, c.optimizer.kind
    state.world_size, state.zero_stage = world_size, c.zero_stage
    state.data = data_identity(c, datasets)
    state.datasets = [manifest.path for manifest in datasets]
    if path is None and c.init.checkpoint is not None:
        start = functools.partial(checkpoint.load_weights, c.init.checkpoint)
    elif path is None:
        fit = functools.partial(_fit_bigrams, c, reader, say)
        start = functools.partial(initialise, c=c.init, fit=fit)
    else:
        start = functools.partial(checkpoint.load_weights, path)
    if rank == 0 and (problem := slow_attention(c, model, device)):
        say(problem)
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
    logbook = None
    if rank == 0:
        logbook = Logbook(c.run_folder, say, state.step, gauges(c.name))
    lost_seconds = logbook.lost_seconds if logbook else 0.0
    ledger = Ledger(c.run_folder if rank == 0 else None, lost_seconds)
    watchdog = Watchdog(c.hang_seconds, functools.partial(_keep_stacks, c, rank, say))
    saver = Saver(c.run_folder, c.checkpoint, model, tokenizer, say, watchdog.beat)
    return Run(
        c.run_folder, c, model, tokenizer, device.probed_again(), engine, saver, state, batches,
        val, logbook, ledger, Detector(c.spikes, state.spikes), Signals([saver.asked]), watchdog,
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
        most = micro_batch(c, model, device, local, bool(state.compiled))
        size = torch.tensor(most, device=device.torch_device)
        dist.all_reduce(size, op=dist.ReduceOp.MIN)
        state.micro_batch = int(size)
    return dataclasses.replace(c, micro_batch_size=state.micro_batch)


def _keep_stacks(c: PretrainConfig, rank: int, say: Callable[[str], None], stacks: str) -> None:
    path = storage.join(c.run_folder, layout.STACKS, f"{time.time_ns()}-rank-{rank:05d}.txt")
    say(f"rank {rank} has made no progress for {c.hang_seconds:g} s: its stacks are in {path}")
    storage.write_bytes(path, stacks.encode())


def _where_to_start(c: PretrainConfig, say: Callable[[str], None]) -> tuple[str | None, TrainState]:
    """The newest whole checkpoint, as rank 0 sees it: all ranks start from the same."""
    path = None
    if dist.get_rank() == 0:
        path = checkpoint.latest(c.run_folder, set_aside=True, say=say)
        checkpoint.remove_unfinished(c.run_folder)
    path = _agreed(path)
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
