"""Decontamination: a copy of n words is found however it is set, n - 1 words are not, and errors
name the file."""

import gzip
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta import storage
from manta.data.decontaminate import Decontaminator, build
from manta.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
FIRST = "The quick brown fox jumps over the lazy dog."
SECOND = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich."
ROWS = [
    {"label": 3, "ctx": FIRST, "endings": ["too short", "and also short"], "none": None},
    {"label": 1, "ctx": "short", "endings": ["no", SECOND], "none": None},
]

few = settings(deadline=None, max_examples=50)


def examples(folder: Path, *texts: str) -> str:
    """A file of evaluation examples with these texts."""
    file = folder / "examples.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def unique_words(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{i}é" for i in range(count)]


def reset(words: list[str], seed: int) -> str:
    """The words as someone else would set them: case, spacing, punctuation, line breaks."""
    draw = random.Random(seed)
    text = ""
    for word in words:
        case = draw.choice([str.lower, str.upper, str.capitalize, str])
        text += case(word) + draw.choice([" ", "  ", "\n", "\r\n\r\n", ", ", "... ", "—", "_", "'"])
    return text


# --- what is found -------------------------------------------------------------------------------


@few
@given(
    ngram=st.integers(1, 20),
    more=st.integers(0, 10),
    start=st.integers(0, 10),
    around=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    seed=st.integers(0, 1000),
)
def test_n_words_in_a_row_are_found_and_fewer_are_not(
    tmp_path_factory: pytest.TempPathFactory,
    ngram: int,
    more: int,
    start: int,
    around: tuple[int, int],
    seed: int,
) -> None:
    words = unique_words("eval", ngram + more)
    start = min(start, more)
    decontaminator = build(
        [examples(tmp_path_factory.mktemp("eval"), " ".join(words), "and a short one")], ngram
    )
    before, after = unique_words("before", around[0]), unique_words("after", around[1])
    copied = words[start : start + ngram]
    assert decontaminator.contaminated(reset([*before, *copied, *after], seed))
    assert not decontaminator.contaminated(reset([*before, *copied[:-1], *after], seed))
    assert not decontaminator.contaminated(reset([*before, *copied[1:], *after], seed))
    split = [*copied[: ngram // 2], "between", *copied[ngram // 2 :]]
    if ngram > 1:
        assert not decontaminator.contaminated(reset([*before, *split, *after], seed))
        assert not decontaminator.contaminated(reset([*before, *reversed(copied), *after], seed))


@few
@given(st.lists(st.sampled_from("abc"), max_size=40), st.lists(st.sampled_from("abc"), min_size=3))
def test_it_says_what_a_search_for_each_run_would_say(
    tmp_path_factory: pytest.TempPathFactory, document: list[str], example: list[str]
) -> None:
    decontaminator = build([examples(tmp_path_factory.mktemp("eval"), " ".join(example))], 3)
    runs = {tuple(example[i : i + 3]) for i in range(len(example) - 2)}
    assert len(decontaminator.ngrams) == len(runs)
    shared = any(tuple(document[i : i + 3]) in runs for i in range(len(document) - 2))
    assert decontaminator.contaminated(" ".join(document)) == shared


@few
@given(st.text(max_size=300))
def test_any_text_can_be_asked_about(text: str) -> None:
    assert not Decontaminator(np.zeros(0, np.uint64), 1).contaminated(text)
    highest = Decontaminator(np.array([2**64 - 1], np.uint64), 1)
    assert not highest.contaminated(text)


def test_no_words_are_never_found(tmp_path: Path) -> None:
    decontaminator = build([examples(tmp_path, FIRST)], 1)
    for text in ("", " \n", "?!... —", "_ _", "\ud800"):
        assert not decontaminator.contaminated(text)
    nothing = build([], 5)
    assert len(nothing.ngrams) == 0
    assert not nothing.contaminated(FIRST)


def test_letters_are_the_same_however_they_are_spelt(tmp_path: Path) -> None:
    decontaminator = build([examples(tmp_path, "ein großes Café am Straßenrand")], 5)
    assert decontaminator.contaminated("EIN GROSSES CAFE\u0301 AM STRASSENRAND")


# --- what files hold -----------------------------------------------------------------------------


def write_jsonl(file: Path) -> None:
    file.write_bytes("\n\n".join(json.dumps(row) for row in ROWS).encode())


def write_gzip(file: Path) -> None:
    file.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode()))


def write_json(file: Path) -> None:
    file.write_text(json.dumps({"rows": ROWS}, indent=1, ensure_ascii=False), encoding="utf-8")


def write_text(file: Path) -> None:
    file.write_bytes(f"short\r\n\r\n{FIRST}\n \n\n{SECOND}\n".encode())


def write_parquet(file: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=1)


def write_nested_parquet(file: Path) -> None:
    rows = [{"choices": {"text": [FIRST, SECOND], "label": ["A", "B"]}, "image": b"\xff"}]
    pq.write_table(pa.Table.from_pylist(rows), file)


WRITERS: list[tuple[str, Callable[[Path], None]]] = [
    (".jsonl", write_jsonl),
    (".jsonl.gz", write_gzip),
    (".json", write_json),
    (".json", write_jsonl),
    (".json.gz", write_gzip),
    (".txt", write_text),
    (".md", write_text),
    (".parquet", write_parquet),
    (".parquet", write_nested_parquet),
]


