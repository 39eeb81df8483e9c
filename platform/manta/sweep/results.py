"""What a sweep leaves behind: the ranking of its trials, and the best one as a config."""

import dataclasses
from typing import Any

from manta import config as configs
from manta import layout, storage
from manta.errors import SweepError
from manta.storage import HomeConfig
from manta.sweep.plan import Plan, Standing
from manta.sweep.settings import SweepConfig
from manta.sweep.space import shown
from manta.train.records.logbook import evaluations, read_metrics


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Trials, best first, and the best one as a config file for jobs/pretrain.py."""

    rows: list[dict[str, Any]]
    """A row for each trial: its settings by their keys (those of sweep.lr as lr), run, seed,
    tokens, val_loss and val_bpb; why, if it failed or diverged."""
    best_config: str
    replay_config: str | None = None
    """The schedule that pbt found, as a config for jobs/sweep.py."""

    def table(self) -> str:
        lines = ["rank  val loss  val bpb      tokens  run"]
        for rank, row in enumerate(self.rows, 1):
            figures = [f"{row[k]:.4f}" if row[k] is not None else "-" for k in FIGURES]
            end = f"  ({row['why']})" if row["why"] else ""
            lines.append(
                f"{rank:>4}  {figures[0]:>8}  {figures[1]:>7}  {row['tokens']:>10,}  {row['run']}"
                + end
            )
        return "\n".join(lines)


FIGURES = ("val_loss", "val_bpb")
SHORT = {"optimizer.lr": "lr"}


def conclude(plan: Plan) -> Ranking:
    """Writes ranking.json and best.yaml into the sweep's folder, and for pbt replay.yaml.

    Raises:
        SweepError: no trial ended well; the message has the first reason.
    """
    c, standings = plan.c, plan.standings()
    rows = [_row(plan, standing) for standing in standings]
    folder = layout.run_folder(c.home_folder, c.name)
    storage.write_json(storage.join(folder, layout.RANKING), rows)
    winner = plan.winner()
    if winner is None:
        first = next((s for s in _in_order(plan) if s.why), None)
        why = f"{first.trial.name}: {first.why}" if first else "no combination is possible"
        raise SweepError(f"no trial of sweep {c.name} ended well; {why}")
    best = winner.trial
    segment = [s for s in plan.segments if s.trial == best.name][-1]
    run = dataclasses.replace(
        plan.config_of(segment), home=_home(c), threads_per_worker=c.threads_per_worker
    )
    tree = configs.differences(run)
    for key in ("tokens_per_batch", "total_tokens"):
        tree[key] = getattr(run, key)
    tree["optimizer"] = {**tree.get("optimizer", {}), "lr": run.optimizer.lr}
    path = storage.join(folder, layout.BEST_CONFIG)
    storage.write_bytes(path, configs.to_yaml(tree).encode())
    return Ranking(rows, path, _write_replay(plan, best.name, folder))


def _write_replay(plan: Plan, best: str, folder: str) -> str | None:
    c = plan.c
    if c.sweep.scheduler != "pbt":
        return None
    tree = {**c.shared, "name": f"{c.name}-replay", "sweep": {"replay": plan.replay(best)}}
    tree["home"] = _home(c)
    path = storage.join(folder, layout.REPLAY_CONFIG)
    storage.write_bytes(path, configs.to_yaml(tree).encode())
    return path


def _home(c: SweepConfig) -> str | None:
    """The home as a config file keeps it: where it is the default one, it is left out, so that the
    file goes with a home that moves."""
    is_default = c.home_folder == HomeConfig().home_folder
    return None if is_default else c.home_folder


def _in_order(plan: Plan) -> list[Standing]:
    """The standings in the order in which the trials began."""
    starts = {s.trial: n for n, s in reversed(list(enumerate(plan.segments)))}
    return sorted(plan.standings(), key=lambda standing: starts.get(standing.trial.name, 0))


def _row(plan: Plan, standing: Standing) -> dict[str, Any]:
    trial = standing.trial
    settings = {SHORT.get(key, key): value for key, value in trial.settings.items()}
    run = layout.run_folder(plan.c.home_folder, trial.name)
    loss = standing.losses.get(standing.tokens)
    return {
        **settings,
        "run": trial.name,
        "seed": trial.seed,
        "tokens": standing.tokens,
        "val_loss": loss,
        "val_bpb": _bits(run, loss) if loss is not None else None,
        "why": standing.why,
    }


def _bits(run: str, loss: float) -> float | None:
    """The bits per byte of the evaluation with this val loss."""
    records = read_metrics(storage.join(run, layout.METRICS))
    found = [r for r in evaluations(records, 1 << 62) if r["val_loss"] == loss]
    bits = found[-1].get("val_bpb") if found else None
    return None if bits is None else float(bits)


def passed_over(plan: Plan) -> list[str]:
    """Lines about the combinations that no run can have."""
    return [f"passed over: {shown(name)}: {why}" for name, why in plan.passed_over.items()]
