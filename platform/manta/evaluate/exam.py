"""The test of a classifier at its run's end: on texts that nothing was trained or chosen on, next
to a baseline on exactly the same texts.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from manta import layout, plot, storage
from manta.data import labelled
from manta.data import manifest as manifests
from manta.data.manifest import Manifest
from manta.evaluate import baseline
from manta.evaluate.inference_settings import InferenceConfig, place_of
from manta.evaluate.labelling import probabilities
from manta.evaluate.verdicts import Verdicts, difference
from manta.model.inference import inference
from manta.terminal import named
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint


@dataclasses.dataclass(frozen=True)
class Exam:
    """What a test found. `split` is val if the dataset has no test split."""

    split: str
    model: Verdicts
    baseline: Verdicts | None


def examine(path: str, *, balanced: bool = False) -> Exam:
    """Tests the checkpoint at `path` on its run's dataset. `balanced`: whether it was trained with
    class_weights=balanced, which the baseline is then, too.

    Raises:
        CheckpointError: it is no classifier.
        DataError: the dataset is gone.
    """
    device, dtype = place_of(InferenceConfig())
    model = checkpoint.load_model(path, device, classifies=True)
    manifest = manifests.load(checkpoint.load_state(path).datasets[0])
    split = labelled.TEST if manifest.split(labelled.TEST) else labelled.VAL
    texts, truth = labelled.examples(manifest, split)
    with inference(device, dtype):
        given = probabilities(model, texts).argmax(1)
    labels = model.config.labels
    other = None
    if baseline.is_installed():
        tokenizer = manifest.load_tokenizer()
        train, val = (_texts(manifest, tokenizer, s) for s in (labelled.TRAIN, labelled.VAL))
        plain = [tokenizer.decode(ids[1:].tolist()) for ids in texts]
        other = Verdicts(labels, truth, baseline.labels_of(train, val, plain, balanced=balanced))
    return Exam(split, Verdicts(labels, truth, given), other)


def _texts(manifest: Manifest, tokenizer: Tokenizer, split: str) -> tuple[list[str], np.ndarray]:
    texts, labels = labelled.examples(manifest, split)
    return [tokenizer.decode(ids[1:].tolist()) for ids in texts], labels


def publish(run: str, name: str, exam: Exam) -> Iterator[str]:
    """Writes what a test found to the run's folder, and yields lines that tell it."""
    record: dict[str, Any] = {"split": exam.split, "model": exam.model.record()}
    record["baseline"] = exam.baseline and {"name": baseline.NAME, **exam.baseline.record()}
    storage.write_json(storage.join(run, layout.LABELS), record)
    yield from table(name, exam)
    if exam.model.is_drawn:
        title = f"{name}: {len(exam.model.truth):,} texts of the {exam.split} split"
        picture = plot.confusion(exam.model.confusion.tolist(), list(exam.model.labels), title)
        storage.write_bytes(storage.join(run, layout.CONFUSION), picture)
        yield f"confusion    {storage.join(run, layout.CONFUSION)}"


def table(name: str, exam: Exam) -> Iterator[str]:
    """Yields the table of a test: accuracy and macro F1 with 95% intervals, then each label."""
    counts = np.bincount(exam.model.truth, minlength=len(exam.model.labels)).tolist()
    each = [f"{n:,} {label}" for label, n in zip(exam.model.labels, counts, strict=True)]
    shown = named(each, most=10)
    yield f"{exam.split} split: {len(exam.model.truth):,} texts ({shown}); 95% intervals"
    rows = [(name, exam.model)]
    if exam.baseline is not None:
        rows.append((baseline.NAME, exam.baseline))
    width = max(len(row) for row, _ in rows)
    yield f"{'':{width}}  {'accuracy':<26}  macro F1"
    for row, found in rows:
        yield f"{row:{width}}  {found.accuracy!s:<26}  {found.macro_f1}"
    if exam.baseline is None:
        yield baseline.MISSING
    else:
        yield difference(exam.model, exam.baseline, "the baseline")
