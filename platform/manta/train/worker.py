"""One rank of a run, in Ray Train's worker process: sets up the training loop and runs it."""

import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from manta import config as configs
from manta import layout, storage
from manta.cluster import nodes, spot
from manta.data import stream
from manta.data.manifest import Manifest
from manta.messages import Decided, Hanging, Logged, WentBack, mailbox
from manta.model.gpt import LanguageModel, ModelConfig
from manta.model.init import initialise
from manta.monitor.metrics import Metrics
from manta.text.tokenizer import Tokenizer
from manta.train import rollbacks
from manta.train.build import build, compiles, micro_batch, slow_attention
from manta.train.checkpoints import checkpoint
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.checkpoints.saver import Saver
from manta.train.faults.signals import Asked, Moving, Signals, sigterm, warned
from manta.train.faults.spikes import Anomaly, Detector
from manta.train.faults.watchdog import Watchdog
from manta.train.inputs import open_data
from manta.train.kept import Kept
from manta.train.kinds import objective_of
from manta.train.loop import train
from manta.train.peak_memory import PeakMemory
from manta.train.plan import with_vocabulary
from manta.train.ranks import Rank, agreed
from manta.train.records import history
from manta.train.records.ledger import Ledger
from manta.train.records.logbook import Logbook
from manta.train.resume import data_identity, val_sample, with_length, with_sample
from manta.train.run import Interrupted, Rollback, Run
from manta.train.settings import PretrainConfig
from manta.train.step.device import Device, available_cpus, find_device, make_deterministic


def worker(arguments: dict[str, Any], say: Callable[[Any], None]) -> None:
    """Sets up the loop and runs it on one rank; does so again whenever the run has to go back. Runs
    in Ray Train's worker process."""
    rank = Rank.here()
    c = configs.from_dict(PretrainConfig, arguments["config"])
    require_shared(c.run_folder, arguments["files"], rank)
    requested: list[Asked] = []
    if rank.is_first and arguments["requests"] is not None:
        mailbox(arguments["requests"], requested.append)
    with from_outside(rank, say) as sources:
        sources.append(lambda: max(requested, default=Asked.NOTHING))
        train_run(c, arguments["datasets"], rank, sources, say, report=_report)


@contextlib.contextmanager
def from_outside(rank: Rank, say: Callable[[str], None]) -> Iterator[list[Callable[[], Asked]]]:
    """What asks this rank to save or to move, from outside of Manta: SIGTERM, and a warning of the
    cloud, which one rank of each machine hears."""
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(sigterm())]
        if rank.local_rank == 0:
            sources.append(stack.enter_context(warned(spot.warning, say)))
        yield sources


def train_run(
    c: PretrainConfig,
    datasets: tuple[Manifest, ...],
    rank: Rank,
    sources: list[Callable[[], Asked]],
    say: Callable[[Any], None],
    until: int | None = None,
    kept: Kept | None = None,
    report: Callable[[dict[str, float]], None] = lambda _: None,
) -> None:
    """Trains a run from its newest checkpoint to its end, to step `until`, or until one of the
    `sources` asks to stop; goes back to before each loss spike. `kept`: what this process has kept
    of the runs before. `report` is called with each evaluation's metrics, on every rank.

    Raises:
        Diverged: the run has gone back as often as it may (on all ranks).
        Moving: the run is saved and has to continue in another process.
    """
    kept = kept or Kept()
    while anomaly := _until_rollback(c, datasets, rank, sources, say, until, kept, report):
        problem = None
        if rank.is_first:
            try:
                rollbacks.go_back(c.run_folder, c.spikes, anomaly, say)
                say(WentBack(anomaly.why))
            except rollbacks.Diverged as e:
                problem = str(e)
        problem = agreed(problem)  # no rank waits for one that has given up
        gc.collect()  # frees the old engine, as there is no room for two
        if problem is not None:
            raise rollbacks.Diverged(problem)


def require_shared(folder: str, files: dict[str, int], rank: Rank) -> None:
    """Raises ClusterError unless this rank sees the driver's files and what rank 0 writes into the
    folder, and rank 0 what this rank writes. The driver asked each node, but another one may have
    come since."""
    with nodes.marked(folder) if rank.is_first else contextlib.nullcontext() as mark:
        asked = nodes.Look(agreed(mark), files)
        nodes.refuse(nodes.look(asked, f"rank-{rank.rank}"))
        dist.barrier()
        if rank.is_first:
            ranks = [f"rank-{n}" for n in range(rank.world_size)]
            if missing := nodes.unseen(asked.mark or "", ranks):
                nodes.refuse(f"does not see what {missing[0]} writes: {nodes.SHARE}")
        dist.barrier()


