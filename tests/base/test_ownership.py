"""What Manta may write over or delete, against folders with a person's files and links in them."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta import ownership, storage
from manta.bench.command import bench
from manta.bench.settings import BenchConfig
from manta.config import load
from manta.errors import ConfigError, DataError
from manta.lock import lock

few = settings(deadline=None, max_examples=50)
paths = st.lists(st.sampled_from(["own", "mine", "a", "b"]), min_size=1, max_size=3).map("/".join)
OWN = re.compile(r"(.*/)?own")


def tree(folder: Path) -> dict[str, str]:
    """Every file under a folder with its text, and every link with where it leads."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else text(path)
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def text(file: Path) -> str:
    return file.read_text()


@pytest.mark.parametrize("place", ["", "local://"])
@few
@given(st.lists(paths, unique=True))
def test_only_own_files_go_and_folders_that_they_leave_empty(
    place: str, tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("home") / "folder"
    for name in names:
        file = folder / name
        if not any(part.is_file() for part in file.parents) and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name)
    before = tree(folder)
    ownership.clear(f"{place}{folder}", OWN)
    expected = {name: content for name, content in before.items() if not OWN.fullmatch(name)}
    assert tree(folder) == expected
    assert folder.exists() == bool(expected)


def test_nothing_is_deleted_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "person").mkdir()
    (tmp_path / "person" / "own").write_text("thesis")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "person")
    (folder / "own").symlink_to(tmp_path / "person" / "own")
    before = tree(tmp_path)
    ownership.clear(str(folder), OWN)
    assert tree(tmp_path) == before
    with pytest.raises(DataError, match=r"/folder/link is a symbolic link.*put the real"):
        ownership.refuse_links(str(folder), ["link"])
    storage.delete_folder(str(folder))
    assert tree(tmp_path) == {"person/own": "thesis"}


def test_unfinished_files_of_a_person_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.tmp").write_text("mine")
    (tmp_path / "a.parquet.0123abcd.tmp").write_text("half")
    storage.remove_unfinished(str(tmp_path))
    assert tree(tmp_path) == {"notes.tmp": "mine"}


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(DataError, match="is a symbolic link"), lock(f"{tmp_path}/.lock", "it"):
        pass
    assert text(tmp_path / "thesis") == "mine"


def refusal(out: Path, overwrite: bool = True, is_folder: bool = False) -> str:
    before = tree(out.parent)
    with pytest.raises(ConfigError) as caught:
        ownership.new_file(str(out), "", overwrite, is_folder)
    assert tree(out.parent) == before
    return str(caught.value)


def test_only_what_an_earlier_job_wrote_is_replaced(tmp_path: Path) -> None:
    file, folder = tmp_path / "page.html", tmp_path / "model"
    file.write_text("thesis")
    assert "it already exists; give overwrite=true" in refusal(file, overwrite=False)
    assert "no earlier manta-files.json says" in refusal(file)
    assert "it is a file" in refusal(file, is_folder=True)
    ownership.record(file)
    assert ownership.new_file(str(file), "", True) == file
    file.write_text("my own words")
    assert "page.html has been changed since Manta wrote it" in refusal(file)

    (folder / "sub").mkdir(parents=True)
    assert "it is a folder" in refusal(folder)
    assert "no earlier" in refusal(folder, is_folder=True)
    (folder / "sub" / "weights").write_text("x")
    ownership.record(folder)
    assert ownership.new_file(str(folder), "", True, is_folder=True) == folder
    (folder / "sub" / "thesis.txt").write_text("mine")
    assert "sub/thesis.txt is not on its manta-files.json" in refusal(folder, is_folder=True)
    (folder / "sub" / "thesis.txt").unlink()
    (folder / "sub" / "weights").unlink()
    assert ownership.new_file(str(folder), "", True, is_folder=True) == folder
    (folder / "sub" / "weights").symlink_to(file)
    assert "sub/weights has been changed" in refusal(folder, is_folder=True)


def test_nothing_is_written_through_a_link_or_under_too_long_a_name(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert "it is a symbolic link" in refusal(tmp_path / "dangling")
    assert not (tmp_path / "nothing").exists()
    assert "longer than 200 bytes" in refusal(tmp_path / ("é" * 101))


def test_in_the_home_a_file_of_mantas_name_is_replaced_but_never_a_folder(tmp_path: Path) -> None:
    default = f"{tmp_path}/runs/compare.png"
    assert ownership.new_file(None, default, True) == Path(default)
    Path(default).write_text("a picture")
    assert ownership.new_file(None, default, True) == Path(default)
    Path(default).unlink()
    Path(default).mkdir()
    with pytest.raises(ConfigError, match="it is a folder"):
        ownership.new_file(None, default, True)


def test_a_scratch_folder_is_new_and_goes_alone(tmp_path: Path) -> None:
    (tmp_path / "bench-data").mkdir()
    (tmp_path / "bench-data" / "mine").write_text("mine")
    with ownership.scratch(str(tmp_path), "bench-data") as path:
        storage.write_bytes(f"{path}/a", b"")
    assert tree(tmp_path) == {"bench-data/mine": "mine"}


def test_only_what_a_killed_process_left_of_its_scratch_folder_goes(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for folder in (outside, tmp_path / ".ray-0123abcd", tmp_path / ".ray-mine", tmp_path / "ray"):
        folder.mkdir()
        (folder / "file").write_text("text")
    (tmp_path / ".ray-01234567").write_text("a file, not a folder")
    (tmp_path / ".ray-89abcdef").symlink_to(outside)
    ownership.remove_scratch(str(tmp_path), ".ray")
    ownership.remove_scratch(str(tmp_path / "nothing"), ".ray")
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == [".ray-01234567", ".ray-89abcdef", ".ray-mine", "outside", "ray"]
    assert (outside / "file").exists()


def test_a_path_is_inside_a_folder_wherever_links_lead(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert ownership.is_inside(f"{tmp_path}/real/a", f"{tmp_path}/link")
    assert ownership.is_inside(f"{tmp_path}/link", f"{tmp_path}/real")
    assert not ownership.is_inside(f"{tmp_path}/real2", f"{tmp_path}/real")
    assert ownership.is_inside("s3://bucket/a/b", "s3://bucket/a")
    assert not ownership.is_inside("s3://bucket/ab", "s3://bucket/a")


@pytest.mark.parametrize("content", ["thesis", "[1]", '{"text": "thesis"}'])
def test_a_bench_does_not_write_over_another_file(tmp_path: Path, content: str) -> None:
    file = tmp_path / "thesis.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="something else than figures of a bench is there"):
        bench(load(BenchConfig, ["what=generate", f"json={file}"]))
    assert text(file) == content
