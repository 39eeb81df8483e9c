"""Preparing several times at once, and in an object store."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from helpers.datasets import refusal
from helpers.preparing import config_of, content, in_this_process, set_sizes, silent
from manta import lock
from manta.data import manifest as manifests
from manta.data import passes, prepare
from manta.data.manifest import Manifest
from manta.data.shuffle import Scatter
from manta.errors import DataError


def test_of_two_at_once_one_prepares_and_the_other_is_told_who(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    c, home = config_of(source), str(tmp_path)
    started, may_go_on = threading.Event(), threading.Event()

    def slow(task: passes.Task, indexes: list[int]) -> Iterable[dict[str, Any]]:
        started.set()
        assert may_go_on.wait(60)
        return in_this_process(task, indexes)

    here.setattr(passes, "over_ray", slow)
    first = threading.Thread(target=prepare.prepare, args=(c, home, silent))
    first.start()
    assert started.wait(60)
    try:
        said = refusal(lambda: prepare.prepare(c, home, silent))
        assert said.startswith(f"preparing {c.folder(home)}: process {os.getpid()} on ")
        assert "wait until it has ended" in said
    finally:
        may_go_on.set()
        first.join()
    assert prepare.prepare(c, home, silent) == prepare.find(c, home)
    assert content(c.folder(home)) == content(dataset.path)


def test_of_many_at_once_the_dataset_is_whole(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    """A refused process tries again, so the end of one meets the start of others."""
    c, home = config_of(source), str(tmp_path)
    found: list[Manifest] = []
    others: list[BaseException] = []

    def persistent() -> None:
        while True:
            try:
                found.append(prepare.prepare(c, home, silent))
                return
            except DataError as e:
                if "wait until it has ended" not in str(e):
                    others.append(e)
                    return
            except BaseException as e:
                others.append(e)
                return
            threading.Event().wait(0.01)

    threads = [threading.Thread(target=persistent) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert others == []
    assert {manifest.sha256 for manifest in found} == {dataset.sha256}
    assert len(found) == 4
    assert content(c.folder(home)) == content(dataset.path)


def test_a_home_in_an_object_store_gets_the_same_bytes(
    dataset: Manifest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's local:// stands for an object store: as with s3://, Manta writes nothing in
    place."""
    set_sizes(monkeypatch)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.1)
    c, home = config_of(source), f"local://{tmp_path / 'bucket'}"
    folder = tmp_path / "bucket" / "data" / "rows"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "gather", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.prepare(c, home, silent)
    lines: list[str] = []
    with monkeypatch.context() as patch:  # nothing is left to do for the first pass
        patch.setattr(Scatter, "run", lambda *arguments: 1 / 0)
        made = prepare.prepare(c, home, lines.append)
    assert lines[1:] == [f"resuming the preparation of {home}/data/rows"]
    assert made.path == f"{home}/data/rows"
    assert manifests.load(made.path) == made
    assert content(folder) == content(dataset.path)
    assert not (folder / passes.WORK).exists()
    assert [f.name for f in (tmp_path / "bucket" / "data").iterdir()] == ["rows"]  # and no lease
