"""Compares runs: budgets, losses, scores, and which differences are more than noise."""

from collections.abc import Iterator, Mapping, Sequence

from manta import layout, ownership, plot, storage
from manta.config import Count, PositiveFloat, config
from manta.errors import ConfigError
from manta.evaluate.differences import differences, nearest
from manta.evaluate.entries import Entry, entry, published, sources
from manta.storage import HomeConfig
from manta.terminal import aligned
from manta.train.checkpoints import checkpoint as checkpoints

MOST_RUNS = 12


@config
class CompareConfig(HomeConfig):
    runs: tuple[str, ...] = ()
    """Names or folders of runs; empty: every run that has a checkpoint."""
    price_per_hour: PositiveFloat | None = None
    """Price of an hour of the machine or cluster, for `cost`; null: `cost` is not shown."""
    references: bool = True
    """Show published figures too, with their sources."""
    limit: Count | None = None
    """Compare the scores of evaluations with this limit=; null: of whole evaluations."""
    out: str | None = None
    """Path of the picture; null: compare.png in the home's folder of runs."""
    overwrite: bool = False
    """Replace what an earlier comparison wrote at the given `out`, if it is still as written."""


def compare(c: CompareConfig) -> tuple[list[str], str]:
    """The lines to show, and the picture's path.

    Raises:
        MantaError: a run does not exist or is named twice, or the picture cannot be made at its
            path.
    """
    home = c.home_folder
    names = list(c.runs) or checkpoints.names_of_runs(home)
    if not names:
        raise checkpoints.not_found("runs=[]", home)
    if len(names) > MOST_RUNS:
        raise ConfigError(
            f"{len(names)} runs are too many to read: name up to {MOST_RUNS}, runs=[a,b]"
        )
    overwrite = c.overwrite or c.out is None
    default = storage.join(layout.runs_folder(home), layout.COMPARISON)
    out = ownership.new_file(c.out, default, overwrite)
    paths = _paths(names, home)
    runs = [entry(n, paths[n], c.price_per_hour, c.limit) for n in names]
    references = published() if c.references else []
    apart = [*other_data(runs), *older_losses(runs)]
    lines = [*table(runs), *apart]
    if found := list(differences(runs, losses=not apart)):
        lines += ["", *found]
    if references:
        known = {key for run in runs for key in run.scores}
        shown = [r for r in references if known & r.scores.keys()] or references
        lines += ["", "published", *table(shown), *sources(shown), "", *nearest(runs, shown)]
    with storage.writing(str(out), "free some space there, or give another out="):
        storage.write_bytes(str(out), picture(runs, references))
        if c.out is not None:
            ownership.record(out)
    return [line.rstrip() for line in lines], str(out)


def _paths(names: Sequence[str], home: str) -> dict[str, str]:
    """The checkpoint that each name means. Raises MantaError if one does not exist, or two are the
    same."""
    paths: dict[str, str] = {}
    for name in names:
        path = checkpoints.resolve(name, home, "runs")
        first = next((other for other, theirs in paths.items() if theirs == path), None)
        if first is not None or name in paths:
            raise ConfigError(
                f"runs: {first or name} and {name} are the same checkpoint, which does not differ "
                "from itself: name each run once"
            )
        paths[name] = path
    return paths


FACTS = ("parameters", "tokens", "FLOPs", "hours", "cost", "val loss", "val bits per byte")


def table(entries: Sequence[Entry]) -> list[str]:
    """A table with a column for each entry and a row for each figure."""
    facts = [key for key in FACTS if any(key in e.facts for e in entries)]
    scores = list(dict.fromkeys(key for e in entries for key in e.scores))
    rows = [["", *(e.name for e in entries)]]
    rows += [[key, *(_fact(key, e.facts.get(key)) for e in entries)] for key in facts]
    rows += [[key, *(_score(e.scores.get(key)) for e in entries)] for key in scores]
    return aligned(rows)


def other_data(runs: Sequence[Entry]) -> Iterator[str]:
    """A line that says if the val losses were measured on different texts."""
    measured = [run for run in runs if "val loss" in run.facts]
    data = {run.data for run in measured}
    if len(data) > 1:
        each = "; ".join(
            f"{run.name}: {', '.join(d.rpartition('/')[2] for d in run.data)}" for run in runs
        )
        yield f"val loss and val bits per byte are on different texts: do not compare them ({each})"
    elif any(run.sample != measured[0].sample for run in measured):
        each = "; ".join(
            f"{run.name}: "
            + (f"{sum(run.sample.values()):,} tokens" if run.sample else "the split's beginning")
            for run in measured
        )
        yield (
            "val loss and val bits per byte are on different samples of the val split "
            f"(eval.tokens): do not compare them ({each})"
        )


def older_losses(runs: Sequence[Entry]) -> Iterator[str]:
    """A line that says which val losses are of an earlier step than the rest of the table."""
    older = [(run.name, *run.steps) for run in runs if run.steps and run.steps[0] < run.steps[1]]
    if older:
        each = "; ".join(f"{name}: of step {was}, not {step}" for name, was, step in older)
        yield f"val loss and val bits per byte were measured before the run's last step ({each})"


def _fact(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in ("parameters", "tokens", "FLOPs"):
        for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if key != "FLOPs" and value >= size:
                return f"{value / size:.4g}{letter}"
        return f"{value:.2e}" if key == "FLOPs" else f"{value:.0f}"
    return f"{value:.2f}" if key in ("hours", "cost") else f"{value:.4f}"


def _score(score: tuple[float, float] | None) -> str:
    if score is None:
        return "-"
    value, error = score
    return f"{value:.4f}" + (f" ±{error:.4f}" if error else "")


def picture(runs: Sequence[Entry], references: Sequence[Entry]) -> bytes:
    """A picture with a panel for each figure: all runs against tokens, and published scores."""
    keys = list(dict.fromkeys(key for run in runs for key in run.curves))
    panels = {key: {run.name: run.curves[key] for run in runs if key in run.curves} for key in keys}
    lines: Mapping[str, dict[str, float]] = {
        key: {r.name: r.scores[key][0] for r in references if key in r.scores} for key in keys
    }
    return plot.side_by_side(panels, lines, "Runs side by side (bars: one standard error)")