def _until_rollback(
    c: PretrainConfig,
    datasets: tuple[Manifest, ...],
    rank: Rank,
    sources: list[Callable[[], Asked]],
    say: Callable[[Any], None],
    until: int | None,
    kept: Kept,
    report: Callable[[dict[str, float]], None],
) -> Anomaly | None:
    """Trains from the newest checkpoint to the end or to step `until`, or until told to stop, and
    returns None. If the run has to go back, returns the anomaly that was found. Raises Moving if
    the run is saved and has to continue in another process."""
    path = _where_to_start(c, say)
    run = setup(
        c,
        datasets,
        path,
        rank,
        signals=Signals(sources, shared=preempted),
        say=say,
        kept=kept,
        until=until,
        report=report,
    )
    if rank.is_first:
        say(_beginning(run, path))
        _note_start(run, path)
    try:
        train(run)
    except Interrupted as e:
        if Asked.STOP not in e.asked:
            raise Moving(f"a worker's machine is leaving: saved at step {run.state.step}") from None
    except Rollback as e:
        return e.anomaly
    finally:
        run.close()
    return None


def _report(metrics: dict[str, float]) -> None:
    """Gives an evaluation's metrics to Ray Train. It fetches them every two seconds, and a second
    report waits until the first is fetched: a lane, whose runs may be as short, reports nothing."""
    ray.train.report(dict(metrics))


def _beginning(run: Run, path: str | None) -> str:
    state = run.state
    started = f"resuming at step {state.step} from {path}" if path else "starting"
    workers = f"{run.config.workers} workers, each " if run.config.workers > 1 else ""
    how = ", compiled" if state.compiled else ""
    return (
        f"{started} on {workers}{run.device.description}, {run.device.dtype}{how}, micro batches "
        f"of {state.micro_batch} sequences"
    )


def _note_start(run: Run, path: str | None) -> None:
    device = run.device
    history.note(
        run.folder,
        "started",
        step=run.state.step,
        resumed_from=path and layout.split_checkpoint(path)[1],
        workers=run.config.workers,
        zero_stage=run.config.zero_stage,
        device=device.description,
        dtype=device.dtype,
        peak_flops=device.peak,
        compiled=bool(run.state.compiled),
        micro_batch=run.state.micro_batch,
    )


def preempted() -> Asked:
    """Asks to move if Ray has announced that a node is about to leave."""
    return Asked.NOTHING if ray.train.get_preemption_info() is None else Asked.MOVE


def setup(
    c: PretrainConfig,
    datasets: tuple[Manifest, ...],
    path: str | None,
    rank: Rank,
    *,
    signals: Signals,
    say: Callable[[Any], None],
    kept: Kept,
    until: int | None = None,
    report: Callable[[dict[str, float]], None] = lambda _: None,
) -> Run:
    """Everything that the loop works on, for this rank, at the step of the checkpoint at `path`; at
    the start if that is None."""
    tokenizer = datasets[0].load_tokenizer()
    model = with_vocabulary(c.model, tokenizer, extending=c.init.checkpoint is not None)
    state = checkpoint.load_state(path) if path else TrainState()
    c, device, compiled = decide(c, model, state, rank)
    if rank.is_first:
        say(Decided(c.micro_batch))
        if problem := slow_attention(c, model, device):
            say(problem)
    state = dataclasses.replace(
        state,
        stopped_early=False,  # `is_finished` let it pass: the config no longer stops it
        dtype=device.dtype,
        optimizer=c.optimizer.kind,
        trainable=c.trainable,
        compiled=compiled,
        micro_batch=c.micro_batch,
        world_size=rank.world_size,
        zero_stage=c.zero_stage,
        data=data_identity(c, datasets),
        datasets=[manifest.path for manifest in datasets],
    )
    speak = say if rank.is_first else lambda _: None
    state = with_sample(state, val_sample(c, datasets), speak)
    objective = objective_of(c, datasets, tokenizer)
    data = open_data(c, datasets, objective, range(state.step, until or c.total_steps), rank, say)
    memory = PeakMemory(device.torch_device)
    engine = start_engine(c, model, device, state, path, tokenizer, data.reader, say, kept)
    state = with_length(c, state, engine.set_lr(1.0), speak)
    ledger: Ledger

    def tell(records: Sequence[dict[str, Any]]) -> None:
        say(Logged([*records], ledger.seconds, ledger.starts))

    logbook = open_logbook(c.run_folder, rank, say, state.step, tell)
    ledger = Ledger(c.run_folder if rank.is_first else None, logbook.lost_seconds if logbook else 0)
    watchdog = Watchdog(c.hang_seconds, functools.partial(_keep_stacks, c, rank.rank, say))
    return Run(
        folder=c.run_folder,
        config=c,
        model=model,
        objective=objective,
        tokenizer=tokenizer,
        device=device.probed_again(),
        engine=engine,
        saver=Saver(c.run_folder, c.checkpoint, model, tokenizer, say, watchdog.beat, c.lora),
        state=state,
        batches=data.batches,
        val=data.val,
        logbook=logbook,
        ledger=ledger,
        detector=Detector(c.spikes, state.spikes),
        signals=signals,
        watchdog=watchdog,
        passed_over=rollbacks.passed_over(c.run_folder),
        pause_at=until,
        report=report,
        publish=Metrics(c.name, rank.rank).publish,
        log_fingerprint=c.data.log_fingerprint,
        may_skip=data.reader.skip_corrupt,
        memory=memory,
    )


