"""Sources that cannot be prepared: each is refused with one line that names it."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.datasets import refusal
from helpers.preparing import all_texts, config_of, content, set_sizes, silent, write_rows
from manta import layout, storage
from manta.data import passes, prepare, vocabulary
from manta.data.manifest import Manifest
from manta.text import tokenizer


def test_a_missing_corpus_leaves_what_is_there_alone(tmp_path: Path) -> None:
    c = config_of(tmp_path / "none", name="here")
    folder = Path(c.folder(str(tmp_path)))
    folder.mkdir(parents=True)
    (folder / "file").write_text("x")
    said = refusal(lambda: prepare.prepare(c, str(tmp_path), silent))
    assert said == f"data.source={tmp_path / 'none'}: no such file or folder"
    assert (folder / "file").exists()


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "the corpus holds no text"),
        (["", " \n"], "the corpus holds no text"),
        (["one document"] * 3, "none of its 1 documents fell into the val split (dropped: 2 dup"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_a_corpus_without_text_for_both_splits_is_refused(
    trained: bool, texts: list[str], words: str, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"val_fraction": 0.01}
    if not trained:
        (tmp_path / "encoding.json").write_bytes(tokenizer.train(["a b"], 260).serialized)
        keys |= {"tokenizer": str(tmp_path / "encoding.json"), "vocab_size": None}
    c = config_of(write_rows(tmp_path / "rows", [texts]), **keys)
    home = str(tmp_path / "home")
    assert words in refusal(lambda: prepare.prepare(c, home, silent))
    assert prepare.find(c, home) is None
    # With more text, the same config starts over.
    write_rows(tmp_path / "rows", [texts, [f"text {i}" for i in range(1000)]])
    assert prepare.prepare(c, home, silent).documents("val") > 0


def test_bytes_that_are_not_utf8_are_named_over_ray_or_replaced(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sizes(monkeypatch, part_bytes=300)
    # The sample for the tokenizer ends before the bad file: a worker meets it.
    monkeypatch.setattr(vocabulary, "SAMPLE_BYTES", 300)
    folder, home = tmp_path / "texts", str(tmp_path / "home")
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text("\n\n".join(f"good text {i} {n}" for n in range(30)))
    (folder / "3.txt").write_bytes(b"good text\n\nbad \xff text")
    c = config_of(folder, document_bytes=8)
    said = refusal(lambda: prepare.prepare(c, home, silent))
    assert said.startswith(f"{folder}/3.txt, from line 3: not UTF-8 at byte 15 (0xff)")
    assert "data.errors=replace" in said
    assert prepare.find(c, home) is None
    assert not (Path(c.folder(home)) / layout.MANIFEST).exists()
    mended = prepare.prepare(dataclasses.replace(c, errors="replace"), home, silent)
    texts = [text.strip() for text in all_texts(mended)]
    expected = [f"good text {i} {n}" for i in (0, 1, 2, 4) for n in range(30)]
    assert sorted(texts) == sorted([*expected, "good text", "bad \ufffd text"])


def test_a_dataset_of_that_name_from_another_recipe_is_refused(
    dataset: Manifest, source: Path, tmp_path: Path
) -> None:
    home = dataset.path.rpartition("/data/")[0]
    c = config_of(source)
    before = content(dataset.path)
    assert prepare.find(c, home) == prepare.prepare(c, home, silent) == dataset
    changes: dict[str, Any] = {
        "val_fraction=0.2, but the config says 0.3; ": {"val_fraction": 0.3},
        "source.errors=strict, but the config says replace; ": {"errors": "replace"},
        "shuffle_seed=0, but the config says 1; ": {"shuffle_seed": 1},
        "vocab_size=280, but the config says 4096; ": {"vocab_size": None},
        f"source.location={source}, but the config says {tmp_path}; ": {"source": str(tmp_path)},
    }
    for words, keys in changes.items():
        other = dataclasses.replace(c, **keys)
        said = refusal(lambda c=other: prepare.find(c, home))  # type: ignore[misc]
        assert said.startswith(f"{dataset.path} was prepared with {words}")
        assert "give another data.name" in said
    (tmp_path / "a.jsonl").write_text('{"body": "text"}\n')
    refusal(lambda: prepare.prepare(other, home, silent))
    assert content(dataset.path) == before
    assert prepare.find(dataclasses.replace(c, name="elsewhere"), home) is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "no such file"),
        (b"", "not a tokenizer of Manta's"),
        (b"{", "not a tokenizer of Manta's"),
        (b"[]", "not a tokenizer of Manta's"),
        (b"\xff\xfe", "not a tokenizer of Manta's"),
        (b'{"format": "other"}', "not a tokenizer of Manta's"),
        (b'{"format": "manta-bpe-1", "tokens": ["?"]}', "not a tokenizer of Manta's"),
    ],
)
def test_a_bad_tokenizer_file_is_named(
    data: bytes | None, words: str, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "other.json"
    if data is not None:
        file.write_bytes(data)
    c = config_of(source, tokenizer=str(file), vocab_size=None)
    said = refusal(lambda: prepare.prepare(c, str(tmp_path), silent))
    assert said.startswith(f"{file}: {words}")
    if data is not None:
        return
    file.write_bytes(tokenizer.train(["ray manta"], 260).serialized)
    made = prepare.prepare(c, str(tmp_path), silent)
    assert made.tokenizer_sha256 == tokenizer.load(str(file)).sha256


@pytest.mark.parametrize("size", [None, 0, 100])
def test_a_run_that_is_gone_or_torn_is_named_with_the_remedy(
    size: int | None,
    dataset: Manifest, source: Path, stopped: Path, tmp_path: Path, here: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    c, folder = config_of(source), tmp_path / "data" / "rows"
    shutil.copytree(stopped, folder)
    for record in (folder / passes.WORK).glob("train-*.json"):
        record.unlink()
    file = max((folder / passes.WORK).glob("*-train.arrow"))
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size])
    said = refusal(lambda: prepare.prepare(c, str(tmp_path), silent))
    assert said.startswith(f"{file}: cannot be read (")
    assert f"delete {folder} and run the same command again" in said
    shutil.rmtree(folder)
    prepare.prepare(c, str(tmp_path), silent)
    assert content(folder) == content(dataset.path)


def refused_there(folder: Path, words: str, home: Path, **keys: Any) -> None:
    """A preparation into `folder`, HOME/data/mine, is refused, and nothing in the home changes but
    for the lock."""

    def there() -> dict[str, bytes]:
        return {name: data for name, data in content(home).items() if name != "data/.mine.lock"}

    before = there()
    c = config_of(keys.pop("source"), name="mine", **keys)
    said = refusal(lambda: prepare.prepare(c, str(home), silent))
    assert words in said and str(folder) in said
    assert there() == before


def test_what_is_not_mantas_is_neither_cleared_nor_prepared_into(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "mine"
    write_rows(folder, [["a person's own text"] * 9])
    refused_there(folder, "data.source: ", tmp_path, source=folder)
    refused_there(folder, "data.source: ", tmp_path, source=folder / "0.jsonl")
    refused_there(folder, "not a dataset of Manta's, and not empty", tmp_path, source=source)
    for place in (tmp_path, tmp_path / "data", tmp_path / "*"):
        refused_there(folder, "", tmp_path, source=place)
    (tmp_path / "link").symlink_to(folder)
    refused_there(folder, "data.source: ", tmp_path, source=tmp_path / "link")
    (folder / "0.jsonl").rename(tmp_path / "rows.txt")
    (folder / "encoding.json").write_bytes(tokenizer.train(["a b"], 260).serialized)
    for keys in (
        {"tokenizer": f"{folder}/encoding.json", "vocab_size": None},
        {"decontaminate": [f"{folder}/encoding.json"]},
    ):
        refused_there(folder, f"data.{next(iter(keys))}: ", tmp_path, source=source, **keys)
    (folder / "encoding.json").rename(folder / "val-00000.parquet")
    refused_there(folder, "not a dataset of Manta's, and not empty", tmp_path, source=source)
    (folder / "val-00000.parquet").unlink()
    (tmp_path / "elsewhere").mkdir()
    (folder / "work").symlink_to(tmp_path / "elsewhere")
    refused_there(folder, "is a symbolic link", tmp_path, source=source)


def test_a_persons_file_in_the_folder_outlives_every_preparation(
    stopped: Path, dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "rows"
    shutil.copytree(stopped, folder)
    mine = [folder / "notes.tmp", folder / "train-notes.parquet", folder / "work" / "notes.json"]
    for file in mine:
        file.write_text("mine")
    for seed in (1, 0):  # from the start, twice
        c = config_of(source, shuffle_seed=seed)
        if seed == 0:
            (folder / layout.MANIFEST).unlink()
            storage.write_json(str(folder / "work" / "plan.json"), {"format": "manta-data-1"})
        prepare.prepare(c, str(tmp_path), silent)
        prepare.clean_up(c, str(tmp_path))
    assert [file.read_text() for file in mine] == ["mine"] * 3
    left = {str(file.relative_to(folder)) for file in mine}
    assert {k: v for k, v in content(folder).items() if k not in left} == content(dataset.path)
