"""What a sweep leaves behind: the ranking of its trials, what it found, and the best trial as a
config."""

import dataclasses
from typing import Any

from manta import config as configs
from manta import layout, storage
from manta.errors import SweepError
from manta.sweep import compared, extending
from manta.sweep.compared import Group
from manta.sweep.findings import Finding, findings
from manta.sweep.naming import called, number
from manta.sweep.plan import Plan, Standing
from manta.sweep.space import shown
from manta.train.records.logbook import evaluations, read_metrics


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Trials, best first, and the best one as a config file for jobs/pretrain.py."""

    rows: list[dict[str, Any]]
    """A row for each trial: its settings by their keys (those of sweep.lr as lr), run, seed,
    tokens, val_loss and val_bpb; why, if it failed or diverged."""
    best_config: str
    table: "Table"
    findings: tuple[Finding, ...]
    replay_config: str | None = None
    """The schedule that pbt found, as a config for jobs/sweep.py."""

    @property
    def lines(self) -> list[str]:
        """What a person reads at the end of a sweep."""
        found = self.table.lines[: MOST_LINES + 1]
        if (left := len(self.table.rows) - MOST_LINES) > 0:
            found.append(f"and {left:,} more: {layout.RANKING} has all of them")
        for finding in self.findings:
            found += ["", finding.sentence] if finding.kind == "best" else [finding.sentence]
            found += [f"    {finding.command}"] if finding.command else []
        return found


MOST_LINES = 50  # of the table that is printed
SHORT = {"optimizer.lr": "lr"}


@dataclasses.dataclass(frozen=True)
class Table:
    """The settings of a sweep, the best first, in words."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def lines(self) -> list[str]:
        every = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*every, strict=True)]
        return ["  ".join(map(str.rjust, row[:-1], widths[:-1])) + f"  {row[-1]}" for row in every]


def table(groups: list[Group]) -> Table:
    """A row for each settings, with the mean over its seeds. Those that failed come last, and say
    why."""
    is_repeated = any(len(group.standings) > 1 for group in groups)
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    head = ("rank", *map(called, keys), "val loss", *(["seeds"] if is_repeated else []))
    rows = []
    for rank, group in enumerate(groups, 1):
        values = [number(group.settings[k]) if k in group.settings else "-" for k in keys]
        seeds = [f"{len(group.standings)}"] if is_repeated else []
        end = group.name + (f"  ({_failure(group)})" if group.why else "")
        tokens = f"{group.tokens:,}"
        rows.append((f"{rank}", *values, _loss(group, is_repeated), *seeds, tokens, end))
    return Table((*head, "tokens", "run"), tuple(rows))


def _loss(group: Group, is_repeated: bool) -> str:
    if not group.tokens:
        return "-"
    loss = group.loss
    error = f" ± {loss.error:.4f}" if loss.count > 1 else "         " if is_repeated else ""
    return f"{loss.value:.4f}{error}"


def _failure(group: Group) -> str:
    bad = [s for s in group.standings if s.why]
    of = f"{len(bad)} of {len(group.standings)} seeds: " if len(group.standings) > 1 else ""
    return f"{of}{group.why}"


def conclude(plan: Plan) -> Ranking:
    """Writes into the sweep's folder: ranking.json, findings.json, sweep.yaml, best.yaml, and for
    pbt replay.yaml.

    Raises:
        SweepError: no trial ended well; the message has the first reason.
    """
    c, standings = plan.c, plan.standings()
    rows = [_row(plan, standing) for standing in standings]
    folder = layout.run_folder(c.home_folder, c.name)
    storage.write_json(storage.join(folder, layout.RANKING), rows)
    _write_config(storage.join(folder, layout.SWEEP_CONFIG), extending.tree(c))
    winner = plan.winner()
    if winner is None:
        first = next((s for s in _in_order(plan) if s.why), None)
        why = f"{first.trial.name}: {first.why}" if first else "no combination is possible"
        raise SweepError(f"no trial of sweep {c.name} ended well; {why}")
    best = winner.trial
    segment = [s for s in plan.segments if s.trial == best.name][-1]
    run = dataclasses.replace(
        plan.config_of(segment), home=extending.home(c), threads_per_worker=c.threads_per_worker
    )
    tree = configs.differences(run)
    for key in ("tokens_per_batch", "total_tokens"):
        tree[key] = getattr(run, key)
    tree["optimizer"] = {**tree.get("optimizer", {}), "lr": run.optimizer.lr}
    path = storage.join(folder, layout.BEST_CONFIG)
    _write_config(path, tree)
    found = findings(plan)
    storage.write_json(storage.join(folder, layout.FINDINGS), _tree(plan, found))
    replay = _write_replay(plan, best.name, folder)
    return Ranking(rows, path, table(compared.groups(plan)), tuple(found), replay)


def _write_config(path: str, tree: dict[str, Any]) -> None:
    storage.write_bytes(path, configs.to_yaml(tree).encode())


def _tree(plan: Plan, found: list[Finding]) -> dict[str, Any]:
    """The findings for JSON."""
    trees = [finding.tree for finding in found]
    return {"sweep": plan.c.name, "total_tokens": plan.c.total_tokens, "findings": trees}


def _write_replay(plan: Plan, best: str, folder: str) -> str | None:
    c = plan.c
    if c.sweep.scheduler != "pbt":
        return None
    tree = {**c.shared, "name": f"{c.name}-replay", "sweep": {"replay": plan.replay(best)}}
    tree["home"] = extending.home(c)
    path = storage.join(folder, layout.REPLAY_CONFIG)
    _write_config(path, tree)
    return path


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
