"""Sweeps learning rate x batch size with Ray Tune; each trial is a run of `pretrain` in a folder of
its own."""

import dataclasses
import math
import os
from typing import Any

from ray import tune

from manta import config as configs
from manta import failures, layout, ownership, storage
from manta.cluster import capacity, connection, nodes
from manta.data import mixture
from manta.errors import ClusterError
from manta.job import say
from manta.sweep.settings import SweepConfig
from manta.sweep.space import exact
from manta.train.checkpoints import checkpoint
from manta.train.pretrain import pretrain
from manta.train.resume import check_enough_data
from manta.train.settings import PretrainConfig

METRIC = "val_loss"


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Trials, best first, and the best one as a config file for jobs/pretrain.py."""

    rows: list[dict[str, Any]]
    best_config: str

    def table(self) -> str:
        lines = ["rank  lr        tokens/batch  val loss  val bpb      tokens  run"]
        for rank, row in enumerate(self.rows, 1):
            lines.append(
                f"{rank:>4}  {exact(row['lr']):<8}  {row['tokens_per_batch']:>12}  "
                f"{row['val_loss']:>8.4f}  {row['val_bpb']:>7.4f}  {row['tokens']:>10,}  "
                + row["run"]
            )
        return "\n".join(lines)


def sweep(c: SweepConfig) -> Ranking:
    """Runs every trial, ranks them by their last val loss and writes the best one's config.

    Trials that an earlier sweep of this name has finished are not run again.

    Raises:
        MantaError: before any trial starts, if the first one could not start.
    """
    c = dataclasses.replace(c, home=c.home_folder)
    connection.connect(name=c.name)
    runs = layout.runs_folder(c.home_folder)
    nodes.require_writable(runs)
    if not c.wait_seconds:  # (nodes that cost money are waited for when all else is right)
        _require_room(c)
    trials = c.trials()
    checkpoint.check_place(c.home_folder, trials[0].name)
    datasets = mixture.open_datasets(c.data, c.home_folder, say, c.wait_seconds)
    for trial in trials:
        check_enough_data(trial, datasets)
    _require_room(c)
    nodes.require(runs, mixture.files(datasets), bool(c.gpus_per_worker), say)
    at_once = c.sweep.max_concurrent or max(
        1, capacity.workers_that_fit(c.cpus_per_worker, c.gpus_per_worker) // c.most_workers
    )
    print(
        f"sweep {c.name}: {len(trials)} trials, {min(at_once, len(trials))} at a time", flush=True
    )
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    run = layout.run_folder(c.home_folder, c.name)
    with ownership.scratch(run, layout.RAY_RECORDS) as records:
        return rank(c, trials, _tune(c, trials, at_once, records))


def _tune(c: SweepConfig, trials: list[PretrainConfig], at_once: int, records: str) -> Any:
    """Tune's results of the trials. Its own records are in the folder `records` meanwhile.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGUSR1 came. Tune takes them to end with what there is, and
            unfinished trials would be ranked as if they were done.
    """
    lines = _Lines(len(trials))
    filesystem, folder = storage.filesystem(records)
    tuner = tune.Tuner(
        # The trial itself only waits, on the head node; its workers reserve what they need.
        tune.with_resources(_run_trial, {"node:__internal_head__": 0.001}),
        param_space={"trial": tune.grid_search([configs.to_dict(trial) for trial in trials])},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            max_concurrent_trials=at_once,
            scheduler=tune.schedulers.ASHAScheduler(
                time_attr="tokens",
                max_t=c.total_tokens + max(trial.tokens_per_batch for trial in trials),
                grace_period=max(1, c.total_tokens // 4),
                reduction_factor=2,
            )
            if c.sweep.scheduler == "asha"
            else None,
        ),
        run_config=tune.RunConfig(
            name=connection.plain_name(c.name),
            storage_path=folder,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[lines],
        ),
    )
    results = tuner.fit()
    if lines.ended < len(trials):
        raise KeyboardInterrupt
    return results


def _require_room(c: SweepConfig) -> None:
    cpus, gpus = c.cpus_per_worker, c.gpus_per_worker
    capacity.require(c.most_workers, cpus, gpus, c.wait_seconds, say)


def _run_trial(arguments: dict[str, Any]) -> None:
    """One trial, in Tune's process: a run of `pretrain` that reports to Tune as it evaluates."""
    from ray.tune.integration.ray_train import TuneReportCallback

    trial = configs.from_dict(PretrainConfig, arguments["trial"])
    done = pretrain(trial, say=lambda _: None, callbacks=lambda: [TuneReportCallback()])
    if done.finished_before:
        tune.report({key: done.last_eval[key] for key in (METRIC, "val_bpb", "tokens", "step")})


class _Lines(tune.Callback):
    """One line per evaluation of a trial."""

    def __init__(self, total: int):
        self._total = total
        self.ended = 0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        del iteration, trials, info  # Tune passes them by their names
        if METRIC in result:
            print(
                f"{_name(trial)} | step {result.get('step', 0):.0f} | "
                f"val loss {result[METRIC]:.4f} | val bpb {result.get('val_bpb', math.nan):.4f}",
                flush=True,
            )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        del iteration, trials, info  # Tune passes them by their names
        self.ended += 1
        print(f"{_name(trial)} done ({self.ended}/{self._total})", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        del iteration, trials, info  # Tune passes them by their names
        self.ended += 1
        print(f"{_name(trial)} FAILED ({self.ended}/{self._total})", flush=True)


def _name(trial: Any) -> str:
    return trial.config["trial"]["name"]


def rank(c: SweepConfig, trials: list[PretrainConfig], results: Any) -> Ranking:
    """Ranks the trials and writes the best config. Raises ClusterError if no trial ended well."""
    rows = []
    for result in results:
        if result.error is not None or METRIC not in (result.metrics or {}):
            continue
        trial = configs.from_dict(PretrainConfig, result.config["trial"])
        rows.append(
            {
                "lr": trial.optimizer.lr,
                "tokens_per_batch": trial.tokens_per_batch,
                "run": trial.name,
                **{key: result.metrics[key] for key in (METRIC, "val_bpb")},
                "tokens": int(result.metrics["tokens"]),
            }
        )
    if not rows:
        errors = [str(failures.cause_of(error)) for error in results.errors]
        raise ClusterError(f"no trial of sweep {c.name} ended well: {(errors or ['?'])[0][-2000:]}")
    # A loss that is not a number would break the order, so it ranks last.
    rows.sort(key=lambda row: (math.isnan(row[METRIC]), row[METRIC]))
    best = next(trial for trial in trials if trial.name == rows[0]["run"])
    best = dataclasses.replace(
        best, name=f"{c.name}-best", home=None, threads_per_worker=c.threads_per_worker
    )
    folder = layout.run_folder(c.home_folder, c.name)
    path = storage.join(folder, layout.BEST_CONFIG)
    tree = configs.differences(best)
    tree["tokens_per_batch"] = best.tokens_per_batch
    tree["optimizer"] = {**tree.get("optimizer", {}), "lr": best.optimizer.lr}
    storage.write_bytes(path, configs.to_yaml(tree).encode())
    storage.write_json(storage.join(folder, layout.RANKING), rows)
    return Ranking(rows, path)
