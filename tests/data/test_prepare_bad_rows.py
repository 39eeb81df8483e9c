"""Bad rows in preparation: named, or left out and counted in what is said and in the manifest."""

import dataclasses
import json
from pathlib import Path

import pytest

from helpers.datasets import refusal
from helpers.preparing import all_texts, config_of, content, set_sizes, silent, write_rows
from manta.data import decontaminate, inspect, origin, prepare, report, vocabulary
from manta.data import manifest as manifests
from manta.data.recipe import PrepareConfig
from manta.errors import DataError

GOOD = [[f"some words of file {file} and row {row}" for row in range(30)] for file in range(4)]
BAD = '{"body": null}\n{"body": 3}\n{"n": 1}\n{"body": "cut\n'


def corpus(folder: Path, bad_file: int = 2) -> Path:
    """Rows, with bad ones at the end of a file."""
    file = write_rows(folder, GOOD) / f"{bad_file}.jsonl"
    file.write_text(file.read_text() + BAD)
    return folder


def test_bad_rows_are_named_or_left_out_and_counted(
    tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    file = corpus(tmp_path / "rows") / "2.jsonl"
    home = str(tmp_path / "home")
    c = config_of(tmp_path / "rows")
    said = refusal(lambda: prepare.prepare(c, home, silent))
    assert said.startswith(f"{file}, line 31: 'body' is null, not a text; ")
    lines: list[str] = []
    made = prepare.prepare(dataclasses.replace(c, on_bad_rows="skip"), home, lines.append)
    assert sorted(all_texts(made)) == sorted(text for rows in GOOD for text in rows)
    counts = {"missing": 1, "not JSON": 1, "not text": 1, "null": 1}
    assert manifests.load(made.path).skipped == made.skipped == {str(file): counts}
    line = (
        "left out 4 rows without a usable text (1 missing, 1 not JSON, 1 not text, 1 null): "
        f"{file} (1 missing, 1 not JSON, 1 not text, 1 null)"
    )
    assert line in lines
    assert line in report.summary(made).splitlines()
    shown = inspect.inspect(inspect.InspectConfig(home=home, dataset="rows", samples=0))
    assert line in "\n".join(shown).splitlines()
    assert origin.changes(made) == ""


def test_the_remedies_of_a_bad_row_do_not_start_over(
    tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    """Nothing that is done had a bad row, so both remedies go on from there."""
    here.setattr(vocabulary, "SAMPLE_BYTES", 300)
    set_sizes(here, part_bytes=300)
    corpus(tmp_path / "rows", bad_file=3)
    c, home = config_of(tmp_path / "rows"), str(tmp_path / "home")
    skipping = dataclasses.replace(c, on_bad_rows="skip")
    small = dataclasses.replace(c, max_document_bytes=50)
    long = tmp_path / "rows" / "1.jsonl"
    long.write_text(f'{long.read_text()}{{"body": "{"a" * 50}"}}\n')
    said = refusal(lambda: prepare.prepare(small, home, silent))
    assert said.startswith(f"{long}, line 31: a line of more than 50 bytes, but data.max_docu")
    lines: list[str] = []
    assert "3.jsonl, line 31: " in refusal(lambda: prepare.prepare(c, home, lines.append))
    made = prepare.prepare(skipping, home, lines.append)
    folder = c.folder(home)
    assert lines.count(f"resuming the preparation of {folder}") == 2
    other = prepare.prepare(skipping, str(tmp_path / "other"), silent)
    assert content(made.path) == content(other.path)
    assert "a" * 50 in all_texts(made)


def test_the_rows_of_val_source_are_handled_alike(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "train", GOOD)
    file = corpus(tmp_path / "val") / "2.jsonl"
    home = str(tmp_path / "home")
    defaults = {"val_source": str(tmp_path / "val"), "val_fraction": PrepareConfig.val_fraction}
    c = config_of(tmp_path / "train", **defaults)
    assert f"{file}, line 31: " in refusal(lambda: prepare.prepare(c, home, silent))
    made = prepare.prepare(dataclasses.replace(c, on_bad_rows="skip"), home, silent)
    assert list(made.skipped) == [str(file)]
    assert made.documents("val") == made.documents("train") == 120


def test_a_corpus_of_bad_rows_alone_says_so(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows", GOOD)
    c = config_of(tmp_path / "rows", text_key="text", on_bad_rows="skip")
    said = refusal(lambda: prepare.prepare(c, str(tmp_path / "home"), silent))
    assert "the corpus holds no text; left out 120 rows without a usable text (120 missing)" in said


def test_what_is_done_about_bad_rows_is_in_the_recipe_only_if_it_decides_the_tokens(
    tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows", GOOD)
    home = str(tmp_path / "home")
    c = config_of(tmp_path / "rows")
    made = prepare.prepare(c, home, silent)
    assert not {"on_bad_rows", "most_bytes"} & set(made.recipe["source"])
    assert "skipped" not in json.loads((Path(made.path) / "MANIFEST.json").read_text())
    assert prepare.find(dataclasses.replace(c, max_document_bytes=999), home) == made
    assert prepare.find(dataclasses.replace(c, on_bad_rows="skip"), home) == made


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_an_evaluation_file_that_is_too_large_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"text": "short"}\n' + json.dumps({"text": "a b " * 1000}))
    with pytest.raises(DataError, match=r"more than 1,000 bytes, which is data\.max_doc"):
        decontaminate.build([str(tmp_path / name)], 2, 1000)
    assert len(decontaminate.build([str(tmp_path / name)], 2, 10_000).ngrams) >= 2


def test_an_evaluation_file_may_have_long_numbers(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(f'{{"text": "a b c", "n": {"9" * 5000}}}\n')
        assert len(decontaminate.build([str(tmp_path / name)], 2).ngrams) == 2
