"""The sections of a report: which facts of a run a person wants to know, and in which order."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from manta import layout, storage
from manta.evaluate import entries
from manta.evaluate import report as scores
from manta.report import planned
from manta.report.facts import Fact, Files, pointer
from manta.terminal import visible
from manta.train.records.ledger import CAUSES
from manta.train.records.logbook import duration

RESULT, TIME = "What came of it", "Where the time went"
ASKED = "report.json"
LONGEST_TEXT = 300  # characters of a sample
MOST_EVENTS = 200
MOST_STEPS = 6  # whose samples are shown


@dataclasses.dataclass
class Section:
    """A part of the report: sentences, facts, a table, or notes."""

    title: str
    said: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    """Sentences, each with a command to run, or None."""
    facts: list[Fact] = dataclasses.field(default_factory=list)
    head: tuple[str, ...] = ()
    rows: list[list[Fact | str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, *facts: Fact | None) -> None:
        """Adds those facts that are known."""
        self.facts += [fact for fact in facts if fact is not None]


@dataclasses.dataclass(frozen=True)
class Place:
    """The files of a run's checkpoint, as paths in the home."""

    run: str
    step: str

    def __call__(self, name: str) -> str:
        """A file in the run."""
        return f"{self.run}/{name}"

    def saved(self, name: str) -> str:
        """A file in the checkpoint."""
        return f"{self.run}/checkpoints/{self.step}/{name}"


def sections(files: Files, home: str, at: Place) -> Iterator[Section]:
    """All sections of the report that have something in them."""
    for make in (_result, _scores, _model, _data, _training, _samples, _plan, _time, _events):
        section = make(files, home, at)
        if section.facts or section.rows or section.notes:
            yield section


def _number(value: Any) -> str:
    return f"{value:,}"