@pytest.mark.parametrize(("ending", "writer"), WRITERS)
def test_every_text_of_a_file_is_known(
    ending: str, writer: Callable[[Path], None], tmp_path: Path
) -> None:
    file = tmp_path / f"rows{ending}"
    writer(file)
    decontaminator = build([str(file)], 9)
    alone = build([examples(tmp_path, FIRST, SECOND)], 9)
    assert decontaminator.ngrams.tolist() == alone.ngrams.tolist()  # and no run of two texts
    assert len(alone.ngrams) == 3
    assert decontaminator.contaminated(f"He wrote: {FIRST.upper()}")
    assert decontaminator.contaminated(SECOND)
    assert not decontaminator.contaminated("quick brown fox jumps over the lazy dog, too")


def test_files_in_an_object_store_are_read(tmp_path: Path) -> None:
    for ending, writer in WRITERS:
        writer(tmp_path / f"rows{ending}")
        path = f"memory://manta-test-decontaminate/rows{ending}"
        storage.upload(tmp_path / f"rows{ending}", path)
        assert build([path], 9).contaminated(FIRST)


def test_several_files_are_one_set(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.md"
    first.write_text(FIRST)
    second.write_text(SECOND)
    both = build([str(first), str(second)], 5)
    assert both.ngrams.dtype == np.uint64
    assert (np.diff(both.ngrams.astype(object)) > 0).all()
    assert both.contaminated(FIRST) and both.contaminated(SECOND)
    assert both.sha256 == build([str(second), str(first), str(second)], 5).sha256
    assert both.sha256 != build([str(first)], 5).sha256
    assert both.sha256 != build([str(first), str(second)], 6).sha256


def test_n_is_part_of_the_digest() -> None:
    ngrams = np.array([1, 2], np.uint64)
    assert Decontaminator(ngrams, 5).sha256 != Decontaminator(ngrams, 6).sha256


# --- everywhere the same -------------------------------------------------------------------------


def test_another_process_makes_the_same_hashes(tmp_path: Path) -> None:
    path = examples(tmp_path, FIRST, SECOND)
    code = f"from manta.data.decontaminate import build; print(build([{path!r}], 4).sha256)"
    digests = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}/platform"}
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, env=environment, capture_output=True
        )
        digests.add(done.stdout.decode().strip())
    assert digests == {build([path], 4).sha256}


def test_the_hashes_never_change(tmp_path: Path) -> None:
    """A dataset's recipe contains the digest, so another hash would invalidate every dataset."""
    assert build([examples(tmp_path, FIRST, SECOND)], 4).sha256 == (
        "bfe35bcb0a6d75d6f3c0299d0e74d2a5f54631a907532a1c5ced90a8c0c56891"
    )


def test_it_survives_pickling(tmp_path: Path) -> None:
    decontaminator = build([examples(tmp_path, FIRST)], 4)
    for original in (decontaminator, build([], 4)):
        data = pickle.dumps(original)
        assert len(data) < 1000
        copy = pickle.loads(data)
        assert (copy.ngram, copy.sha256) == (original.ngram, original.sha256)
        assert copy.ngrams.tolist() == original.ngrams.tolist()
        assert copy.contaminated(FIRST) == original.contaminated(FIRST)


# --- errors --------------------------------------------------------------------------------------


def refusal(path: Path | str, ngram: int = 5) -> str:
    """The error that `build` raises about a file; checks that it names the file."""
    with pytest.raises(DataError) as caught:
        build([str(path)], ngram)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.jsonl")
    assert "no such file" in refusal("memory://manta-test-decontaminate/none.parquet")
    (tmp_path / "folder.json").mkdir()
    assert "a folder" in refusal(tmp_path / "folder.json")


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(FIRST)
    message = refusal(tmp_path / "rows.csv")
    assert "unknown kind" in message and ".jsonl.gz" in message


@pytest.mark.parametrize(("ending", "writer"), [w for w in WRITERS if w[1] != write_text])
def test_a_file_that_was_cut_off_is_refused(
    ending: str, writer: Callable[[Path], None], tmp_path: Path
) -> None:
    file = tmp_path / f"rows{ending}"
    writer(file)
    file.write_bytes(file.read_bytes()[:-5])
    assert "cannot be read" in refusal(file)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".json", ".parquet", ".jsonl"])
def test_a_file_of_another_content_than_its_name_says_is_refused(
    ending: str, tmp_path: Path
) -> None:
    (tmp_path / f"rows{ending}").write_text(FIRST)
    assert "cannot be read" in refusal(tmp_path / f"rows{ending}")
    (tmp_path / f"rows{ending}").write_text("[" * 100_000)
    assert "cannot be read" in refusal(tmp_path / f"rows{ending}")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": b}\n')
    assert "line 2" in refusal(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_bytes_that_are_not_utf8_are_refused(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"rows{ending}").write_bytes(b"abc \xff")
    assert "not UTF-8 at byte 4" in refusal(tmp_path / f"rows{ending}")


def test_a_file_whose_texts_are_all_too_short_is_refused(tmp_path: Path) -> None:
    path = examples(tmp_path, FIRST, SECOND)
    assert len(build([path], 10).ngrams) == 1  # the second's ten words; the first has nine
    assert "none of its 2 texts has 11 words" in refusal(path, 11)
    Path(path).write_text("")
    assert "none of its 0 texts" in refusal(path)


def test_one_bad_file_among_good_ones_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: no such file"):
        build([examples(tmp_path, FIRST), str(tmp_path / "none.txt")], 5)
