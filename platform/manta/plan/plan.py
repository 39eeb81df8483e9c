"""`plan`: what a run will take, as lines to read and as a tree that stays with the run."""

import contextlib
import dataclasses
import math
from typing import Any

from manta import config as configs
from manta import layout, storage
from manta.data import manifest as manifests
from manta.data.manifest import Manifest
from manta.errors import ConfigError, MantaError
from manta.model.cost import flops_per_token, parameters
from manta.model.memory import ALLOWANCE, Setup
from manta.model.shape import ModelConfig
from manta.plan import calibration, duration, expected_loss, prices, show, speed
from manta.plan.machines import Machine, machine_of
from manta.plan.probe import Probed, probe
from manta.plan.settings import PlanConfig, run_of
from manta.train import earlier
from manta.train.build import WORTH_COMPILING_SECONDS, compiles
from manta.train.fitting import Verdict, largest_micro_batch, verdict
from manta.train.plan import from_weights, with_vocabulary
from manta.train.records import planned
from manta.train.resume import check_enough_data
from manta.train.settings import PretrainConfig, memory_setup
from manta.train.step.device import GPU_PEAKS


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan: the tree of plan.json, the lines to read, and whether the run can work."""

    tree: dict[str, Any]
    lines: list[str]
    can_run: bool


def plan(c: PlanConfig) -> Planned:
    """The plan of the config's run. Nothing is written.

    Raises:
        MantaError: a file that the plan needs cannot be used, or nothing can be planned without
            what is missing.
    """
    asked = run_of(c)
    machine = machine_of(c, asked)
    run = _with_room(asked, machine)
    home = run.home_folder
    started = from_weights(run, None)
    datasets, doubts = _datasets(run, home)
    model = _model(started, datasets)
    problems = _problems(asked, run, machine, datasets)
    setup = _setup(started, model, machine)
    found = verdict(run, setup, machine.usable, machine.most_workers)
    if found.fits is False:
        problems.append(f"memory: {found.problem}")
    probed = None
    if c.probe and not problems:
        probed = probe(dataclasses.replace(started, init=run.init), model, c.probe)
    quick, why = _speed(c, run, setup, machine, home, probed)
    tree = {
        **planned.header(run.name, configs.to_dict(asked), calibration.now()),
        "problems": problems,
        "unknown": [*machine.unknown, *doubts, *([why] if quick is None else [])],
        "model": _of_model(run, model, setup),
        "machine": _of_machine(machine, run),
        "memory": _of_memory(machine, found, probed),
        "tokens": run.tokens_before(run.total_steps),
    }
    loss = expected_loss.expected(home, c.law, model, run.tokens_before(run.total_steps))
    tree["loss"], tree["law"] = loss.loss, loss.why
    tree["probe"] = probed and dataclasses.asdict(probed)
    kept = duration.saves(run, setup, _write_speed(home) if machine.is_here else None)
    tree["checkpoints"] = {**dataclasses.asdict(kept), "kept_bytes": kept.kept_bytes}
    tree["peak_memory_bytes"] = _measurable(machine, found, probed, kept.copied)
    _add_time(tree, c, run, setup, machine, quick, kept, datasets)
    return Planned(tree, show.lines(tree), not problems)


def _with_room(run: PretrainConfig, machine: Machine) -> PretrainConfig:
    """The run with as many workers as there is room for, if that is fewer than it asks for: of
    num_workers=[fewest, most] it starts with so many. The batch divides by them."""
    room = machine.most_workers
    if room is None or run.most_workers <= room:
        return run
    fitting = [
        n for n in range(1, room + 1) if not dataclasses.replace(run, num_workers=n).problems()
    ]
    return dataclasses.replace(run, num_workers=max(fitting, default=1))


def keep(c: PlanConfig, made: Planned) -> str:
    """Writes the plan where the run's start finds it; returns the path."""
    path = layout.plan_file(c.home_folder, c.name)
    with storage.writing(path, "free some space there, or give another home="):
        storage.write_json(path, made.tree)
    return path


def _datasets(run: PretrainConfig, home: str) -> tuple[tuple[Manifest, ...], list[str]]:
    """The datasets of the run that are there, and what is not known without those that are not."""
    try:
        names = run.data.datasets if run.data.mix else [run.data.dataset_name]
    except MantaError as e:
        return (), [f"the dataset: {e}"]
    found = []
    for name in names:
        path = layout.dataset_folder(home, name)
        if not manifests.exists(path):
            size = run.expected_model.vocab_size
            return (), [
                f"the dataset {name} is not there yet: a vocabulary of {size:,} ids is assumed"
            ]
        found.append(manifests.load(path))
    return tuple(found), []


