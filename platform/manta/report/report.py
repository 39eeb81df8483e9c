"""`report`: what was trained on what, and what came of it, as a page and as JSON."""

import dataclasses
from pathlib import Path
from typing import Any

from manta import config as configs
from manta import layout, ownership, storage
from manta.config import PositiveFloat, config
from manta.errors import CheckpointError
from manta.report import page
from manta.report.facts import Fact, Files
from manta.report.pictures import pictures
from manta.report.private import without_places
from manta.report.sections import ASKED, RESULT, TIME, Place, Section, sections
from manta.storage import HomeConfig
from manta.terminal import visible
from manta.train.checkpoints import checkpoint
from manta.train.records.logbook import read_metrics
from manta.train.settings import load_run_config

MOST_BYTES = 1_000_000  # of the page


@config
class ReportConfig(HomeConfig):
    run: str = "quickstart"
    """Name or folder of the run; its newest checkpoint is reported."""
    price_per_hour: PositiveFloat | None = None
    """Price of an hour of the machine or cluster, for the bill; null: there is none."""
    out: str | None = None
    """Path of the page, with report.json next to it; null: report.html in the run's folder."""
    overwrite: bool = False
    """Replace what an earlier report wrote at the given `out`, if it is still as written."""


@dataclasses.dataclass(frozen=True)
class Report:
    """A report: the page, and its facts as a tree for JSON."""

    page: str
    facts: dict[str, Any]
    lines: list[str]
    """The most important facts, for a terminal."""


def report(c: ReportConfig) -> tuple[Path, Report]:
    """Writes report.html and report.json of a run; returns the page's path and the report.

    Raises:
        MantaError: the run does not exist, or something of a person's is at `out`.
    """
    path = checkpoint.resolve(c.run, c.home_folder, "run")
    run = layout.split_checkpoint(path)[0]
    out = ownership.new_file(c.out, storage.join(run, layout.REPORT), c.overwrite or c.out is None)
    made = build(path, c.price_per_hour)
    facts = out.with_name(layout.REPORT_FACTS if c.out is None else f"{out.stem}.json")
    if c.out is not None:
        ownership.new_file(str(facts), str(facts), c.overwrite)
    with storage.writing(str(out), "free some space there, or give another out="):
        storage.write_bytes(str(out), made.page.encode())
        storage.write_json(str(facts), made.facts)
        if c.out is not None:
            ownership.record(out)
            ownership.record(facts)
    return out, made


def build(path: str, price_per_hour: float | None = None) -> Report:
    """The report of the checkpoint at `path` in a run. It depends on the files of the run and of
    its datasets alone: made again, it is the same.

    Raises:
        CheckpointError: the checkpoint is not in a run: there is nothing to tell about it.
    """
    run, step = layout.split_checkpoint(path)
    home, _, name = run.rpartition("/runs/")
    if not home or step == layout.OUTSIDE:
        raise CheckpointError(f"{path}: not in a run of a home; give the name of a run")
    files = Files(home)
    files.put(ASKED, {"asked": {"price_per_hour": price_per_hour}})
    at = Place(f"runs/{name}", step)
    found = list(sections(files, home, at))
    records = read_metrics(storage.join(run, layout.METRICS))
    made = page.page(
        visible(name),
        f"A report of its checkpoint {step}.",
        found,
        pictures(records, visible(name)),
        _config(run, home),
        files.problems,
    )
    facts = {
        "run": name,
        "checkpoint": step,
        "asked": {"price_per_hour": price_per_hour},
        "sections": [_tree(section) for section in found],
        "problems": files.problems,
    }
    lines = [f"{f.name:<36}{f.shown}" for s in found if s.title in (RESULT, TIME) for f in s.facts]
    return Report(made, facts, lines)


def _config(run: str, home: str) -> str:
    """The run's config where it differs from the defaults, without its places."""
    settings = load_run_config(run)
    if settings is None:
        return ""
    tree = configs.differences(dataclasses.replace(settings, home=None))
    return visible(configs.to_yaml(without_places(tree, home))).rstrip()


def _tree(section: Section) -> dict[str, Any]:
    """A section for JSON."""
    found: dict[str, Any] = {"title": section.title}
    if section.facts:
        found["facts"] = [_fact(fact) for fact in section.facts]
    if section.rows:
        found["head"] = list(section.head)
        found["rows"] = [
            [_fact(cell) if isinstance(cell, Fact) else cell for cell in row]
            for row in section.rows
        ]
    if section.notes:
        found["notes"] = section.notes
    return found


def _fact(fact: Fact) -> dict[str, Any]:
    return {
        "name": fact.name,
        "value": fact.value,
        "shown": fact.shown,
        "from": [{"file": source.file, "key": source.key} for source in fact.sources],
        "formula": fact.formula,
    }
