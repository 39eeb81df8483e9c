"""Training without damaged row groups: the stream ignores their tokens and no others."""

import dataclasses
import itertools
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.datasets import GROUP, SIZES, A, B, C, Data, chunks, flip, refusal, write_dataset
from manta.data.manifest import Manifest
from manta.data.mixture import make_order
from manta.data.order import PERIOD, Phase, make_stages
from manta.data.stream import IGNORED, Reader

fewer = settings(deadline=None, max_examples=15)
SEQ_LEN = 10


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A dataset in which no token occurs twice, so that a token says where it is from."""
    ends = np.cumsum([7, *SIZES.values()])
    pieces = [np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(ends)]
    manifest = write_dataset(tmp_path_factory.mktemp("numbered"), pieces[:3], pieces[3:])
    return Data(manifest, dict(zip(SIZES, pieces, strict=True)))


def reader_of(manifest: Manifest, **options: Any) -> Reader:
    """A reader for which three batches are about one epoch of the train split."""
    stages = make_stages({}, SEQ_LEN, 10 * SEQ_LEN)
    order = make_order((manifest,), (Phase(0, (PERIOD,)),), stages, 3, SEQ_LEN)
    return Reader((manifest,), order, **options)


GROUPS = [(file, i) for file in (A, B, C) for i in range(-(-SIZES[file] // GROUP))]


@fewer
@given(st.sets(st.sampled_from(GROUPS), max_size=5), st.none() | st.sampled_from([A, B, C]))
@example({(C, 4)}, None)
@example(set(GROUPS), A)
def test_what_is_damaged_is_ignored_and_nothing_else(
    numbered: Data, damaged: set[tuple[str, int]], missing: str | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(numbered.folder, folder, dirs_exist_ok=True)
        manifest = dataclasses.replace(numbered.manifest, path=folder)
        for file, group in damaged:
            flip(Path(folder) / file, chunks(numbered.path(file))[group][0] + 5)
        if missing:
            (Path(folder) / missing).unlink()
        reader = reader_of(manifest, skip_corrupt=True)
        gone = [numbered.tokens[f][i * GROUP : (i + 1) * GROUP] for f, i in damaged]
        gone += [numbered.tokens[missing]] if missing else []
        for batch in (0, 1, 3, 7):
            expected, nothing = reader_of(numbered.manifest).read(batch)
            assert not nothing
            is_gone = np.isin(expected, np.concatenate(gone or [[]]))
            found, notes = reader.read(batch)
            assert np.array_equal(found, np.where(is_gone, IGNORED, expected.astype(np.int32)))
            assert bool(notes) >= is_gone.any()
            for note in notes:
                assert re.match(rf"skipping \d+ tokens: {folder}/train-0000\d.parquet: ", note)
                if missing and missing in note:
                    assert "the file is missing" in note
                else:
                    file, group = re.findall(r"(train-\d+.parquet): row group (\d+) is dam", note)[
                        0
                    ]
                    assert (file, int(group)) in damaged
                    assert "its sha256 is not the one in the footer" in note
            block = reader({"first_batch": [batch]})
            assert np.array_equal(block["tokens"], found)
            assert block["note"][0].splitlines() == notes
            assert not any(block["note"][1:])
        if gone:
            assert folder in refusal(lambda: [reader_of(manifest).read(b) for b in range(12)])


def test_the_notes_name_each_damaged_row_group(numbered: Data, data: Data) -> None:
    shutil.copytree(numbered.folder, data.folder, dirs_exist_ok=True)
    damaged = {(A, 1), (B, 0), (C, 4)}
    for file, group in damaged:
        flip(data.path(file), chunks(data.path(file))[group][0])
    reader = reader_of(
        dataclasses.replace(numbered.manifest, path=str(data.folder)), skip_corrupt=True
    )
    notes = [note for batch in range(9) for note in reader.read(batch)[1]]
    named = {
        (file, int(group))
        for note in notes
        for file, group in re.findall(r"(train-\d+.parquet): row group (\d+) is damaged", note)
    }
    assert named == damaged
