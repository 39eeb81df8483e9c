"""The optimizer's state moves exactly from any number of workers and ZeRO stage to any other."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from helpers.ranks import RANKS, STEPS, distance, engine_of, on_ranks, save, train
from manta import layout
from manta.errors import CheckpointError
from manta.train.checkpoints import fragments
from manta.train.step.optimizer import OptimizerConfig

SAVED_BY, HALF = 3, STEPS // 2
KINDS = {
    "adamw": (OptimizerConfig(), (0, 1, 2, 3)),
    "muon": (OptimizerConfig(kind="muon"), (0, 1, 2)),
}
CASES = [(kind, stage) for kind, (_, stages) in KINDS.items() for stage in stages]


def whole_state(folder: Path) -> dict[str, Tensor]:
    """The optimizer's state with each weight's part whole and flat, put together from all files."""
    index = json.loads((folder / "index.json").read_text())
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    found = {}
    for name, entry in index.items():
        found[f"{name}:step"] = torch.tensor(entry["step"] or 0.0)
        for key, parts in entry["parts"].items():
            ordered = list(itertools.chain(*map(fragments.pieces, sorted(parts))))
            ends = [0, *itertools.accumulate(size for _, size, _ in ordered)]
            assert [start for start, _, _ in ordered] == ends[:-1], (name, key)
            pieces = [files[file][f"{name}:{key}"] for _, _, file in ordered]
            found[f"{name}:{key}"] = torch.cat(pieces)
    return found


def run_saving(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    found = {}
    for kind, stage in CASES:
        c, at = KINDS[kind][0], Path(folder, f"{kind}-{stage}")
        engine = engine_of("modern", c, stage)
        train(engine, range(HALF))
        index = save(engine, rank, at)
        found[f"{kind} {stage}"] = train(engine, range(HALF, STEPS))
        start = torch.load(at / "weights.pt")
        again = engine_of("modern", c, stage, start=start)
        fragments.load_state(again, index, at)
        found[f"{kind} {stage} again"] = train(again, range(HALF, STEPS))
    if rank == 0:
        index["embedding.weight"]["parts"]["exp_avg"][0][1] -= 1
        with pytest.raises(CheckpointError, match=r"of embedding.weight's exp_avg: .* damaged"):
            fragments.load_state(again, index, at)
    return found


def run_loading(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    found = {}
    for (kind, saved), stage in itertools.product(CASES, (0, 1, 2, 3)):
        if (kind, stage) in CASES:
            at = Path(folder).parent / "saved" / f"{kind}-{saved}"
            index = json.loads((at / "index.json").read_text())
            start = torch.load(at / "weights.pt")
            engine = engine_of("modern", KINDS[kind][0], stage, start=start)
            assert fragments.files_for(engine, index) <= {file.name for file in at.iterdir()}
            fragments.load_state(engine, index, at)
            to = Path(folder, f"{kind}-{saved}-{stage}")
            save(engine, rank, to)
            same = False
            if rank == 0:
                before, after = whole_state(at), whole_state(to)
                same = before.keys() == after.keys() and all(
                    torch.equal(before[key], after[key]) for key in before
                )
            trained = train(engine, range(HALF, STEPS))
            found[f"{kind} {saved} {stage}"] = (same, trained)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fragments")
    (folder / "saved").mkdir()
    return folder, on_ranks(run_saving, SAVED_BY, folder / "saved")


def test_on_the_same_workers_training_goes_on_bit_for_bit(
    saved: tuple[Path, dict[str, Any]],
) -> None:
    for kind, stage in CASES:
        whole, again = saved[1][f"{kind} {stage}"], saved[1][f"{kind} {stage} again"]
        assert all(torch.equal(whole[name], again[name]) for name in whole), (kind, stage)


@pytest.mark.parametrize("workers", [1, 2])
def test_on_other_workers_and_stages_the_state_is_the_same(
    saved: tuple[Path, dict[str, Any]], workers: int
) -> None:
    folder, expected = saved
    (folder / f"on-{workers}").mkdir()
    found = on_ranks(run_loading, workers, folder / f"on-{workers}")
    assert len(found) == 4 * 4 + 3 * 3
    for case, (same, weights) in found.items():
        kind, stage, _ = case.split()
        assert same, case
        assert distance(weights, expected[f"{kind} {stage}"]) < 1e-4, case


def share(rank: int, spans: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """What a rank says of its share, if it has these (start, size) of weights."""
    return {
        "file": layout.rank_file(rank),
        "starts": {name: start for name, (start, _) in spans.items()},
        "sizes": {name: {"exp_avg": size} for name, (_, size) in spans.items()},
        "steps": dict.fromkeys(spans, 7.0),
    }


@given(
    weights=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    ranks=st.integers(1, 9),
    low=st.integers(0, 50),
    size=st.integers(1, 50),
)
def test_an_index_names_each_piece_whether_ranks_split_the_weights_or_their_line(
    weights: list[int], ranks: int, low: int, size: int
) -> None:
    """Stage 3 splits each weight over all ranks, stages 1 and 2 the line of all weights."""
    ends = list(itertools.accumulate(weights))
    each = -(-ends[-1] // ranks)
    line, split = [], []
    for rank in range(ranks):
        spans: dict[str, tuple[int, int]] = {}
        parts: dict[str, tuple[int, int]] = {}
        for index, (numel, end) in enumerate(zip(weights, ends, strict=True)):
            first = max(rank * each, end - numel)
            if first < (stop := min((rank + 1) * each, end)):
                spans[f"w{index}"] = (first - (end - numel), stop - first)
            part = -(-numel // ranks)
            if rank * part < numel:
                parts[f"w{index}"] = (rank * part, min(part, numel - rank * part))
        line.append(share(rank, spans))
        split.append(share(rank, parts))
    for shares in (line, split):
        index = fragments.index_of(shares)
        for name, entry in index.items():
            runs = entry["parts"]["exp_avg"]
            wanted = [
                (s["starts"][name], s["sizes"][name]["exp_avg"], s["file"])
                for s in shares
                if name in s["starts"]
            ]
            assert len(runs) <= 3
            assert list(itertools.chain(*map(fragments.pieces, runs))) == wanted
            found = itertools.chain(*(fragments.pieces(run, low, low + size) for run in runs))
            assert list(found) == [p for p in wanted if p[0] < low + size and p[0] + p[1] > low]


assert RANKS == SAVED_BY  # `batches` makes this many
