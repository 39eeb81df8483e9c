"""The place of an import, and what is left of one, or of an export, that could not end."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.checkpoints import MODELS, model_of, save
from helpers.common import TEXT
from manta import layout, ownership
from manta.config import load
from manta.errors import CheckpointError, ConfigError, DataError
from manta.evaluate.surprise import SurpriseConfig, surprise
from manta.export import huggingface
from manta.export.convert import ExportConfig, ImportConfig, export, import_model
from manta.storage import writing
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint


def silent(line: str) -> None:
    """Takes the lines and drops them."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([TEXT], 300)


@pytest.fixture
def source(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A model of transformers, of some 400 kB."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    huggingface.write(folder, model_of(MODELS["llama, grouped"], 300), tokenizer, "card")
    return folder


def imported(source: Path, home: Path, *more: str) -> Path:
    c = load(ImportConfig, [f"path={source}", f"home={home}", "name=a/mine", *more])
    return Path(import_model(c, silent))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem in memory of 200 kB."""
    where = tmp_path / "disk"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(where)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_an_import_on_a_full_disk_is_one_line_and_leaves_nothing(
    source: Path, small_disk: Path
) -> None:
    home = small_disk / "home"
    with pytest.raises(DataError) as caught:
        imported(source, home)
    words = "step-00000000: cannot be written (No space left on device); free some"
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert files(home) == {layout.RUN_LOCK}
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    checkpoint.verify(str(imported(source, home)))


@pytest.mark.parametrize("to", ["hf", "gguf", "llmc"])
def test_an_export_on_a_full_disk_is_one_line_and_leaves_nothing(
    to: str, small_disk: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    family = "gpt2" if to == "llmc" else "llama, grouped"
    save(model_of(MODELS[family], 300), tokenizer, tmp_path)
    keys = [f"home={tmp_path}", "checkpoint=run", f"to={to}", f"out={small_disk}/x"]
    c = load(ExportConfig, keys)
    with pytest.raises(DataError, match=r"x: cannot be written \(.*another out=") as caught:
        export(c, silent)
    assert "\n" not in str(caught.value) and list(small_disk.iterdir()) == []


def test_a_page_on_a_full_disk_is_one_line(
    small_disk: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    save(model_of(MODELS["llama, grouped"], 300), tokenizer, tmp_path)
    keys = [f"home={tmp_path}", "checkpoint=run", "device=cpu", f"out={small_disk}/x.html"]
    (small_disk / "other").write_bytes(b"x" * 200_000)
    with pytest.raises(DataError, match="cannot be written"):
        surprise(load(SurpriseConfig, [*keys, f"text={TEXT[:300]}"]))
    assert not (small_disk / "x.html").exists()


@pytest.mark.parametrize("left", [1, 2, 3, 4])
def test_what_a_killed_import_left_is_cleared_by_the_next(
    left: int, source: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    path = imported(source, home)
    (path / layout.MANIFEST).unlink()  # it is written last
    for file in sorted(path.iterdir())[left:]:
        file.unlink()
    (path / f"{layout.STATE}.0123abcd.tmp").write_text("half")
    assert imported(source, home) == path
    checkpoint.verify(str(path))
    assert not list(path.glob("*.tmp"))
    with pytest.raises(ConfigError, match="is there already; give another name"):
        imported(source, home)


@pytest.mark.parametrize(
    "other",
    ["notes.txt", "config.yaml", "checkpoints/x", "checkpoints/step-00000000/x"],
)
def test_an_import_clears_nothing_that_is_not_its_own(
    other: str, source: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    path = imported(source, home)
    (path / layout.MANIFEST).unlink()
    (path.parents[1] / other).write_text("mine")
    before = files(home)
    with pytest.raises(ConfigError, match="is there already; give another name"):
        imported(source, home)
    assert files(home) == before


def test_no_run_is_made_inside_another_nor_around_one(source: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    imported(source, home)
    for name, words in (
        ("a/mine/checkpoints", "a/mine is a run, and no run is made inside another"),
        ("a/mine/b", "give another name, such as a-mine-b"),
        ("a", "a/mine is a run, and no run is made around another"),
    ):
        with pytest.raises(ConfigError, match=words):
            imported(source, home, f"name={name}")
        with pytest.raises(ConfigError, match=words):
            checkpoint.check_place(str(home), name)
    assert checkpoint.names_of_runs(str(home)) == ["a/mine"]
    for name in ("a/mine", "a/other", "b", "a-mine"):
        checkpoint.check_place(str(home), name)


def test_a_name_is_an_address_or_a_path_where_it_says_so(tmp_path: Path) -> None:
    home = str(tmp_path)
    assert checkpoint.candidates("a/b", home)[0] == f"{home}/runs/a/b"
    assert checkpoint.candidates("file:///a/b", home) == ["file:///a/b"]
    assert checkpoint.candidates("s3://a/b/", home) == ["s3://a/b"]
    assert checkpoint.candidates("/a/b", home) == ["/a/b"]
    assert checkpoint.candidates("../b", home) == [f"{Path.cwd()}/../b"]


def test_a_checkpoint_is_found_by_its_address(source: Path, tmp_path: Path) -> None:
    path = imported(source, tmp_path / "home")
    for given in (f"file://{path}", f"file://{path.parents[1]}"):
        assert checkpoint.resolve(given, str(tmp_path / "home")) == f"file://{path}"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("x" * 300, "has a name of 300 bytes"),
        ("x/" * 3000, "paths of up to 4095"),
        ("a\0b", "or has a NUL character"),
        ("~nobody-of-this-name/x", "nobody has this name here"),
        ("a\udcff", "this path is not UTF-8"),
    ],
)
def test_what_no_file_can_be_named_is_one_line(given: str, words: str, tmp_path: Path) -> None:
    for use in (
        lambda: checkpoint.resolve(given, str(tmp_path)),
        lambda: import_model(ImportConfig(path=given, home=str(tmp_path)), silent),
        lambda: ownership.new_file(given, "", overwrite=False),
    ):
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            use()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    with pytest.raises(ConfigError, match=words):
        checkpoint.resolve(given, str(tmp_path))


def test_a_list_of_all_runs_has_a_limit(tmp_path: Path) -> None:
    for i in range(57):
        path = tmp_path / "runs" / f"run{i:02}" / "checkpoints" / "step-00000001"
        path.mkdir(parents=True)
        (path / layout.MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match=r"run00, .*, run19, and 37 more\)"):
        checkpoint.resolve("other", str(tmp_path))


def test_the_systems_reason_is_in_the_line() -> None:
    with (
        pytest.raises(DataError, match=r"a/b: cannot be written \(No space left on device\); c"),
        writing("a/b", "c"),
        Path("/dev/full").open("wb", buffering=0) as f,
    ):
        f.write(b"x")
