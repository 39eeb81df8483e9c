"""A preparation that is stopped, at any write: the next one continues and gives the same bytes.

Most tests run the two passes in this process, where any write can be the last.
"""

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.datasets import refusal
from helpers.preparing import (
    Killed,
    config_of,
    content,
    killed_at,
    set_sizes,
    silent,
    stopped_before_the_end,
)
from manta import lock, ownership, storage
from manta.config import from_dict
from manta.data import mixture, passes, prepare
from manta.data.manifest import Manifest
from manta.data.recipe import DataConfig, PrepareConfig


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != storage.UNFINISHED]
    return {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in files}


@pytest.mark.parametrize("named", [False, True])
def test_stopped_again_and_again_it_ends_with_the_same_bytes(
    named: bool, dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    c, home = config_of(source), str(tmp_path)
    folder = Path(c.folder(home))
    attempts = 0
    while prepare.find(c, home) is None:
        attempts += 1
        assert attempts < 30
        before = stamps(folder)
        done = {f for f in before if f.suffix == ".json"}
        for file in done:  # the work that a record names is done too
            done = done | {f for f in before if f.name.startswith(f"{file.stem}-")}
            done = done | {f for f in before if f.name == f"{file.stem}.parquet"}
        with killed_at(attempts, named):
            prepare.prepare(c, home, silent)
        if (folder / passes.WORK).exists() or prepare.find(c, home) is None:
            after = stamps(folder)
            assert {f: before[f] for f in done} == {f: after[f] for f in done}
    assert attempts > 5
    prepare.prepare(c, home, silent)  # deletes `work` where the stop was after the manifest
    assert content(folder) == content(dataset.path)
    assert not (folder / passes.WORK).exists()


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.long)])
def test_stopped_at_any_write_it_ends_with_the_same_bytes(
    every: int, dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    expected, c = content(dataset.path), config_of(source)
    lines: list[str] = []
    for write in range(1, 1000, every):
        for named in (False, True):
            home = str(tmp_path / f"{write}-{named}")
            with killed_at(write, named):
                prepare.prepare(c, home, silent)
                assert write > 40
                return  # there are fewer writes than that
            is_committed = prepare.find(c, home) is not None
            lines.clear()
            prepare.prepare(c, home, lines.append)
            assert content(c.folder(home)) == expected
            shutil.rmtree(home)
            if write > 1 and not is_committed:  # the first one is the plan
                assert lines[1:] == [f"resuming the preparation of {c.folder(home)}"]


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(i, marks=pytest.mark.long) for i in range(6, 100))]
)
def test_whatever_is_missing_is_made_again(
    seed: int,
    dataset: Manifest, source: Path, stopped: Path, tmp_path: Path, here: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    draw, folder = random.Random(seed), tmp_path / "data" / "rows"
    shutil.copytree(stopped, folder)
    for record in sorted((folder / passes.WORK).glob("*-*.json")):
        if draw.random() < (0.1, 0.5, 0.9)[seed % 3]:
            record.unlink()
            runs = (folder / passes.WORK).glob(f"{record.stem}-*.arrow")
            for file in (*sorted(runs), folder / f"{record.stem}.parquet"):
                if file.exists() and draw.random() < 0.5:
                    file.unlink()
    for torn in ("train-00000.parquet", "work/part-00000-000-val.arrow", "MANIFEST.json"):
        (folder / f"{torn}.0123abcd{storage.UNFINISHED}").write_bytes(b"PAR1 half of it")
    prepare.prepare(config_of(source), str(tmp_path), silent)
    assert content(folder) == content(dataset.path)


def edit_the_corpus(folder: Path, c: PrepareConfig) -> PrepareConfig:
    with (folder / "rows" / "3.jsonl").open("a") as f:
        f.write('{"body": "one more"}\n')
    return c


def edit_the_examples(folder: Path, c: PrepareConfig) -> PrepareConfig:
    (folder / "examples.txt").write_text("ray manta\n\nmanta sea sea")
    return c


def change(**keys: Any) -> Callable[[Path, PrepareConfig], PrepareConfig]:
    return lambda folder, c: dataclasses.replace(c, **keys)


@pytest.mark.parametrize(
    "edit",
    [
        edit_the_corpus,
        edit_the_examples,
        change(shuffle_seed=5),
        change(vocab_size=270),
        change(decontaminate_ngram=2),
    ],
)
def test_another_corpus_or_config_starts_over_and_says_so(
    edit: Callable[[Path, PrepareConfig], PrepareConfig],
    source: Path, tmp_path: Path, here: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(source, tmp_path / "rows")
    (tmp_path / "examples.txt").write_text("ray manta sea")
    c = config_of(
        tmp_path / "rows",
        decontaminate=[str(tmp_path / "examples.txt")],
        decontaminate_ngram=3,
    )
    first = stopped_before_the_end(c, tmp_path / "home")
    before = content(first)
    c = edit(tmp_path, c)
    lines: list[str] = []
    again = prepare.prepare(c, str(tmp_path / "home"), lines.append)
    assert lines[1:] == [f"preparing {first} from the start: the corpus or the config has changed"]
    fresh = prepare.prepare(c, str(tmp_path / "fresh"), silent)
    assert content(again.path) == content(fresh.path)
    assert any(before.get(shard.file) != content(fresh.path)[shard.file] for shard in fresh.shards)


def test_stopped_while_it_clears_the_folder_for_another_corpus(
    dataset: Manifest, source: Path, stopped: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    """The first config runs again afterwards, when files that its records name may be gone."""
    c, folder = config_of(source), tmp_path / "data" / "rows"
    shutil.copytree(stopped, folder)

    def half(path: str, own: object) -> None:
        next(Path(path).glob("train-*.parquet")).unlink()
        raise Killed

    with here.context() as patch:
        patch.setattr(ownership, "clear", half)
        with pytest.raises(Killed):
            prepare.prepare(dataclasses.replace(c, shuffle_seed=1), str(tmp_path), silent)
    prepare.prepare(c, str(tmp_path), silent)
    assert content(folder) == content(dataset.path)


def test_stopped_just_after_its_commit_it_leaves_nothing_to_the_next_job(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    c, home = config_of(source), str(tmp_path)
    mixed = from_dict(DataConfig, dataclasses.asdict(c))
    work = Path(c.folder(home)) / passes.WORK

    def stop(path: str, own: object) -> None:
        if path == str(work):
            raise Killed

    with here.context() as patch, pytest.raises(Killed):
        patch.setattr(ownership, "clear", stop)
        prepare.prepare(c, home, silent)
    assert work.exists()
    with lock.lock(f"{home}/data/.rows.lock", "preparing it"):  # its owner deletes it
        mixture.open_datasets(mixed, home, silent)
    assert work.exists()
    (found,) = mixture.open_datasets(mixed, home, silent)
    assert content(c.folder(home)) == content(dataset.path)
    assert found.sha256 == dataset.sha256


def test_after_an_error_over_ray_the_rest_is_kept_and_the_next_run_goes_on(
    dataset: Manifest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sizes(monkeypatch)
    c = config_of(source)
    folder = Path(c.folder(str(tmp_path)))
    with killed_at(2, named=True):  # the plan and the tokenizer
        prepare.prepare(c, str(tmp_path), silent)
    # A folder where a file should go: its worker meets an error of the operating system.
    in_the_way = folder / passes.WORK / "part-00001-000-train.arrow"
    in_the_way.mkdir()
    said = refusal(lambda: prepare.prepare(c, str(tmp_path), silent))
    assert said.startswith(f"{folder}: cannot be written (Is a directory)")
    assert said.endswith(passes.RESUME)
    assert prepare.find(c, str(tmp_path)) is None
    in_the_way.rmdir()
    lines: list[str] = []
    prepare.prepare(c, str(tmp_path), lines.append)
    assert lines[1:] == [f"resuming the preparation of {folder}"]
    assert content(folder) == content(dataset.path)
