"""A whole run, as the process that a person starts sees it: checks, workers, the summary."""

import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from manta import config as configs
from manta import layout, ownership, storage
from manta.cluster import capacity, connection, nodes
from manta.data import mixture
from manta.data.manifest import Manifest
from manta.errors import ConfigError
from manta.lock import lock
from manta.model.cost import learning
from manta.model.families import num_parameters
from manta.model.gpt import ModelConfig
from manta.monitor.settings import AlertsConfig
from manta.monitor.watch import Watched, watching
from manta.train import rollbacks
from manta.train.checkpoints import checkpoint
from manta.train.checkpoints.checkpoint import CheckpointConfig, TrainState
from manta.train.faults.stopping import ask_for_time
from manta.train.kinds import check_kind
from manta.train.plan import from_weights, with_vocabulary
from manta.train.records import history, ledger, planned
from manta.train.records.logbook import duration, evaluations, read_metrics
from manta.train.resume import (
    check_enough_data,
    check_resumable,
    check_tokenizer,
    check_what_learns,
    is_finished,
)
from manta.train.settings import PretrainConfig, save_run_config
from manta.train.supervise import Supervisor


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. `finished_before`: it had ended already, and nothing was done. `stopped_by`:
    the signal that stopped it before its end; it resumes when it is started again."""

    folder: str
    checkpoint: str
    state: TrainState
    metrics: list[dict[str, Any]]
    finished_before: bool = False
    stopped_by: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal that stopped the run, as shells report it, else 0."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by

    @property
    def last_eval(self) -> dict[str, Any]:
        """The newest evaluation up to the checkpoint; {} if there is none."""
        return next(reversed(evaluations(self.metrics, self.state.step)), {})


@contextmanager
def no_companion(_c: PretrainConfig) -> Iterator[Callable[[], None]]:
    """The default companion: nothing runs next to the run."""
    yield lambda: None


def pretrain(
    c: PretrainConfig,
    say: Callable[[str], None],
    callbacks: Callable[[], list[Any]] = list,
    beside: Callable[[PretrainConfig], AbstractContextManager[Callable[[], None]]] = no_companion,
    datasets: tuple[Manifest, ...] | None = None,
) -> Outcome:
    """Trains a model, or resumes its training, as the config says.

    Args:
        say: receives each line meant for a person.
        callbacks: makes Ray Train callbacks, in the process that calls `pretrain`.
        beside: a context that is open while the run trains; its value is called if the run reaches
            its end.
        datasets: what `mixture.open_datasets` returned for the config, if they are open already.

    Raises:
        MantaError: the run cannot work; raised before anything starts, with nothing half-written.
    """
    started = time.time()
    # The workers' environment and files may differ from ours.
    alerts, c = c.alerts, dataclasses.replace(c, alerts=c.alerts.without_webhook())
    c = dataclasses.replace(c, home=c.home_folder, engine=c.engine.inlined())
    connection.connect(name=c.name)
    runs = layout.runs_folder(c.home_folder)
    checkpoint.check_place(c.home_folder, c.name)
    nodes.require_writable(runs)
    if not c.wait_seconds:  # (nodes that cost money are waited for when all else is right)
        _require_room(c, say)
    path = start_of(c)
    if path is not None and is_finished(c, path):
        return outcome(c, path, finished_before=True)
    given, c = c, from_weights(c, path)
    if datasets is None:
        datasets = mixture.open_datasets(c.data, c.home_folder, say, c.wait_seconds)
    model = check(c, path, datasets, say)
    _require_room(c, say)
    nodes.require(runs, mixture.files(datasets), bool(c.gpus_per_worker), say)
    save_run_config(c)
    if path is None:
        planned.adopt(c.home_folder, c.name, c.run_folder, configs.to_dict(given), say)
    learnt = sum(w.total for w in learning(model, c.trainable, c.lora)) / 1e6
    is_whole = c.trainable == "all" and c.lora.rank is None
    say(
        f"run {c.name}: {num_parameters(model) / 1e6:.1f}M parameters"
        f"{'' if is_whole else f', of which {learnt:.2f}M learn'}, {c.total_steps} steps of "
        f"{c.tokens_per_batch:,} tokens, {c.most_workers} worker(s), ZeRO stage {c.zero_stage}"
    )
    if time_to_stop := ask_for_time(c.checkpoint.every):
        say(time_to_stop)
    with (
        held(c, started, say),
        watching(watched(c, alerts), say) as watch,
        beside(c) as finish,
    ):
        stopped_by = Supervisor(c, datasets, say, callbacks, watch=watch).run()
        history.note(
            c.run_folder,
            "stopped" if stopped_by else "ended",
            step=layout.step_of(checkpoint.newest(c.run_folder)),
            **({"signal": stopped_by.name} if stopped_by else {}),
        )
        if stopped_by is None:
            finish()
    path = checkpoint.newest(c.run_folder)
    return dataclasses.replace(outcome(c, path), stopped_by=stopped_by)


def start_of(c: PretrainConfig) -> str | None:
    """The checkpoint that the run starts from: its newest whole one, or None. Slow for a large one,
    as it reads all files.

    Raises:
        MantaError: resume=never, or what is in the run's folder is not Manta's or damaged.
    """
    ownership.refuse_links(c.run_folder, layout.RUN_NAMES)
    path = checkpoint.latest(c.run_folder, say=print)
    if path is not None and c.resume == "never":
        raise ConfigError(
            f"resume=never, but the run {c.name} exists ({c.run_folder}): give another name=, "
            "delete the folder, or set resume=auto to resume it"
        )
    rollbacks.passed_over(c.run_folder)  # so that a damaged file is said now
    return path


def check(
    c: PretrainConfig, path: str | None, datasets: tuple[Manifest, ...], say: Callable[[str], None]
) -> ModelConfig:
    """The model of a run that starts from its checkpoint at `path`, with its vocabulary. `c` is
    what `from_weights` made of the config.

    Raises:
        MantaError: the run cannot start from there, or not learn from these datasets.
    """
    check_kind(c, datasets)
    check_enough_data(c, datasets)
    tokenizer = datasets[0].load_tokenizer()
    model = with_vocabulary(c.model, tokenizer, extending=c.init.checkpoint is not None)
    if path is not None:
        check_resumable(c, path, model, datasets)
    elif c.init.checkpoint is not None:
        check_tokenizer(c.init.checkpoint, tokenizer)
        check_what_learns(c, model, tokenizer)
        say(f"starting from the weights of {c.init.checkpoint}")
    elif problems := c.init.conflicts(model):
        raise ConfigError(problems[0])
    return model


@contextmanager
def held(c: PretrainConfig, started: float, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the run for this process, whose work on it began at `started`, while its workers train.
    Raises DataError if another process has it."""
    with lock(storage.join(c.run_folder, layout.RUN_LOCK), f"run {c.name}", say):
        ownership.remove_scratch(c.run_folder, layout.RAY_RECORDS)
        ledger.begin(c.run_folder, started)
        history.note(c.run_folder, "command", **history.command())
        yield