def _model(c: PretrainConfig, datasets: tuple[Manifest, ...]) -> ModelConfig:
    """The model with its vocabulary."""
    if not datasets:
        return c.expected_model
    tokenizer = datasets[0].load_tokenizer()
    return with_vocabulary(c.model, tokenizer, extending=c.init.checkpoint is not None)


def _problems(
    asked: PretrainConfig, run: PretrainConfig, machine: Machine, datasets: tuple[Manifest, ...]
) -> list[str]:
    """Why the run cannot work as `asked`, apart from its memory, each with what would; the rest of
    the plan is of `run`, for which there is room."""
    found = []
    if run.most_workers < asked.fewest_workers:
        found.append(
            f"num_workers={asked.fewest_workers} with gpus_per_worker={run.gpus_per_worker}: there "
            f"is room for {machine.most_workers}; set num_workers={run.most_workers}, which is "
            "planned here, or take more machines"
        )
    if not machine.is_here and not run.gpus_per_worker:
        found.append("the cluster has GPUs, and gpus_per_worker=0 leaves them idle: set it to 1")
    if datasets:
        try:
            check_enough_data(run, datasets)
        except MantaError as e:
            found.append(str(e))
    return found


def _setup(run: PretrainConfig, model: ModelConfig, machine: Machine) -> Setup:
    """What decides a worker's memory, with the micro batch that the run will take."""
    setup = memory_setup(run, model, machine.dtype, machine.kind, _is_compiled(run, model, machine))
    if run.micro_batch_size != "auto":
        return dataclasses.replace(setup, micro_batch_size=run.micro_batch)
    size = min(run.micro_batches)
    if machine.usable is not None:
        with contextlib.suppress(ConfigError):  # not even one fits, as the verdict will say
            size = largest_micro_batch(run, setup, machine.usable)
    return dataclasses.replace(setup, micro_batch_size=size)


def _is_compiled(run: PretrainConfig, model: ModelConfig, machine: Machine) -> bool:
    counted = dataclasses.replace(run, num_workers=run.most_workers)
    if machine.computes is not None:
        return compiles(counted, model, machine.computes)
    if run.compile != "auto" or run.zero_stage == 3 or machine.peak is None:
        return run.compile == "blocks"
    flops = flops_per_token(model, run.sequence_length, run.trainable, run.lora)
    seconds = flops * run.total_tokens / run.most_workers / machine.peak
    return seconds > WORTH_COMPILING_SECONDS[machine.kind]


def _speed(
    c: PlanConfig,
    run: PretrainConfig,
    setup: Setup,
    machine: Machine,
    home: str,
    probed: Probed | None,
) -> tuple[speed.Speed | None, str]:
    """How fast the run is, by the best that is known: a probe, the calibration, a stated MFU. None,
    with what would tell, if nothing is known."""
    if probed is not None:
        return speed.of_probe(probed), ""
    if machine.is_here:
        found, why = speed.of_calibration(run, setup, machine, home)
        if found is not None:
            unused = f"; mfu={c.mfu:g} is not used" if c.mfu is not None else ""
            return dataclasses.replace(found, text=found.text + unused), ""
        if c.mfu is None:
            return None, f"the speed: {why}; or give probe=20"
    if c.mfu is None:
        return None, "the speed: give mfu=, such as 0.4 (bench/README.md has what was reached)"
    peak = machine.peak
    if machine.computes is not None:
        peak = machine.computes.peak
    if peak is None:
        return None, (
            f"the speed: no peak of {machine.device} in {machine.dtype} is known, of which "
            f"mfu={c.mfu:g} would be a share: give gpu=NAME, one of {', '.join(sorted(GPU_PEAKS))}"
        )
    return speed.of_mfu(run, setup, c.mfu, peak), ""


def _write_speed(home: str) -> float | None:
    """Bytes a second that this machine writes to the home's disk; None: nobody measured it here."""
    try:
        found = calibration.load(home)
    except MantaError:  # as the speed says
        return None
    return found.write_bytes_per_second if found else None


def _of_model(run: PretrainConfig, model: ModelConfig, setup: Setup) -> dict[str, Any]:
    tokens = run.tokens_before(run.total_steps)
    each = flops_per_token(model, run.sequence_length, run.trainable, run.lora)
    sequences = run.tokens_per_batch // run.sequence_length // run.most_workers
    return {
        "parameters": parameters(model).total,
        "flops_per_token": each,
        "flops": each * tokens,
        "steps": run.total_steps,
        "tokens": tokens,
        "tokens_per_batch": run.tokens_per_batch,
        "sequence_length": run.sequence_length,
        "micro_batch": setup.micro_batch_size,
        "grad_accum_steps": sequences // setup.micro_batch_size,
        "compiled": setup.compiled,
    }