def open_logbook(
    run: str,
    rank: Rank,
    say: Callable[[str], None],
    step: int,
    publish: Callable[[Sequence[dict[str, Any]]], None],
) -> Logbook | None:
    """The logbook from `step` on, if this rank is the one that speaks and writes for all."""
    return Logbook(run, say, step, publish) if rank.is_first else None


def decide(
    c: PretrainConfig, model: ModelConfig, state: TrainState, rank: Rank
) -> tuple[PretrainConfig, Device, bool]:
    """Decides what depends on the machines, the same on all ranks. Returns the config with the
    number of workers and the size of a micro batch, this rank's device, and whether the blocks are
    compiled. A run keeps the decisions that it was started with, which are in `state`."""
    c = dataclasses.replace(c, num_workers=rank.world_size)
    if c.deterministic:
        make_deterministic()
    if c.gpus_per_worker:
        torch.cuda.set_device(ray.train.torch.get_device())
    threads = c.threads_per_worker or max(1, available_cpus() // rank.local_world_size)
    device = find_device(state.dtype or c.dtype, bool(c.gpus_per_worker), threads)
    dtype = agreed(device.dtype)
    if dtype != device.dtype:
        device = find_device(dtype, bool(c.gpus_per_worker), threads)
    compiled = state.compiled
    if compiled is None or c.compile != "auto":
        compiled = agreed(compiles(c, model, device))
    size = state.micro_batch
    if c.micro_batch_size != "auto":
        size = c.micro_batch
    elif size not in c.micro_batches:
        # The size must fit the worker with the least memory.
        share = float(c.gpus_per_worker or 1)
        most = micro_batch(c, model, device, rank.local_world_size, bool(compiled), share)
        least = torch.tensor(most, device=device.torch_device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        size = int(least)
    return dataclasses.replace(c, micro_batch_size=size), device, bool(compiled)


def start_engine(
    c: PretrainConfig,
    model: ModelConfig,
    device: Device,
    state: TrainState,
    path: str | None,
    tokenizer: Tokenizer,
    reader: stream.Reader,
    say: Callable[[str], None],
    kept: Kept,
) -> Any:
    """Builds an engine with the weights and the optimizer's state of the checkpoint at `path`. If
    that is None, the run starts from the weights of `init.checkpoint`, or from new ones."""
    start: Callable[[LanguageModel], None]
    if path is not None:
        start = functools.partial(checkpoint.load_weights, path)
    elif c.init.checkpoint is not None:
        start = functools.partial(checkpoint.load_weights_for, c.init.checkpoint, tokenizer)
    else:
        threads = torch.get_num_threads()
        fit = functools.partial(kept.fit, c=c.init, reader=reader, threads=threads, say=say)
        start = functools.partial(initialise, c=c.init, fit=fit)
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
    return engine


def _keep_stacks(c: PretrainConfig, rank: int, say: Callable[[Any], None], stacks: str) -> None:
    path = storage.join(c.run_folder, layout.STACKS, f"{time.time_ns()}-rank-{rank:05d}.txt")
    say(Hanging(rank, c.hang_seconds or 0.0, path))
    storage.write_bytes(path, stacks.encode())


def _where_to_start(c: PretrainConfig, say: Callable[[str], None]) -> str | None:
    """The newest whole checkpoint, as rank 0 sees it, so that all ranks start from the same one."""
    path = None
    if dist.get_rank() == 0:
        path = checkpoint.latest(c.run_folder, set_aside=True, say=say)
        checkpoint.remove_unfinished(c.run_folder)
    return agreed(path)
