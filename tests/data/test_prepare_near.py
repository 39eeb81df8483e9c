"""Preparing without near duplicates: none across the splits, the same bytes whatever the tasks, and
after a stop; and which copies the other settings of data.deduplicate keep."""

import dataclasses
import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.preparing import (
    all_texts,
    config_of,
    content,
    killed_at,
    set_sizes,
    silent,
    texts_of,
    write_rows,
)
from manta.config import from_dict
from manta.data import manifest as manifests
from manta.data import mixture, near, passes, prepare, report, runs
from manta.data.manifest import Manifest
from manta.data.recipe import DataConfig, PrepareConfig
from manta.errors import ConfigError, DataError

WORDS = [f"w{i}" for i in range(400)]
COUNT = 36


def with_copies() -> tuple[list[str], dict[str, list[str]]]:
    """Originals, and for each the copies with one word changed, or two copies of one, or none."""
    draw = random.Random(3)
    originals = [" ".join(draw.choices(WORDS, k=90)) for _ in range(COUNT)]
    copies: dict[str, list[str]] = {}
    for number, text in enumerate(originals):
        copies[text] = []
        for place in range(20, 20 + 30 * (number % 3), 30):
            words = text.split()
            words[place] = "changed"
            copies[text].append(" ".join(words))
    return originals, copies


def write_copies(folder: Path) -> Path:
    originals, copies = with_copies()
    rows = [
        *originals,
        *itertools.chain.from_iterable(copies.values()),
        *originals[:4],
        "",
        "w1 w2",
    ]
    random.Random(0).shuffle(rows)
    return write_rows(folder, [rows[i::4] for i in range(4)])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_copies(tmp_path_factory.mktemp("copies"))


