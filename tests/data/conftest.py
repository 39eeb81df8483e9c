"""Datasets that several test files read: one prepared over Ray, one written shard by shard."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest

from helpers.datasets import SIZES, Data, random_ids, write_dataset
from helpers.preparing import (
    config_of,
    set_sizes,
    silent,
    some_files,
    stopped_before_the_end,
    without_ray,
    write_rows,
)
from manta.data import prepare
from manta.data.manifest import Manifest


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("dataset")
    for seed in itertools.count():
        pieces = [random_ids(10 * seed + i, size) for i, size in enumerate(SIZES.values())]
        manifest = write_dataset(folder, pieces[:3], pieces[3:])
        if manifest.shards[0].size == manifest.shards[1].size:
            break
    return Data(manifest, dict(zip(SIZES, pieces, strict=True)))


@pytest.fixture
def data(original: Data, tmp_path: Path) -> Data:
    """A copy of the dataset, to be damaged."""
    shutil.copytree(original.folder, tmp_path / "copy")
    return Data(
        dataclasses.replace(original.manifest, path=str(tmp_path / "copy")), original.tokens
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    set_sizes(monkeypatch)
    without_ray(monkeypatch)
    return monkeypatch


@pytest.fixture(scope="session")
def rows() -> list[str]:
    return [row for rows in some_files() for row in rows]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), some_files())


@pytest.fixture(scope="session")
def dataset(ray_session: None, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    with pytest.MonkeyPatch.context() as patch:
        set_sizes(patch)
        home = str(tmp_path_factory.mktemp("home"))
        return prepare.prepare(config_of(source), home, silent)


@pytest.fixture(scope="session")
def stopped(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the dataset without its manifest, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        set_sizes(patch)
        without_ray(patch)
        return stopped_before_the_end(config_of(source), tmp_path_factory.mktemp("stopped"))