def watched(c: PretrainConfig, alerts: AlertsConfig) -> Watched:
    """The run as what watches it sees it. `alerts` has the webhook, which is not in the config."""
    return Watched(
        c.name,
        c.home_folder,
        alerts,
        c.track,
        configs.to_dict(c),
        functools.partial(_seconds_between_saves, c.checkpoint),
    )


def _seconds_between_saves(
    c: CheckpointConfig, step_seconds: float, tokens_per_second: float
) -> float | None:
    """Seconds between checkpoints as the config has it; None for every_minutes=auto alone."""
    found = [c.every * step_seconds] if c.every else []
    if c.every_tokens and tokens_per_second:
        found.append(c.every_tokens / tokens_per_second)
    if isinstance(c.every_minutes, float):
        found.append(60 * c.every_minutes)
    return min(found, default=None)


def _require_room(c: PretrainConfig, say: Callable[[str], None]) -> None:
    cpus, gpus = c.cpus_per_worker, c.gpus_per_worker
    capacity.require(c.fewest_workers, cpus, gpus, c.wait_seconds, say)


def outcome(c: PretrainConfig, path: str, finished_before: bool = False) -> Outcome:
    """How the run whose last checkpoint is at `path` ended."""
    metrics = read_metrics(storage.join(c.run_folder, layout.METRICS))
    state = checkpoint.load_state(path)
    return Outcome(c.run_folder, path, state, metrics, finished_before)


def summary(c: PretrainConfig, done: Outcome) -> str:
    """The lines that a person reads at the end of a run."""
    config = storage.join(done.folder, layout.RUN_CONFIG)
    lines = [
        *results(c, done),
        f"next         python jobs/evaluate.py checkpoint={c.name}",
        f'             python jobs/generate.py checkpoint={c.name} prompt="..."',
    ]
    if done.stopped_by is None:
        extend = f"total_tokens={2 * max(c.tokens_before(done.state.step), c.total_tokens)}"
        if done.state.stopped_early:
            extend += " eval.patience=null"
        lines.append(f"extend       python jobs/pretrain.py {config} {extend}")
    else:
        lines.append(f"resume       python jobs/pretrain.py {config}")
    lines.append(f"start over   python jobs/pretrain.py {config} name=another-name")
    return "\n".join(lines)


def results(c: PretrainConfig, done: Outcome) -> list[str]:
    """The lines about a run that do not depend on the job that started it."""
    state = done.state
    tokens = c.tokens_before(state.step)
    lines = []
    if done.finished_before:
        why = "stopped early" if state.stopped_early else "is finished"
        lines.append(f"run {c.name} {why}, at step {state.step}; nothing was done")
    if done.stopped_by is not None:
        lines.append(f"run {c.name} stopped at step {state.step}; the same command resumes it")
    return [
        *lines,
        f"run          {done.folder}",
        f"checkpoint   {done.checkpoint}",
        f"trained      {state.step} steps, {tokens:,} tokens, {duration(state.train_seconds)}",
        *_losses(done),
        *ledger.table(done.folder),
        *planned.line(done.folder),
        f"curve        {storage.join(done.folder, layout.LOSS_CURVE)}",
        f"tensorboard  tensorboard --logdir {storage.join(done.folder, layout.TENSORBOARD)}",
    ]


def _losses(done: Outcome) -> list[str]:
    """The line of the newest evaluation, which says its step if the run went on since; [] if
    nothing was evaluated."""
    last = done.last_eval
    if not last:
        return []
    at = f" (step {last['step']})" if last["step"] != done.state.step else ""
    names = {"val_bpb": "bits per byte", "val_accuracy": "accuracy", "val_macro_f1": "macro F1"}
    there = {name: last[key] for key, name in names.items() if last.get(key) is not None}
    more = "".join(f"   {name} {float(value):.4f}" for name, value in there.items())
    return [f"val loss     {float(last['val_loss']):.4f}{at}{more}"]