def _of_machine(machine: Machine, run: PretrainConfig) -> dict[str, Any]:
    return {
        "device": machine.device,
        "dtype": machine.dtype,
        "workers": run.most_workers,
        "zero_stage": run.zero_stage,
        "instance": machine.instance,
        "nodes": _nodes(machine, run),
    }


def _nodes(machine: Machine, run: PretrainConfig) -> int | None:
    if machine.per_node is None:
        return None
    return math.ceil(run.most_workers * (run.gpus_per_worker or 1) / machine.per_node)


def _of_memory(machine: Machine, found: Verdict, probed: Probed | None) -> dict[str, Any]:
    costs = found.costs
    return {
        "peak_bytes": costs.peak,
        "device_bytes": machine.memory,
        "usable_bytes": machine.usable,
        "fits": found.fits,
        "parts": costs.parts(),
        "would_fit": [{"keys": way.keys, "peak_bytes": way.peak} for way in found.ways],
        "measured_bytes": probed and probed.peak_memory_bytes,
    }


def _measurable(machine: Machine, found: Verdict, probed: Probed | None, copied: int) -> int:
    """The peak as a run measures it: that of a GPU's tensors, or that of a whole process, which has
    what is only allowed for, and the copy that a save makes."""
    if machine.kind == "cuda":
        return probed.peak_memory_bytes if probed else found.costs.peak - ALLOWANCE
    return (probed.peak_memory_bytes if probed else found.costs.peak) + copied


def _add_time(
    tree: dict[str, Any],
    c: PlanConfig,
    run: PretrainConfig,
    setup: Setup,
    machine: Machine,
    quick: speed.Speed | None,
    kept: duration.Saves,
    datasets: tuple[Manifest, ...],
) -> None:
    """Adds speed, hours, goodput and the bill, as far as they are known."""
    nodes = _nodes(machine, run)
    rate: float | None
    if c.price_per_hour is not None:
        rate, rate_from = c.price_per_hour, "price_per_hour"
    elif machine.instance is not None and nodes is not None:
        rate, rate_from = prices.of(
            machine.listed, machine.instance, machine.region, machine.spot, nodes
        )
    else:
        rate, rate_from = None, "no price is known"
    tree["price_per_hour"], tree["price_from"] = rate, rate_from
    if quick is None:
        tree |= {"tokens_per_second": None, "hours": None, "train_hours": None, "dollars": None}
        return
    start, runs = earlier.start_seconds(run.home_folder) if machine.is_here else (None, 0)
    failures = c.failures_per_day + c.failures_per_device_day * run.most_workers
    tokens = run.eval.tokens
    if datasets:
        tokens = sum(min(run.val_tokens(len(datasets)), found.tokens("val")) for found in datasets)
    took = duration.duration(run, quick, kept, start, failures, tokens)
    rate_of_tokens = run.tokens_per_batch / quick.step_seconds
    tree["tokens_per_second"] = rate_of_tokens
    tree["hours"] = _finite(took.total / 3600)
    tree["train_hours"] = took.train / 3600
    tree["counts_start"] = start is not None
    tree["dollars"] = None if rate is None else _finite(rate * took.total / 3600)
    tree["time"] = {
        "source": quick.source,
        "from": quick.text,
        "step_seconds": quick.step_seconds,
        "train_seconds": took.train,
        "evaluation_seconds": took.evaluation,
        "evaluations": duration.evaluations(run),
        "sample_seconds": took.samples,
        "start_seconds": start,
        "start_from_runs": runs,
        "last_save_seconds": took.finish,
    }
    tree["goodput"] = {
        "expected": took.goodput if math.isfinite(took.total) else 0.0,
        "failures_per_day": failures,
        "saves_seconds": took.losses.saves,
        "lost_seconds": _finite(took.losses.lost),
        "restart_seconds": _finite(took.losses.restarts),
        "interval_seconds": took.interval,
        "best_interval_seconds": took.best_interval,
        "best_interval_from": "Daly 2006 (first order: Young 1974)",
    }
    if machine.peak is not None:
        each = flops_per_token(setup.model, run.sequence_length, run.trainable, run.lora)
        tree["time"]["mfu"] = rate_of_tokens * each / machine.peak / run.most_workers


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
