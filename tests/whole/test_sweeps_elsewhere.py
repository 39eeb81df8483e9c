"""Sweeps in an object store, and of trials with several workers: the same decisions and losses."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.common import tiny_arguments
from manta.config import load
from manta.data import mixture
from manta.errors import ClusterError
from manta.sweep.settings import SweepConfig
from manta.sweep.sweep import sweep
from manta.train.checkpoints import checkpoint

pytestmark = pytest.mark.usefixtures("ray_session")
SHORT = ["total_tokens=2048", "eval.every=1000", "sample.prompts=[]", "cpus_per_worker=1"]
# ASHA decides by the results that are there, so with several lanes by which trial ends first.
SEARCHES = {
    "asha": [
        "sweep.scheduler=asha", "sweep.rungs=2", "sweep.lr=[1e-7,1e-6,2e-3,4e-3]",
        "sweep.tokens_per_batch=[256]", "sweep.max_concurrent=1",
    ],
    "pbt": [
        "sweep.scheduler=pbt", "sweep.exchanges=2", "sweep.lr=[1e-6,1e-3,2e-3,4e-3]",
        "sweep.tokens_per_batch=null", "checkpoint.keep=1",
    ],
}  # fmt: skip


def config(home: str, corpus: Path, name: str, *keys: str) -> SweepConfig:
    arguments = [a for a in tiny_arguments(Path("/"), corpus) if not a.startswith("home=")]
    return load(SweepConfig, [*arguments, *SHORT, f"home={home}", f"name={name}", *keys])


def files(runs: Path, name: str) -> dict[str, Any]:
    folder = runs / name
    lines = (folder / "decisions.jsonl").read_text().splitlines()
    ranking = json.loads((folder / "ranking.json").read_text())
    return {"decisions": list(map(json.loads, lines)), "ranking": ranking}


@pytest.mark.long
@pytest.mark.parametrize("scheduler", SEARCHES)
def test_a_sweep_in_an_object_store_decides_the_same(
    scheduler: str, prepared: Path, corpus: Path, tmp_path: Path
) -> None:
    """fsspec's local:// stands for an object store, in which nothing can be appended."""
    far = f"local://{tmp_path / 'bucket'}"
    keys = SEARCHES[scheduler]
    found = []
    for home, runs in ((str(prepared), prepared / "runs"), (far, tmp_path / "bucket" / "runs")):
        c = config(home, corpus, f"far-{scheduler}", *keys)
        mixture.open_datasets(c.data, c.home_folder, print)
        done = sweep(c)
        assert done.ranking is not None
        found.append(files(runs, c.name))
        for row in done.ranking.rows:
            checkpoint.verify(checkpoint.newest(f"{home}/runs/{row['run']}"))
        assert (runs / c.name / "sweep.html").exists()
    assert found[0] == found[1]


@pytest.mark.long
@pytest.mark.parametrize("scheduler", SEARCHES)
def test_trials_may_have_several_workers(scheduler: str, prepared: Path, corpus: Path) -> None:
    """Two workers, whose sums differ from those of one in rounding alone."""
    found = []
    for workers in (1, 2):
        name = f"workers{workers}-{scheduler}"
        keys = [*SEARCHES[scheduler], f"num_workers={workers}", "zero_stage=1"]
        done = sweep(config(str(prepared), corpus, name, *keys))
        assert done.ranking is not None
        for row in done.ranking.rows:
            state = checkpoint.load_state(checkpoint.newest(f"{prepared}/runs/{row['run']}"))
            assert state.world_size == workers
        rows = [(row["run"].partition("/")[2], row["tokens"]) for row in done.ranking.rows]
        found.append((rows, [row["val_loss"] for row in done.ranking.rows]))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_a_sweep_whose_trials_do_not_fit_says_so(prepared: Path, corpus: Path) -> None:
    c = config(str(prepared), corpus, "crowded", "num_workers=8", "sweep.tokens_per_batch=[256]")
    with pytest.raises(ClusterError, match="num_workers=8 workers of 1 CPU each do not fit"):
        sweep(c)
    assert not (prepared / "runs" / "crowded").exists()