@pytest.fixture
def small(here: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Sizes at which this corpus has several tasks, runs and merges in each pass."""
    for name, value in {"TASK_ROWS": 900, "COLLECTED_ROWS": 300, "LARGEST_BUCKET": 20}.items():
        here.setattr(near, name, value)
    here.setattr(runs, "FAN_IN", 3)
    here.setattr(runs, "MERGED_BATCH_BYTES", 3000)
    return here


def groups_kept(found: Manifest) -> Counter[str]:
    """How many of each original and its copies are in the dataset."""
    originals, copies = with_copies()
    of = {copy: text for text in originals for copy in [text, *copies[text]]}
    return Counter(of.get(text, text) for text in all_texts(found))


def test_one_of_each_group_is_kept_and_the_others_are_counted_and_shown(
    corpus: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    found = prepare.prepare(config_of(corpus, deduplicate="near"), str(tmp_path), lines.append)
    kept = groups_kept(found)
    assert set(kept) == {*with_copies()[0], "w1 w2"} and set(kept.values()) == {1}
    assert found.dropped == {
        "empty": 1, "contaminated": 0, "duplicate": 4, "near_duplicate": COUNT,
    }  # fmt: skip
    assert f"4 duplicate, {COUNT} near duplicate documents" in report.summary(found)
    assert manifests.load(found.path) == found
    assert len(found.near_pairs) == near.EXAMPLES
    for pair in found.near_pairs:
        texts = []
        for place in (pair.dropped, pair.like):
            line = Path(place.file).read_text().splitlines()[place.row - 1]
            texts.append(json.loads(line)["body"])
            assert texts[-1].startswith(place.excerpt) and len(place.excerpt) == report.EXCERPT
            assert f"{place.file} row {place.row}" in lines[-1]
        assert texts[0] not in all_texts(found)
        assert pair.similarity >= 0.8 and f"({pair.similarity:.2f} like " in lines[-1]
    assert lines[-1].startswith(f"dropped {COUNT} near duplicates, such as ")


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_any_number_of_tasks_and_any_sizes_give_the_same_bytes(
    tasks: int, corpus: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    c = config_of(corpus, deduplicate="near")
    expected = content(prepare.prepare(c, str(tmp_path / "first"), silent).path)
    set_sizes(
        small, part_bytes=[10**9, 20_000, 1][tasks - 1], run_bytes=[10**9, 900, 5000][tasks - 1]
    )
    small.setattr(near, "_tasks", lambda found: tasks)
    small.setattr(runs, "FAN_IN", [64, 2, 5][tasks - 1])
    assert content(prepare.prepare(c, str(tmp_path / "again"), silent).path) == expected


def test_over_ray_it_gives_the_same_bytes(
    ray_session: None, corpus: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    c = config_of(corpus, deduplicate="near")
    expected = content(prepare.prepare(c, str(tmp_path / "here"), silent).path)
    small.undo()
    with pytest.MonkeyPatch.context() as patch:
        set_sizes(patch)
        patch.setattr(runs, "FAN_IN", 3)
        patch.setattr(near, "_tasks", lambda found: 3)
        assert content(prepare.prepare(c, str(tmp_path / "ray"), silent).path) == expected


def test_the_same_documents_in_other_files_give_the_same_documents(
    corpus: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line)["body"] for f in sorted(corpus.iterdir()) for line in f.open()]
    random.Random(9).shuffle(rows)
    others = write_rows(tmp_path / "others", [rows[:50], rows[50:]])
    first = prepare.prepare(config_of(corpus, deduplicate="near"), str(tmp_path / "1"), silent)
    tokenizer = str(Path(first.path) / "encoding.json")
    keys = {"deduplicate": "near", "tokenizer": tokenizer, "vocab_size": None}
    second = prepare.prepare(config_of(others, **keys), str(tmp_path / "2"), silent)
    assert all_texts(first) == all_texts(second)


# --- the splits ----------------------------------------------------------------------------------


def test_no_document_of_train_is_a_near_duplicate_of_one_of_val(
    corpus: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    exact = prepare.prepare(config_of(corpus, name="exact"), str(tmp_path), silent)
    found = prepare.prepare(config_of(corpus, deduplicate="near"), str(tmp_path), silent)
    originals, copies = with_copies()
    val, kept_val = set(texts_of(exact, "val")), set(texts_of(found, "val"))
    mixed = 0
    for text in originals:
        group = {text, *copies[text]}
        if group & val:
            mixed += bool(group - val)
            assert group & kept_val and not group & set(texts_of(found, "train"))
    assert mixed > 3
    assert kept_val <= val


def test_a_val_split_that_is_given_apart_loses_nothing_to_train(
    tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    originals, copies = with_copies()
    changed = [copies[text][0] for text in originals if copies[text]]
    write_rows(tmp_path / "train", [originals])
    write_rows(tmp_path / "val", [changed + originals[:1]])
    keys = {"val_source": str(tmp_path / "val"), "val_fraction": 0.05}
    found = prepare.prepare(
        config_of(tmp_path / "train", deduplicate="near", **keys), str(tmp_path), silent
    )
    assert sorted(texts_of(found, "val")) == sorted(changed + originals[:1])
    without = [text for text in originals[1:] if not copies[text]]
    assert sorted(texts_of(found, "train")) == sorted(without)


# --- the other settings --------------------------------------------------------------------------


def test_exact_is_the_default_and_its_recipe_and_manifest_are_as_before(
    corpus: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    c = config_of(corpus)
    assert c == config_of(corpus, deduplicate="exact")
    assert set(c.recipe()) == {
        "source", "shuffle_seed", "decontaminate", "decontaminate_ngram", "tokenizer",
        "vocab_size", "val_fraction",
    }  # fmt: skip
    found = prepare.prepare(c, str(tmp_path), silent)
    stored = json.loads((Path(found.path) / "MANIFEST.json").read_text())
    assert set(stored["dropped"]) == {"empty", "contaminated", "duplicate"}
    assert "near_pairs" not in stored
    assert len(all_texts(found)) == len(set(all_texts(found))) == 2 * COUNT + 1


def test_with_none_every_copy_is_kept(
    corpus: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    found = prepare.prepare(config_of(corpus, deduplicate="none"), str(tmp_path), silent)
    assert found.dropped == {"empty": 1, "contaminated": 0, "duplicate": 0}
    rows = [json.loads(line)["body"] for f in corpus.iterdir() for line in f.open()]
    assert sorted(all_texts(found)) == sorted(row for row in rows if row)


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ({}, {"deduplicate": "near"}, "deduplicate=exact, but the config says near"),
        ({"deduplicate": "none"}, {}, "deduplicate=none, but the config says exact"),
        (
            {"deduplicate": "near"},
            {"deduplicate": "near", "deduplicate_similarity": 0.9},
            "deduplicate_similarity=0.8, but the config says 0.9",
        ),
    ],
)
def test_a_dataset_is_not_taken_for_one_with_other_copies(
    was: dict[str, Any], now: dict[str, Any], said: str,
    corpus: Path, tmp_path: Path, here: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    prepare.prepare(config_of(corpus, **was), str(tmp_path), silent)
    with pytest.raises(DataError, match=said):
        prepare.find(config_of(corpus, **now), str(tmp_path))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"deduplicate": "fuzzy"}, "deduplicate"),
        ({"deduplicate": "near", "deduplicate_similarity": 0.2}, "valid are 0.3 to below 1"),
        (
            {"deduplicate_similarity": 0.9},
            "deduplicate_similarity is for deduplicate=near: omit it",
        ),
    ],
)
def test_a_value_without_an_effect_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_dict(PrepareConfig, keys)


# --- stops, changes, decontamination -------------------------------------------------------------


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.long)])
def test_stopped_at_any_write_it_ends_with_the_same_bytes(
    every: int, corpus: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    c = config_of(corpus, deduplicate="near")
    expected = content(prepare.prepare(c, str(tmp_path / "whole"), silent).path)
    for write in range(1, 1000, every):
        for named in (False, True):
            home = str(tmp_path / f"{write}-{named}")
            with killed_at(write, named):
                prepare.prepare(c, home, silent)
                assert write > 40
                return  # there are fewer writes than that
            prepare.prepare(c, home, silent)
            assert content(c.folder(home)) == expected
            shutil.rmtree(home)


def test_stopped_again_and_again_it_ends_with_the_same_bytes(
    corpus: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    c = config_of(corpus, deduplicate="near")
    expected = content(prepare.prepare(c, str(tmp_path / "whole"), silent).path)
    attempts = 0
    while prepare.find(c, str(tmp_path)) is None:
        attempts += 1
        assert attempts < 60
        with killed_at(8 + attempts, named=True):  # a task may write more files than eight
            prepare.prepare(c, str(tmp_path), silent)
    assert attempts > 5
    prepare.prepare(c, str(tmp_path), silent)
    assert content(c.folder(str(tmp_path))) == expected


def test_another_version_of_the_signatures_starts_over(
    corpus: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    c = config_of(corpus, deduplicate="near")
    with killed_at(12, named=True):
        prepare.prepare(c, str(tmp_path), silent)
    lines: list[str] = []
    small.setattr(near, "SEED", 1)
    prepare.prepare(c, str(tmp_path), lines.append)
    assert lines[1].startswith(f"preparing {c.folder(str(tmp_path))} from the start: ")


def test_a_corpus_that_has_changed_is_prepared_again(
    tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    corpus = write_copies(tmp_path / "rows")
    keys = dataclasses.asdict(config_of(corpus, deduplicate="near"))
    c = from_dict(DataConfig, {**keys, "on_changed": "prepare"})
    (first,) = mixture.open_datasets(c, str(tmp_path), silent)
    with (corpus / "0.jsonl").open("a") as f:
        f.write(json.dumps({"body": with_copies()[0][0] + " one more"}) + "\n")
    (again,) = mixture.open_datasets(c, str(tmp_path), silent)
    assert again.dropped["near_duplicate"] == first.dropped["near_duplicate"] + 1
    assert Path(f"{first.path}-before-1").exists()


def test_what_is_contaminated_is_not_kept_for_its_near_duplicates(
    corpus: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    """It is dropped first: a near duplicate without the example's words takes its place."""
    originals, copies = with_copies()
    text = next(text for text in originals if len(copies[text]) == 2)
    examples = tmp_path / "examples.txt"
    words = text.split()
    examples.write_text(" ".join(words[14:27]))  # not in the copy with another word there
    keys = {"deduplicate": "near", "decontaminate": [str(examples)]}
    found = prepare.prepare(config_of(corpus, **keys), str(tmp_path), silent)
    clean = next(copy for copy in copies[text] if " ".join(words[14:27]) not in copy)
    assert clean in all_texts(found)
    assert found.dropped["contaminated"] >= 2
    assert groups_kept(found)[text] == 1


def test_no_working_file_stays(corpus: Path, tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    made: set[str] = set()
    real = passes.run

    def listed(*arguments: Any) -> list[dict[str, Any]]:
        found = real(*arguments)
        made.update(file.name for file in (tmp_path / "data/rows/work").iterdir())
        return found

    small.setattr(passes, "run", listed)
    found = prepare.prepare(config_of(corpus, deduplicate="near"), str(tmp_path), silent)
    assert all(prepare.WORKING_FILES.fullmatch(name) for name in made)
    kinds = {name.rpartition("-")[0].rstrip("-0123456789") for name in made}
    assert {"part", "match", "star", "merge-train", "merge-bands", "merge-match"} <= kinds
    assert not (Path(found.path) / passes.WORK).exists()
