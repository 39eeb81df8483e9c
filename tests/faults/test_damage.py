"""A damaged newest checkpoint is set aside, and the run continues from the one before."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.damage import DAMAGE
from faults.runs import STEPS, Story, story
from manta import layout
from manta.train.checkpoints import checkpoint

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def whole(prepared: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The run without damage."""
    told = story(prepared, corpus, tmp_path_factory.mktemp("sound"), "sound")
    assert told.error is None
    return told


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_goes_on_from_the_checkpoint_before(
    whole: Story,
    prepared: Path,
    corpus: Path,
    tmp_path: Path,
    note: Callable[..., None],
    damage: str,
) -> None:
    act, words = DAMAGE[damage]
    name = f"damaged-{list(DAMAGE).index(damage)}"
    run, trap = Path(whole.config.run_folder).with_name(name), tmp_path / "code-has-run"
    shutil.copytree(whole.config.run_folder, run)
    newest, before = (Path(p) for p in reversed(checkpoint.find(str(run))[-2:]))
    act(newest, trap)
    told = story(prepared, corpus, tmp_path, name)
    assert told.error is None and not trap.exists()
    assert told.said(words) and told.said(f"resuming at step {layout.step_of(str(before))} ")
    assert len(list(run.glob(f"checkpoints/damaged-{newest.name}-*"))) == 1
    assert told.weights == whole.weights
    assert [r["loss"] for r in told.steps] == [r["loss"] for r in whole.steps]
    seconds = told.seconds_to_step
    lost = STEPS - layout.step_of(str(before))
    happened = "named, set aside; the one before it taken"
    note(f"the newest checkpoint damaged: {damage}", happened, lost, seconds, "identical")
