"""Labels for a person's texts, by a classifier: as lines, or as a file with a score."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from manta import ownership, storage
from manta.config import DocumentBytes, config
from manta.data import labelled
from manta.errors import DataError
from manta.evaluate.inference_settings import InferenceConfig, place_of
from manta.evaluate.labelling import probabilities
from manta.evaluate.verdicts import Verdicts
from manta.model.inference import inference
from manta.terminal import line, named
from manta.text import labels, sources
from manta.text.labels import Labelled
from manta.text.rows import BadRows
from manta.text.sources import Source
from manta.train.checkpoints import checkpoint

MOST_SHOWN = 20  # labels with a line of their own
ENDINGS = (".csv", ".tsv", ".jsonl")
# What a message about a dataset's rows calls the keys of this job.
KEYS = {
    "data.source=": "file=",
    **{f"data.{key}": key for key in (
        "text_key", "label_key", "quotes", "errors", "on_bad_rows", "max_document_bytes",
    )},
}  # fmt: skip
OF_DATA = re.compile("|".join(map(re.escape, KEYS)))


@config
class ClassifyConfig(InferenceConfig):
    """The keys of a job that labels texts."""

    text: str | None = None
    """Text to label."""
    file: str | None = None
    """File of texts to label (.csv, .tsv, .json, .jsonl, .parquet), with labels or without; where
    there are labels, the answers are scored."""
    out: str | None = None
    """File to write the labels to (.csv, .tsv or .jsonl); null: standard output, as a .tsv."""
    overwrite: bool = False
    """Replace what an earlier call wrote at `out`, if it is still as it was written."""
    text_key: str = "text"
    """Column or key with the text."""
    label_key: str = "label"
    """Column or key with the label, if there is one."""
    quotes: Literal["auto", "none", "double"] = "auto"
    """What double quotes are in a table. double: they hold a field together, as CSV has it; none:
    characters of the text; auto: double in .csv, none in .tsv."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do about bytes that are not UTF-8: they make a row bad (`on_bad_rows`), or U+FFFD is
    put in their place."""
    on_bad_rows: Literal["fail", "skip"] = "fail"
    """What to do about a row without a usable text: stop and name it, or leave it out and count
    it."""
    max_document_bytes: DocumentBytes = sources.MOST_BYTES
    """Bytes in the largest row; a larger one is a bad row."""

    def problems(self) -> list[str]:
        found = []
        if (self.text is None) == (self.file is None):
            found.append("give text=... or file=..., one of them")
        if self.text is not None and not self.text.strip():
            found.append("text: it is empty")
        if self.out is not None and self.file is None:
            found.append("out is for a file of texts: omit it, or give file=")
        if self.out is not None and not self.out.lower().endswith(ENDINGS):
            found.append(f"out={self.out}: its ending should be one of {', '.join(ENDINGS)}")
        if self.label_key == self.text_key:
            found.append(f"label_key={self.label_key}: it is text_key too")
        return found


class Answer(NamedTuple):
    text: Labelled
    label: str
    probability: float


def classify(c: ClassifyConfig, hint: Callable[[str], None]) -> Iterator[str]:
    """Yields the lines of standard output: labels and their probabilities, or, with `out`, where
    they are and how many are right.

    Args:
        hint: receives lines that are no results.

    Raises:
        MantaError: the checkpoint, a file or the device cannot be used.
    """
    path = checkpoint.resolve(c.checkpoint, c.home_folder)
    device, dtype = place_of(c)
    model = checkpoint.load_model(path, device, classifies=True)
    tokenizer, names = checkpoint.load_tokenizer(path), model.config.labels
    out = None if c.out is None else ownership.new_file(c.out, c.out, c.overwrite)
    texts = [Labelled(None, c.text)] if c.text is not None else list(_read(c, hint))
    length = model.config.context_length
    encoded = [labelled.ids_of(tokenizer, text.text, length) for text in texts]
    if cut := sum(is_cut for _, is_cut in encoded):
        hint(f"cut {cut:,} texts at their end: more tokens than the context of {length:,} holds")
    with inference(device, dtype):
        found = probabilities(model, [ids for ids, _ in encoded])
    if c.text is not None:
        shown = (f"{line(name)} {p:.4f}" for name, p in zip(names, found[0], strict=True))
        yield "\t".join([line(names[int(found[0].argmax())]), *shown])
        return
    best = found.argmax(1)
    chances = found[np.arange(len(best)), best].tolist()
    answers = [
        Answer(text, names[number], chance)
        for text, number, chance in zip(texts, best.tolist(), chances, strict=True)
    ]
    if out is None:
        yield from _table(answers, "\t").splitlines()
    else:
        _write(out, answers)
        yield f"wrote {len(answers):,} labels to {out}"
    told = _score(names, texts, best, hint)
    if out is None:
        for text in told:
            hint(text)
    else:
        yield from told


def _read(c: ClassifyConfig, hint: Callable[[str], None]) -> Iterator[Labelled]:
    """Yields the file's texts; empty ones are counted, and said. Raises DataError, with the keys of
    this job, if the file cannot be read."""
    try:
        yield from _texts(c, hint)
    except DataError as e:
        raise DataError(OF_DATA.sub(lambda found: KEYS[found[0]], str(e))) from None


def _texts(c: ClassifyConfig, hint: Callable[[str], None]) -> Iterator[Labelled]:
    source = Source(
        storage.absolute(str(c.file)), text_key=c.text_key, label_key=c.label_key, quotes=c.quotes,
        errors=c.errors, most_bytes=c.max_document_bytes, on_bad_rows=c.on_bad_rows,
        kind=labels.TO_CLASSIFY,
    )  # fmt: skip
    bad = BadRows(c.on_bad_rows)
    count = empty = 0
    for part in sources.parts(source):
        for text in map(labels.labelled, sources.all_documents(part, bad)):
            count += 1
            if text.text.strip():
                yield text
            else:
                empty += 1
    if empty:
        hint(f"left out {empty:,} empty texts")
    skipped = sum(kinds.total() for kinds in bad.counts.values())
    if skipped:
        hint(f"left out {skipped:,} rows without a usable text")
    if count == empty:
        raise DataError(f"file={c.file}: no text in it")


def _score(
    names: tuple[str, ...], texts: list[Labelled], given: np.ndarray, hint: Callable[[str], None]
) -> list[str]:
    """Lines about how many labels are right, if the file has some. Labels that the classifier does
    not know are named, and their texts are not scored."""
    unknown = Counter(t.label for t in texts if t.label is not None and t.label not in names)
    if unknown:
        shown = named([f"{label} ({n:,})" for label, n in unknown.most_common()], most=5)
        hint(
            f"labels in the file that the classifier does not know: {shown}; it knows "
            f"{named(names, most=10)}. Those {unknown.total():,} texts are labelled, but not scored"
        )
    scored = [i for i, text in enumerate(texts) if text.label in names]
    if not scored:
        return []
    truth = np.array([names.index(str(texts[i].label)) for i in scored])
    verdicts = Verdicts(names, truth, given[scored])
    each = [found for found in verdicts.each() if found["texts"]]
    return [
        f"{len(scored):,} texts have a label: accuracy {verdicts.accuracy}, macro F1 "
        f"{verdicts.macro_f1} (95% intervals)",
        *(
            f"  {line(found['label'])}: {found['texts']:,} texts, precision "
            f"{_share(found['precision'])}, recall {_share(found['recall'])}"
            for found in each[:MOST_SHOWN]
        ),
        *([f"  and {len(each) - MOST_SHOWN:,} more labels"] if each[MOST_SHOWN:] else []),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _row(answer: Answer) -> dict[str, str | float | None]:
    """The answer as a row; `expected` is the label in the file."""
    return {
        "label": answer.label,
        "probability": round(answer.probability, 4),
        "expected": answer.text.label,
        "text": answer.text.text,
    }


def _table(answers: list[Answer], separator: str) -> str:
    """The answers as a table with a header. In a .tsv, tabs and line ends of a text are spaces."""
    rows = [_row(answer) for answer in answers]
    if all(answer.text.label is None for answer in answers):
        for row in rows:
            del row["expected"]
    made = io.StringIO()
    if separator == "\t":
        clean = [{k: " ".join(str("" if v is None else v).split()) for k, v in r.items()}
                 for r in rows]  # fmt: skip
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in clean)]
        return "\n".join(lines) + "\n"
    writer = csv.DictWriter(made, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return made.getvalue()


def _write(out: Path, answers: list[Answer]) -> None:
    """Writes the answers in the format that the file's name says."""
    if out.name.lower().endswith(".jsonl"):
        content = "".join(json.dumps(_row(a), ensure_ascii=False) + "\n" for a in answers)
    else:
        content = _table(answers, "\t" if out.name.lower().endswith(".tsv") else ",")
    with storage.writing(str(out), "free some space there, or give another out="):
        storage.write_bytes(str(out), content.encode())
        ownership.record(out)
