"""A corpus that has changed since its dataset was prepared: told, and refused unless it may be used
or prepared again."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.datasets import refusal
from helpers.preparing import all_texts, silent
from manta import layout
from manta.config import load
from manta.data import mixture, origin, prepare
from manta.data.manifest import Manifest
from manta.data.recipe import DataConfig
from manta.text import sources, tokenizer
from manta.text.sources import Source

FILES = ("corpus/0.jsonl", "corpus/1.jsonl", "val/0.jsonl", "examples.txt", "encoding.json")


class Place:
    """A folder with a corpus, a val corpus, examples and a tokenizer, and a home."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.home = str(folder / "home")
        for name in FILES[:3]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            rows = [json.dumps({"text": f"document {name} {i}"}) + "\n" for i in range(20)]
            (folder / name).write_text("".join(rows))
        (folder / "examples.txt").write_text("one two three four")
        (folder / "encoding.json").write_bytes(tokenizer.train(["document"], 260).serialized)

    def keys(self, *more: str) -> list[str]:
        return [
            f"source={self.folder}/corpus", f"val_source={self.folder}/val",
            f"decontaminate=[{self.folder}/examples.txt]", "decontaminate_ngram=3",
            f"tokenizer={self.folder}/encoding.json", "name=rows", *more,
        ]  # fmt: skip

    def open(self, *more: str, say: Callable[[str], None] = silent) -> Manifest:
        (found,) = mixture.open_datasets(load(DataConfig, self.keys(*more)), self.home, say)
        return found


@pytest.fixture
def place(tmp_path: Path, here: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path)
    made.open()
    return made


def test_nothing_has_changed(place: Place) -> None:
    lines: list[str] = []
    manifest = place.open(say=lines.append)
    assert len(lines) == 1 and lines[0].startswith("dataset ")
    assert origin.changes(manifest) == ""


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_has_changed_is_refused_or_used(name: str, place: Place) -> None:
    file, before = place.folder / name, place.open()
    key = {"c": "data.source", "v": "data.val_source", "e": "data.decontaminate"}[name[0]]
    key = "data.tokenizer" if name == "encoding.json" else key
    was = file.stat().st_size
    with file.open("a") as opened:
        opened.write("\n")
    change = f"({key}: {file} was {was:,} bytes, is {was + 1:,})"
    said = refusal(place.open)
    assert said.startswith(f"{before.path} was prepared before its sources changed {change}; give ")
    assert "data.on_changed=use" in said and "data.on_changed=prepare" in said
    lines: list[str] = []
    assert place.open("on_changed=use", say=lines.append) == before
    assert any(change in line and line.endswith("used as it is") for line in lines)
    assert change in refusal(place.open)


def test_only_the_content_of_a_file_counts(place: Place) -> None:
    file = place.folder / FILES[0]
    os.utime(file, (1, 1))
    place.open()
    file.write_text(file.read_text().replace("document", "Document"))
    os.utime(file, (1, 1))
    said = refusal(place.open)
    assert f"data.source: {file} was written 20" in said
    assert "is written 1970-01-01 00:00:01 UTC" in said


def test_files_that_are_new_or_gone_are_changes(place: Place) -> None:
    corpus = place.folder / "corpus"
    (corpus / "0.jsonl").rename(corpus / "2.jsonl")
    said = refusal(place.open)
    assert f"(data.source: {corpus}/0.jsonl is gone, {corpus}/2.jsonl is new)" in said
    for i in range(3, 9):
        (corpus / f"{i}.jsonl").write_text("")
    assert "and 5 more)" in refusal(place.open)
    shutil.rmtree(corpus)
    lines: list[str] = []
    place.open(say=lines.append)  # a source that is gone has not changed
    assert any(f"data.source={corpus}: no such file or folder" in line for line in lines)
    place.open("on_changed=prepare")


def test_prepared_again_the_dataset_before_is_set_aside(place: Place) -> None:
    before = place.open()
    assert place.open("on_changed=prepare") == before
    file = place.folder / FILES[0]
    for number in (1, 2):
        old = all_texts(place.open())
        file.write_text(json.dumps({"text": f"a new text {number}"}))
        lines: list[str] = []
        now = place.open("on_changed=prepare", say=lines.append)
        aside = f"{before.path}-before-{number}"
        assert f"set aside: {before.path} is {aside} now" in lines
        assert f"a new text {number}" in all_texts(now)
        kept = mixture.open_datasets(
            load(DataConfig, [f"mix={{rows-before-{number}: 1}}", "on_changed=use"]),
            place.home,
            silent,
        )
        assert all_texts(kept[0]) == old
        assert place.open() == now


