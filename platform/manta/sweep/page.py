"""A sweep as one web page: what it found, its ranking and pictures, what it cost, and which trials
were passed over, failed, or copied from which. It loads nothing from elsewhere."""

import dataclasses
from collections.abc import Iterator, Sequence

from manta import config as configs
from manta import layout, storage
from manta.report import page as pages
from manta.report.facts import Files
from manta.report.private import without_places
from manta.report.sections import RESULT, Section
from manta.sweep import extending
from manta.sweep.findings import Finding
from manta.sweep.naming import words
from manta.sweep.pictures import pictures
from manta.sweep.plan import Plan
from manta.sweep.rehearsal import cost, foreseen
from manta.sweep.results import Ranking, Table
from manta.sweep.space import shown
from manta.terminal import visible
from manta.train.records.logbook import duration

MOST_ROWS = 200  # of a table; more are in ranking.json
LONGEST = 300  # characters of a reason
HOME = "HOME is the folder of all runs, ~/manta unless the sweep has another one."


def write(plan: Plan, ranking: Ranking) -> str:
    """Writes the page of a sweep that is over into its folder; returns its path."""
    path = storage.join(layout.run_folder(plan.c.home_folder, plan.c.name), layout.SWEEP_PAGE)
    storage.write_bytes(path, page(plan, ranking).encode())
    return path


def page(plan: Plan, ranking: Ranking) -> str:
    """The page. It depends on the files of the sweep and its runs alone: made again, it is the
    same."""
    found = ranking.findings
    c = plan.c
    files = Files(c.home_folder)
    sections = [_result(plan, files, found), _ranking(files, ranking.table), *_others(plan, files)]
    tree = without_places(extending.tree(dataclasses.replace(c, home=None)), c.home_folder)
    best = next(f for f in found if f.kind == "best")
    return pages.page(
        f"Sweep {visible(c.name)}",
        visible(f"{best.sentence[0].upper()}{best.sentence[1:]}."),
        [s for s in sections if s.said or s.rows or s.notes],
        pictures(plan),
        visible(configs.to_yaml({k: v for k, v in tree.items() if v is not None})).rstrip(),
        files.problems,
        HOME,
    )


def _result(plan: Plan, files: Files, found: Sequence[Finding]) -> Section:
    section = Section(RESULT)
    for finding in found:
        if finding.kind != "best":
            section.said.append((files.private(finding.sentence), _command(plan, finding.command)))
    return section


def _command(plan: Plan, command: str | None) -> str | None:
    """A command without the place of the home."""
    own = extending.command(plan.c)
    name = f"python jobs/sweep.py HOME/runs/{plan.c.name}/{layout.SWEEP_CONFIG}"
    return None if command is None else visible(command.replace(own, name, 1))


def _ranking(files: Files, table: Table) -> Section:
    section, rows = Section("Ranking", head=table.head), table.rows
    section.rows = [[files.private(cell) for cell in row] for row in rows[:MOST_ROWS]]
    if len(rows) > MOST_ROWS:
        section.notes.append(f"{len(rows) - MOST_ROWS:,} more are in {layout.RANKING}.")
    return section


def _others(plan: Plan, files: Files) -> Iterator[Section]:
    yield _cost(plan, files)
    yield _lineage(plan)
    failed = [s for s in plan.standings() if s.why]
    rows = [[s.trial.name, words(s.trial.settings), f"{s.why}"] for s in failed]
    yield _reasons("Trials that failed or diverged", ("run", "settings", "why"), rows, files)
    passed = [[shown(name), why] for name, why in plan.passed_over.items()]
    yield _reasons("Combinations that no run can have", ("trial", "why"), passed, files)


def _reasons(title: str, head: tuple[str, ...], rows: list[list[str]], files: Files) -> Section:
    section = Section(title, head=head)
    section.rows = [[files.private(cell)[:LONGEST] for cell in row] for row in rows[:MOST_ROWS]]
    if len(rows) > MOST_ROWS:
        section.notes.append(f"There are {len(rows) - MOST_ROWS:,} more.")
    return section


def _cost(plan: Plan, files: Files) -> Section:
    """What was told before the sweep, and what came of it."""
    section = Section("What it cost", head=("", "at most, told before", "in the end"))
    before, after = foreseen(plan.c, plan.lanes), cost(plan)
    section.rows = [
        ["trials", f"{before.trials:,}", f"{after.trials:,}"],
        ["tokens", f"{before.tokens:,}", f"{after.tokens:,}"],
        ["FLOPs", f"{before.flops:.3g}", f"{after.flops:.3g}"],
    ]
    spent = {"productive": 0.0, "all": 0.0}
    for name in {segment.trial: None for segment in plan.segments}:
        seconds = files.get(f"runs/{name}/{layout.GOODPUT}", "/seconds")
        for cause, value in seconds.items() if isinstance(seconds, dict) else ():
            if isinstance(value, int | float) and cause != "down":
                spent["all"] += value
                spent["productive"] += value if cause == "productive" else 0.0
    if spent["all"]:
        section.rows.append(["steps, in all lanes", "", duration(spent["productive"])])
        section.rows.append(["trials, in all lanes", "", duration(spent["all"])])
    return section


def _lineage(plan: Plan) -> Section:
    """The lineage of pbt: who was copied from whom, with the settings of what came after."""
    section = Section("Lineage", head=("from tokens", "run", "copied from", "went on with"))
    for segment in plan.segments:
        if segment.source is not None:
            place = [f"{segment.start:,}", segment.trial, segment.source]
            section.rows.append([*place, words(dict(segment.settings))])
    del section.rows[MOST_ROWS:]
    return section
