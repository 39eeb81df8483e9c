"""Datasets, checkpoints and configs of the version before: they open, and runs resume from them.

The fixtures were written by Manta 0.2.0, from a corpus that no longer exists: a home with one
dataset and two runs, each with its checkpoint of step 2, its config and its weights at
step 4. (They stay as they are: whoever changes a format keeps reading this one.)
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.common import ROOT
from manta import layout
from manta.config import load
from manta.data.inspect import InspectConfig, inspect
from manta.train.checkpoints import checkpoint
from manta.train.pretrain import pretrain
from manta.train.settings import PretrainConfig

BEFORE = ROOT / "tests" / "fixtures" / "before"
RUNS = ["adamw", "muon"]


@pytest.fixture
def old_home(tmp_path: Path) -> Path:
    """A copy of the home that tests may write to."""
    shutil.copytree(BEFORE, tmp_path / "home")
    return tmp_path / "home"


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without values that depend on the machine and its
    load."""
    kept = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "val_bpb")
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: record[key] for key in kept if key in record} for record in found]


def test_the_dataset_opens_and_is_whole(old_home: Path) -> None:
    c = load(InspectConfig, [f"home={old_home}", "dataset=animals", "verify=true", "seq_len=32"])
    lines = list(inspect(c))
    assert lines[0] == f"dataset  {old_home}/data/animals"
    assert lines[1] == "source   /home/person/animals.txt"
    assert "300 ids" in lines[2]
    samples = [line for line in lines if line.startswith("\nsample")]
    assert len(samples) == 3 and all(" number " in sample for sample in samples)


@pytest.mark.parametrize("name", RUNS)
def test_the_checkpoint_is_whole_and_loads(old_home: Path, name: str) -> None:
    run = str(old_home / "runs" / name)
    path = layout.checkpoint_folder(run, 2)
    checkpoint.verify(path)
    assert checkpoint.find(run) == [path] and checkpoint.latest(run, say=print) == path
    state = checkpoint.load_state(path)
    assert (state.step, state.optimizer, state.dtype) == (2, name, "fp32")
    evaluated = next(r for r in records(BEFORE / "runs" / name) if r.get("val_loss") and r["step"])
    assert state.val_loss == evaluated["val_loss"]
    model, tokenizer = checkpoint.load_model(path), checkpoint.load_tokenizer(path)
    assert model.config.vocab_size == tokenizer.vocab_size == 300
    logits = model(torch.tensor([tokenizer.encode("The cat number 1")]))
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.long)])
def test_the_run_goes_on_to_the_weights_and_losses_of_before(old_home: Path, name: str) -> None:
    run, said = old_home / "runs" / name, []
    c = load(PretrainConfig, [str(run / "config.yaml"), f"home={old_home}"])
    done = pretrain(c, said.append)
    assert any("resuming at step 2 " in line for line in said)
    assert any("val loss is of another sample of the val split" in line for line in said)
    assert done.checkpoint == layout.checkpoint_folder(str(run), 4)
    expected = load_file(run / "expected-step-4.safetensors")
    found = load_file(Path(done.checkpoint) / "model.safetensors")
    start = load_file(Path(layout.checkpoint_folder(str(run), 2)) / "model.safetensors")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(weight, start[key]) for key, weight in found.items())
    before, now = records(BEFORE / "runs" / name), records(run)
    assert [record["step"] for record in now] == [0, 1, 2, 2, 3, 4, 4]
    assert [r.keys() for r in now] == [r.keys() for r in before]
    for ours, theirs in zip(now[:-1], before[:-1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # The last evaluation is of another sample of the val split: before, it was the beginning.
    assert "val_loss" in now[-1] and now[-1] == pytest.approx(before[-1], rel=0.05)
