"""A ladder that is really trained: its runs are those that would be trained alone."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from faults.jobs import Job, kill_everything
from helpers.common import ROOT, tiny_arguments
from manta import layout
from manta.config import load
from manta.scaling.answer import answer
from manta.scaling.climbing import left
from manta.scaling.ladder import cost
from manta.scaling.settings import ScalingConfig
from manta.train.checkpoints import checkpoint
from manta.train.pretrain import pretrain
from manta.train.records import history
from manta.train.settings import PretrainConfig

pytestmark = pytest.mark.long
LADDER = ["ladder.sizes=[16,32,48]", "ladder.tokens=[2048,4096,7680]", "ladder.grow=width"]


def arguments(prepared: Path, corpus: Path, name: str, *more: str) -> list[str]:
    given = [a for a in tiny_arguments(prepared, corpus) if not a.startswith("total_tokens")]
    quiet = ["eval.every=1000", "sample.prompts=[]", "samples=100", "cpus_per_worker=1"]
    return [*given, *quiet, *LADDER, f"name={name}", *more]


def weights(run: PretrainConfig) -> dict[str, Any]:
    return load_file(Path(checkpoint.newest(run.run_folder), layout.WEIGHTS))


@pytest.mark.usefixtures("ray_session")
def test_a_budgets_run_is_the_one_that_would_be_trained_alone(prepared: Path, corpus: Path) -> None:
    c = load(ScalingConfig, arguments(prepared, corpus, "alone"))
    answer(c)
    run = cost(c).stems[0].rungs[1].run
    config = str(Path(run.run_folder, layout.RUN_CONFIG))
    alone = load(PretrainConfig, [config, "name=by-itself"])
    pretrain(alone, lambda _: None)
    ours, theirs = weights(run), weights(alone)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_a_killed_ladder_goes_on(prepared: Path, corpus: Path) -> None:
    """SIGKILL of everything: no run that is finished is begun again."""
    given = arguments(prepared, corpus, "killed")
    job = Job("killed", given, ROOT / "jobs" / "scaling.py")
    job.wait_for("(4 done)", 400)
    kill_everything(job)
    begun = commands(prepared)
    assert (1, True) in begun.values()
    last = Job("killed", given, ROOT / "jobs" / "scaling.py")
    assert last.end(600) == 0, "\n".join(last.lines)
    whole = cost(load(ScalingConfig, given))
    assert not left(whole.stems)
    now = commands(prepared)
    assert all(now[name] == times for name, times in begun.items() if times == (1, True))


def commands(prepared: Path) -> dict[str, tuple[int, bool]]:
    """How often each run of the ladder was begun, and whether it is at its end."""
    found = {}
    for folder in sorted((prepared / "runs" / "killed").iterdir()):
        events, _ = history.read(str(folder)) if folder.is_dir() else ([], None)
        starts = sum(event["event"] == "started" for event in events)
        if starts and (there := checkpoint.find(str(folder))):
            state = checkpoint.load_state(there[-1])
            found[folder.name] = (starts, state.step >= state.total_steps)
    return found