def _short(value: float) -> str:
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _size(value: float) -> str:
    """Bytes for people, in decimal units."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:,.1f} {name}"
    return f"{value:,} bytes"


def _model(files: Files, _home: str, at: Place) -> Section:
    section, file = Section("The model"), at.saved(layout.MODEL_CONFIG)
    section.add(files.fact("parameters", ((file, ""),), _number, "num_parameters(v[0])"))
    names = {
        "family": "family", "preset": "preset", "n_layer": "blocks", "n_embd": "channels",
        "n_head": "heads", "context_length": "context, tokens", "vocab_size": "vocabulary, ids",
    }  # fmt: skip
    for key, name in names.items():
        section.add(files.fact(name, ((file, pointer(key)),), _text))
    return section


def _text(value: Any) -> str:
    return _number(value) if isinstance(value, int) else str(value)


def _data(files: Files, _home: str, at: Place) -> Section:
    section = Section("What it was trained on")
    state = at.saved(layout.STATE)
    config = at(layout.RUN_CONFIG)
    section.add(files.fact("licence, as it was given", ((config, "/data/license"),), _text))
    for index, path in enumerate(files.get(state, "/datasets/*")):
        name = path.rpartition("/")[2]
        file = f"data/{name}/{layout.MANIFEST}"
        section.add(files.fact("dataset", ((state, pointer("datasets", index)),)))
        if files.content(file) is None:
            section.notes.append(f"The dataset {name} is not there any more.")
            continue
        of_train = "sum(n for n, split in zip(v[0], v[1]) if split == 'train')"
        section.add(files.fact("source", ((file, "/recipe/source/location"),), _text))
        section.add(files.fact("tokenizer", ((file, "/tokenizer"),)))
        for key, label, shown in (
            ("tokens", "tokens to train on", _number),
            ("documents", "documents to train on", _number),
            ("text_bytes", "text to train on", _size),
        ):
            places = ((file, f"/shards/*/{key}"), (file, "/shards/*/split"))
            section.add(files.fact(label, places, shown, of_train))
        for why in files.get(file, "/dropped") or {}:
            place = (file, pointer("dropped", why))
            section.add(files.fact(f"left out: {why.replace('_', ' ')}", (place,), _number))
    for name in files.get(config, "/data/mix") or {}:
        place = (config, pointer("data", "mix", name))
        section.add(files.fact(f"share of {name} in the mix", (place,), _short))
    return section


def _training(files: Files, _home: str, at: Place) -> Section:
    section = Section("How it was trained")
    state, config, metrics = at.saved(layout.STATE), at(layout.RUN_CONFIG), at(layout.METRICS)
    events = at(layout.HISTORY)
    if (number := _newest(files, events, "command")) is not None:
        for label, keys in (("command", ["command"]), ("system", ["machine", "system"])):
            section.add(files.fact(label, ((events, pointer(number, *keys)),)))
        for key, label, shown in (("cpus", "CPUs", _number), ("memory_bytes", "memory", _size)):
            section.add(files.fact(label, ((events, pointer(number, "machine", key)),), shown))
        for name in files.get(events, pointer(number, "versions")) or {}:
            section.add(files.fact(name, ((events, pointer(number, "versions", name)),), _text))
    if (number := _newest(files, events, "started")) is not None:
        for key in ("workers", "device", "dtype", "zero_stage", "micro_batch"):
            place = (events, pointer(number, key))
            section.add(files.fact(key.replace("_", " "), (place,), _text))
    section.add(files.fact("steps", ((state, "/step"),), _number))
    if (number := _newest(files, metrics, None, "tokens")) is not None:
        section.add(files.fact("tokens", ((metrics, pointer(number, "tokens")),), _number))
    section.add(
        files.fact("tokens in a step", ((config, "/tokens_per_batch"),), _number),
        files.fact("optimizer", ((config, "/optimizer/kind"),), _text),
        files.fact("peak learning rate", ((config, "/optimizer/lr"),), _short),
        files.fact("seed", ((config, "/seed"),), str),
        files.fact("time in steps", ((state, "/train_seconds"),), duration),
    )
    for key, label, shown in (
        ("tokens_per_second", "tokens a second, median", _short),
        ("mfu", "MFU, median", _share),
    ):
        section.add(files.fact(label, ((metrics, f"/*/{key}"),), shown, "median(numbers(v[0]))"))
    return section


def _newest(files: Files, file: str, event: str | None, key: str = "") -> int | None:
    """The index of the last record of this event, or with this key."""
    found = None
    for index, record in enumerate(files.content(file) or []):
        if isinstance(record, dict) and (record.get("event") == event if event else key in record):
            found = index
    return found


def _result(files: Files, _home: str, at: Place) -> Section:
    section = Section(RESULT)
    file = at(layout.METRICS)
    records = files.content(file) or []
    measured = [i for i, r in enumerate(records) if isinstance(r, dict) and "val_loss" in r]
    names = {"val_loss": "val loss, nats a token", "val_bpb": "val bits per byte",
             "val_accuracy": "val accuracy", "val_macro_f1": "val macro F1"}  # fmt: skip
    for key, name in names.items():
        if measured and key in records[measured[-1]]:
            first, last = ((file, pointer(i, key)) for i in (measured[0], measured[-1]))
            section.add(files.fact(f"{name}, at the end", (last,), _loss))
            if len(measured) > 1:
                step = records[measured[0]].get("step")
                section.add(files.fact(f"{name}, at step {step}", (first,), _loss))
    if len(measured) > 1:
        every = ((file, "/*/val_loss"),)
        section.add(files.fact("lowest val loss", every, _loss, "min(numbers(v[0]))"))
    return section


def _scores(files: Files, home: str, at: Place) -> Section:
    section = Section("Scores", head=("task", "metric", "score", "standard error", "documents"))
    run = storage.join(home, at.run)
    references = entries.published()
    for found in scores.all_of(run, at.step):
        file = at(f"{layout.EVALS}/{at.step}/{found['label']}{layout.SCORES}")
        for figure in scores.figures(found["results"], once=True):
            key = ("results", figure.task)
            value = files.fact(figure.metric, ((file, pointer(*key, figure.metric)),), _loss)
            place = (file, pointer(*key, f"{figure.metric}_stderr"))
            error = files.fact("standard error", (place,), _loss)
            count = files.fact("documents", ((file, pointer(*key, "samples")),), _number)
            if value is not None:
                task = figure.task + scores.variant_of(found["label"])
                if found.get("limit"):
                    task += f", the first {found['limit']:,}"
                row: list[Fact | str] = [task, figure.metric, value, error or "", count or ""]
                section.rows.append(row)
            name = entries.score_name(figure.task, figure.metric)
            for reference in references:
                if name in reference.scores:
                    published, _ = reference.scores[name]
                    section.notes.append(
                        f"{name}, published: {reference.name} {published:.4f} "
                        f"({'; '.join(reference.sources)})"
                    )
    section.notes = list(dict.fromkeys(section.notes))
    return section


def _samples(files: Files, _home: str, at: Place) -> Section:
    section = Section("What it wrote", head=("step", "prompt", "text"))
    file = at(layout.SAMPLES)
    records = [r for r in files.content(file) or [] if isinstance(r, dict) and "completion" in r]
    steps = sorted({r["step"] for r in records if isinstance(r.get("step"), int)})
    if len(steps) > MOST_STEPS:  # the first, the last, and some evenly between them
        steps = [steps[i * (len(steps) - 1) // (MOST_STEPS - 1)] for i in range(MOST_STEPS)]
    for index, record in enumerate(files.content(file) or []):
        if isinstance(record, dict) and record.get("step") in steps and "completion" in record:
            step = files.fact("step", ((file, pointer(index, "step")),), _number)
            texts = (str(record.get("prompt", "")), str(record["completion"]))
            shown = [visible(text)[:LONGEST_TEXT] for text in texts]
            section.rows.append([step or "", *shown])
    return section


def _plan(files: Files, _home: str, at: Place) -> Section:
    section = Section(planned.TITLE, head=planned.HEAD)
    section.rows = planned.rows(files, at)
    file = at(layout.PLAN)
    if section.rows:
        section.add(files.fact("made", ((file, "/made"),)))
        section.add(files.fact("its speed is from the", ((file, "/time/source"),)))
        section.add(files.fact("tokens planned", ((file, "/tokens"),), _number))
    return section


def _time(files: Files, _home: str, at: Place) -> Section:
    section, file = Section(TIME), at(layout.GOODPUT)
    there = [cause for cause in CAUSES if files.get(file, pointer("seconds", cause)) is not None]
    places = {cause: (file, pointer("seconds", cause)) for cause in there}
    every = tuple(places.values())
    if not there:
        return section
    section.add(files.fact("all time since the first start", every, duration, "sum(v)"))
    for cause in (cause for cause in there if files.get(*places[cause])):
        rest = tuple(place for other, place in places.items() if other != cause)
        name = "goodput: steps that were kept" if cause == "productive" else cause
        section.add(files.fact(name, (places[cause], *rest), _share, "v[0] / sum(v)"))
    section.add(files.fact("starts of the workers", ((file, "/starts"),), _number))
    price = (ASKED, "/asked/price_per_hour")
    bill = files.fact("the bill", (price, *every), _dollars, "v[0] * sum(v[1:]) / 3600")
    section.add(files.fact("price of an hour", (price,), _dollars), bill)
    if bill is None:
        section.notes.append("The bill is not known: give price_per_hour=, the price of an hour.")
    return section


def _dollars(value: float) -> str:
    return f"{value:,.2f}"


def _events(files: Files, _home: str, at: Place) -> Section:
    section = Section("What happened", head=("after the first start", "what", "details"))
    file = at(layout.HISTORY)
    records = files.content(file) or []
    there = [i for i, r in enumerate(records) if isinstance(r, dict) and "time" in r]
    for index in there[:MOST_EVENTS]:
        record = records[index]
        places = ((file, pointer(index, "time")), (file, pointer(there[0], "time")))
        since = files.fact("seconds", places, duration, "v[0] - v[1]")
        section.rows.append(
            [since or "", str(record.get("event")), files.private(_details(record))]
        )
    if len(there) > MOST_EVENTS:
        section.notes.append(f"{len(there) - MOST_EVENTS:,} more are in {file}.")
    for index, record in enumerate(files.content(at(layout.ROLLBACKS)) or []):
        place = at(layout.ROLLBACKS)
        first = files.fact("first", ((place, pointer(index, "first")),), _number)
        why = f"to step {record.get('last')} passed over: {record.get('why')}"
        section.rows.append([first or "", "rolled back", files.private(why)])
    return section


DETAILS: dict[str, Callable[[Any], str]] = {
    "step": lambda v: f"step {v:,}", "resumed_from": lambda v: f"from {v}",
    "workers": lambda v: f"{v} worker(s)", "device": str, "why": str, "signal": str,
    "bytes": lambda v: f"at most {_size(v)}",
    "now": lambda v: f"micro batches of {v}", "rank": lambda v: f"rank {v}",
}  # fmt: skip


def _details(record: dict[str, Any]) -> str:
    parts = [show(record[key]) for key, show in DETAILS.items() if record.get(key) is not None]
    return ", ".join(parts)