def test_the_datasets_of_a_mix_are_compared_too(place: Place) -> None:
    (place.folder / FILES[1]).write_text("")
    keys = ["mix={rows: 1}"]

    def opened(*more: str) -> None:
        mixture.open_datasets(load(DataConfig, [*keys, *more]), place.home, silent)

    said = refusal(opened)
    assert "1.jsonl was" in said and "jobs/prepare.py data.name=rows" in said
    opened("on_changed=use")
    problems = DataConfig(mix={"rows": 1}, on_changed="prepare").problems()
    assert any(line.startswith("on_changed=prepare is for one dataset") for line in problems)


def test_a_dataset_of_the_version_before_opens_as_it_did(place: Place) -> None:
    manifest = place.open()
    (Path(manifest.path) / layout.SOURCES).unlink()
    (place.folder / FILES[0]).write_text("")
    lines: list[str] = []
    assert place.open(say=lines.append) == manifest
    assert len(lines) == 1


def test_a_corpus_that_changes_while_it_is_prepared_is_refused(
    tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    gather, file = prepare.gather, tmp_path / FILES[0]

    def edit_first(*arguments: object) -> list[dict[str, object]]:
        with file.open("a") as opened:
            opened.write("\n")
        return gather(*arguments)  # type: ignore[arg-type]

    with here.context() as patch:
        patch.setattr(prepare, "gather", edit_first)
        said = refusal(place.open)
    assert said.startswith(f"data.source changed while it was being prepared: {file} was ")
    assert prepare.find(load(DataConfig, place.keys()), place.home) is None
    place.open()


def test_a_hub_dataset_has_changed_with_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        "source": sources.identity(Source("hf:owner/name")),
        "decontaminate": [],
        "tokenizer": "bpe",
    }
    manifest = Manifest(
        str(tmp_path), recipe, "bpe", "", 260, 259, "uint16", 64, {}, {}, ()
    )  # fmt: skip
    now: list[str | None] = ["abc"]
    monkeypatch.setattr(sources, "revision", lambda source: now[0])
    origin.save(manifest.path, recipe, origin.states(recipe))
    assert origin.changes(manifest) == ""
    now[0] = "def"
    assert origin.changes(manifest) == "data.source: hf:owner/name was revision abc, is def"
    now[0] = None
    lines: list[str] = []
    assert origin.changes(manifest, lines.append) == ""
    assert len(lines) == 1


def test_a_local_folder_of_hugging_face_has_changed_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_text('{"text": "a"}')
    recipe = {
        "source": sources.identity(Source(f"hf:{tmp_path}/corpus")),
        "decontaminate": [],
        "tokenizer": "bpe",
    }
    manifest = Manifest(
        str(tmp_path), recipe, "bpe", "", 260, 259, "uint16", 64, {}, {}, ()
    )  # fmt: skip
    origin.save(manifest.path, recipe, origin.states(recipe))
    assert origin.changes(manifest) == ""
    (tmp_path / "corpus" / "train.jsonl").write_text('{"text": "ab"}')
    assert "train.jsonl was 13 bytes, is 14" in origin.changes(manifest)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"data.source": 3}',
        '{"data.source": {"a": {"size": "x"}}}',
        '{"data.source": {"a": {"size": 1, "mtime_ns": 1e400}}}',
        '{"data.source": {"a": {}}}',
        "[" * 100_000,
    ],
    ids=lambda content: content[:40],
)
def test_a_damaged_record_of_the_sources_is_said_and_the_dataset_is_used(
    content: str, place: Place
) -> None:
    manifest = place.open()
    file = Path(manifest.path) / layout.SOURCES
    file.write_text(content)
    lines: list[str] = []
    assert place.open(say=lines.append) == manifest
    (said,) = [line for line in lines if "is used without a look at what it was" in line]
    assert f"{file}: " in said and said.endswith("; delete it to have no record")
    assert file.read_text() == content
