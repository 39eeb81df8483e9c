"""A dataset of labelled texts: exact splits of each label, whole rows, and what is left out."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.preparing import silent, tokens_of, without_ray
from manta.config import from_dict
from manta.data import labelled, prepare, report
from manta.data import manifest as manifests
from manta.data.inspect import InspectConfig, inspect
from manta.data.labelled import SPLITS, _Group, _split
from manta.data.manifest import Manifest
from manta.data.recipe import PrepareConfig
from manta.errors import ConfigError, DataError

ROW = 32
WORDS = ["ray", "manta", "sea", "é", "🐟", "<|endoftext|>", "1234", "why?", "yes"]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def some_texts(**counts: int) -> list[tuple[str, str]]:
    draw = random.Random(0)
    return [
        (label, " ".join(draw.choices(WORDS, k=draw.randint(1, 6))) + f" {label} {i}")
        for label, count in counts.items()
        for i in range(count)
    ]


def prepared(
    folder: Path, texts: list[tuple[str, str]], say: Any = silent, files: int = 1, **keys: Any
) -> Manifest:
    source = folder / "rows"
    source.mkdir(exist_ok=True)
    for i in range(files):
        rows = [json.dumps({"label": label, "text": text}) for label, text in texts[i::files]]
        (source / f"{i}.jsonl").write_text("".join(row + "\n" for row in rows))
    given = {
        "kind": "classify", "source": str(source), "name": "texts", "vocab_size": 300,
        "row_tokens": ROW,
    }  # fmt: skip
    c = from_dict(PrepareConfig, given | keys)
    return prepare.prepare(c, str(folder / "home"), say)


def pairs_of(manifest: Manifest, split: str) -> Counter[tuple[str, str]]:
    """The labels and texts of a split, read from its ids."""
    decode = manifest.load_tokenizer().decode
    texts, numbers = labelled.examples(manifest, split)
    return Counter(
        (manifest.labels[number], decode(ids[1:].tolist()))
        for ids, number in zip(texts, numbers.tolist(), strict=True)
    )


def test_each_text_is_there_once_and_whole_with_its_label(tmp_path: Path) -> None:
    texts = some_texts(cat=70, ray=130)
    manifest = prepared(tmp_path, texts)
    each = [pairs_of(manifest, split) for split in SPLITS]
    assert [found.total() for found in each] == [140, 20, 40]
    assert sum(each, Counter()) == Counter(texts)
    assert manifest.label_counts == {"train": [49, 91], "val": [7, 13], "test": [14, 26]}
    made = manifest.load_tokenizer()
    for split in SPLITS:
        rows = tokens_of(manifest, split).reshape(-1, ROW)
        assert (rows[:, 0] == made.start).all()
        assert int(rows.max()) == made.vocab_size + 1
    manifests.check(manifests.load(manifest.path))
    assert "label    ray: 91 train, 13 val, 26 test" in report.summary(manifest)
    shown = "\n".join(inspect(InspectConfig(home=str(tmp_path / "home"), dataset="texts")))
    assert "whole texts" in shown and "sample 3: text " in shown


def test_the_bytes_depend_on_neither_files_nor_their_order(tmp_path: Path) -> None:
    digests = set()
    for number, files in enumerate((1, 3, 3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        texts = some_texts(cat=40, ray=40)
        tokenizer = tmp_path / "encoding.json"
        keys = {"tokenizer": str(tokenizer), "vocab_size": None} if number else {}
        manifest = prepared(folder, texts[::-1] if number == 2 else texts, files=files, **keys)
        if not number:
            tokenizer.write_bytes(manifest.load_tokenizer().serialized)
        digests.add(tuple(shard.sha256 for shard in manifest.shards))
    assert len(digests) == 1


few = settings(deadline=None, max_examples=40)


@few
# Each label's part rounded by itself would give the test split two texts, and the val split none.
@example([(0, 1), (0, 1), (0, 1), (0, 1), (1, 1)], 0.2, 0.1)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 1, 1, 2, 5])), min_size=1),
    st.sampled_from([0.1, 0.2, 0.25]),
    st.sampled_from([0.0, 0.1, 0.2]),
)
def test_splits_have_their_share_of_each_label(
    drawn: list[tuple[int, int]], val: float, test: float
) -> None:
    rng = np.random.default_rng(0)
    groups = [
        _Group("", label, copies, "", (i, int(rng.integers(1 << 63)) * 2))
        for i, (label, copies) in enumerate(drawn)
    ]
    _split(groups, val, test)
    total = sum(group.copies for group in groups)
    if all(group.copies == 1 for group in groups):
        sizes = Counter(group.split for group in groups)
        assert sizes["train"] == int((1 - val - test) * total + 1e-9)
        rest = total - sizes["train"]
        assert sizes["val"] == (int(val * total + 1e-9) if test else rest)
        for label in {group.label for group in groups}:
            ours = Counter(group.split for group in groups if group.label == label)
            for split, size in sizes.items():
                assert abs(ours[split] - size / total * ours.total()) < 2
    if not test:
        assert not any(group.split == "test" for group in groups if group.copies == 1)


def test_the_books_balanced_split(tmp_path: Path) -> None:
    """4,827 and 747 messages with copies, as the SMS Spam Collection: 747 of each label, of which
    1,045, 149 and 300 are in the splits, and no copy of a text is in two of them."""
    texts = [*some_texts(ham=4500, spam=640), *some_texts(ham=327, spam=107)]
    manifest = prepared(tmp_path, texts, balance=True, deduplicate="none", row_tokens=64)
    each = [pairs_of(manifest, split) for split in SPLITS]
    assert [found.total() for found in each] == [1045, 149, 300]
    assert [sum(n) for n in zip(*manifest.label_counts.values(), strict=True)] == [747, 747]
    assert not each[0].keys() & each[1].keys() and not each[0].keys() & each[2].keys()
    assert manifest.dropped["balanced"] == 4827 - 747


def test_what_cannot_be_learnt_is_left_out_and_said(tmp_path: Path) -> None:
    texts = [
        *some_texts(cat=1000, ray=8), ("cat", "both"), ("ray", "both"), ("cat", ""), ("ray", " \t"),
        ("cat", "twice"), ("cat", "twice"), ("cat", "x" * 1000),
    ]  # fmt: skip
    lines: list[str] = []
    manifest = prepared(tmp_path, texts, lines.append)
    assert manifest.dropped == {
        "empty": 2, "contaminated": 0, "duplicate": 1, "conflicting": 2,
    }  # fmt: skip
    assert sum(manifest.cut.values()) == 1
    said = "\n".join(lines)
    assert "left out 2 rows whose text is there with two labels" in said
    assert "cut 1 texts at their end, to fit with their label in a row of 32 tokens" in said
    assert "the label ray is rare: 6 of 707 train texts" in said
    assert "class_weights=balanced counts each of these texts 58.9 times" in said


@pytest.mark.parametrize(
    ("texts", "keys", "message"),
    [
        ([*some_texts(cat=9), ("ray", "one")], {}, r"only one text has .*: ray \(.*text 10\)"),
        (some_texts(cat=9), {}, "only the label cat; a classifier needs two labels"),
        (some_texts(cat=9, ray=9), {"labels": ["cat", "dog"]}, "'ray' is not one of labels="),
        (
            some_texts(cat=9, ray=9),
            {"labels": ["cat", "dog", "ray"]},
            "no text has the label dog; leave it out of labels",
        ),
        ([("cat", ""), ("ray", "")], {}, "no text with a label"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(
    texts: list[tuple[str, str]], keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, texts, **keys)
    assert not (tmp_path / "home/data/texts/MANIFEST.json").exists()


def test_rows_with_unknown_labels_may_be_skipped(tmp_path: Path) -> None:
    texts = some_texts(cat=30, ray=30, dog=1)
    manifest = prepared(tmp_path, texts, labels=["ray", "cat"], on_bad_rows="skip")
    assert manifest.labels == ("ray", "cat")
    assert sum(kinds["unknown label"] for kinds in manifest.skipped.values()) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"val_source": "x.csv"}, "val_source is not for kind=classify"),
        ({"deduplicate": "near"}, "deduplicate=near is not for kind=classify"),
        ({"test_fraction": 0.6}, "leave less than half to train on"),
        ({"labels": ["a", "a"]}, "at least two are needed, all different"),
        ({"label_key": "text"}, "it is text_key too"),
        ({"kind": "text", "balance": True}, "balance is for kind=classify"),
        ({"source": "python"}, "source=python has no labels"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(PrepareConfig, {"kind": "classify", "source": "a.csv", **keys})
