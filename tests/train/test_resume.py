"""What a run that resumes says about its learning rate and its val loss, and what it keeps."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta import layout
from manta.config import load
from manta.train.checkpoints import checkpoint
from manta.train.checkpoints.checkpoint import CheckpointConfig, TrainState
from manta.train.resume import with_length, with_sample
from manta.train.settings import PretrainConfig
from manta.train.step.schedule import lr_at

few = settings(deadline=None, max_examples=25)
PEAK = 3e-3


def config(steps: int, *arguments: str) -> PretrainConfig:
    length = ["model.context_length=32", "tokens_per_batch=64", f"total_tokens={64 * steps}"]
    return load(PretrainConfig, [*length, *arguments])


def resumed(
    c: PretrainConfig, state: TrainState, peak: float = PEAK
) -> tuple[TrainState, list[str]]:
    said: list[str] = []
    return with_length(c, state, peak, said.append), said


def trained(c: PretrainConfig, state: TrainState, until: int) -> tuple[TrainState, list[float]]:
    """Acts like the loop from the state's step on, and like a checkpoint after it."""
    found = []
    for step in range(state.step, until):
        state.lr = PEAK * lr_at(step, c.total_steps, 1.0, c.schedule, state.extension)
        state.step = step + 1
        found.append(state.lr)
    return state, found


def saved_and_read(state: TrainState, folder: Path) -> TrainState:
    folder.mkdir(exist_ok=True)
    (folder / layout.STATE).write_text(json.dumps(dataclasses.asdict(state)))
    return checkpoint.load_state(str(folder))


@few
@given(
    st.sampled_from(["cosine", "linear", "wsd"]),
    st.integers(1, 40),
    st.integers(1, 39),
    st.integers(0, 20),
)
def test_a_run_that_resumes_again_keeps_the_rates_of_its_extension(
    tmp_path_factory: pytest.TempPathFactory, kind: str, place: int, more: int, second: int
) -> None:
    """The extension is at `place` of 40 steps; another resume is `more` steps later, and a second
    extension `second` steps after that one."""
    folder = tmp_path_factory.mktemp("run")
    keys = [f"schedule.kind={kind}", "schedule.extend=continue"]
    short, longer, longest = (config(n, *keys) for n in (40, 80, 120))
    state, rates = trained(short, resumed(short, TrainState())[0], place)
    state, said = resumed(longer, saved_and_read(state, folder))
    assert len(said) == 1 and "the run ends at step 80 instead of 40" in said[0]
    whole = trained(longer, dataclasses.replace(state), 80)[1]
    # Another resume, even without the key, changes nothing and says nothing.
    state, first = trained(longer, state, min(place + more, 79))
    plain = config(80, keys[0])
    state, said = resumed(plain, saved_and_read(state, folder))
    assert said == []
    state, rest = trained(plain, state, min(state.step + second, 79))
    assert first + rest == whole[: len(first + rest)]
    # The second extension goes on from there, and ends at the lowest rate.
    state, said = resumed(longest, saved_and_read(state, folder))
    (line,) = said
    assert f"goes from {state.lr:.2e} (step {state.step})" in line and line.endswith("=continue)")
    rates += first + rest
    rates += trained(longest, state, 120)[1]
    assert len(rates) == 120
    low = PEAK * longest.schedule.min_lr_ratio
    assert rates[-1] == pytest.approx(low) and max(rates) <= PEAK * (1 + 1e-9)
    climb = max(1, rates.index(max(rates)))
    assert all(b <= a * (1 + 1e-9) for a, b in zip(rates[climb:], rates[climb + 1 :], strict=False))


def test_a_run_that_becomes_longer_says_from_which_rate_to_which() -> None:
    """The default, rewarm, is the rate of a run that had the new length from the start."""
    short, longer = config(100), config(200)
    state, _ = trained(short, resumed(short, TrainState())[0], 100)
    state, said = resumed(longer, state)
    assert said == [
        "the run ends at step 200 instead of 100: the learning rate goes from 3.00e-04 (step 100) "
        "to 1.68e-03 (schedule.extend=rewarm; schedule.extend=continue goes on from where it is)"
    ]
    assert state.extension is None and state.total_steps == 200
    assert trained(longer, state, 200)[1] == [
        PEAK * lr_at(step, 200, 1.0, longer.schedule) for step in range(100, 200)
    ]


def test_another_schedule_at_the_same_length_is_said() -> None:
    c = config(100)
    state, _ = trained(c, resumed(c, TrainState())[0], 50)
    assert resumed(c, dataclasses.replace(state))[1] == []
    (line,) = resumed(config(100, "schedule.kind=linear"), dataclasses.replace(state))[1]
    assert line.startswith("the config has another schedule or peak than before: ")
    (line,) = resumed(c, state, 2 * PEAK)[1]
    after = lr_at(50, 100, 2 * PEAK, c.schedule)
    assert line.endswith(f"goes from {state.lr:.2e} (step 50) to {after:.2e}")


def test_a_state_of_an_earlier_version_has_no_plan_and_says_nothing(tmp_path: Path) -> None:
    (tmp_path / layout.STATE).write_text(json.dumps({"step": 5, "val_loss": 1.0}))
    state, said = resumed(config(100), checkpoint.load_state(str(tmp_path)))
    assert said == [] and (state.total_steps, state.extension, state.lr) == (100, None, None)


# --- the sample of the val split -----------------------------------------------------------------


@pytest.mark.parametrize("before", [{}, {"a": 640}, {"b": 1280}])
def test_val_losses_of_another_sample_are_not_the_best_any_more(before: dict[str, int]) -> None:
    said: list[str] = []
    best: dict[str, Any] = {"step": 7, "val_loss": 2.0, "best_val_loss": 1.5, "evals_since_best": 3}
    state = with_sample(TrainState(val_sample=before, **best), {"a": 1280}, said.append)
    assert (state.val_loss, state.best_val_loss, state.evals_since_best) == (None, None, 0)
    (line,) = said
    assert "than before step 7" in line and "1,280 tokens" in line and "eval.tokens" in line
    again = dataclasses.replace(state, best_val_loss=1.4)
    assert with_sample(again, {"a": 1280}, said.append) == again
    assert with_sample(TrainState(), {"a": 1280}, said.append).val_sample == {"a": 1280}
    assert len(said) == 1


@few
@given(st.lists(st.tuples(st.integers(0, 2), st.none() | st.floats(0, 9)), min_size=1, max_size=9))
def test_the_best_checkpoint_of_each_sample_is_kept(
    tmp_path_factory: pytest.TempPathFactory, saves: list[tuple[int, float | None]]
) -> None:
    run = tmp_path_factory.mktemp("run")
    samples = [{}, {"a": 640}, {"a": 1280}]
    for step, (sample, loss) in enumerate(saves, 1):
        folder = Path(layout.checkpoint_folder(str(run), step))
        folder.mkdir(parents=True)
        saved_and_read(TrainState(step, loss, samples[sample]), folder)
        (folder / layout.MANIFEST).write_text("{}")
    gone = checkpoint.prune(str(run), CheckpointConfig(keep=1))
    kept = {layout.step_of(path) for path in checkpoint.find(str(run))}
    expected = {len(saves)}
    for sample in range(3):
        losses = [(v, i) for i, (s, v) in enumerate(saves, 1) if s == sample and v is not None]
        expected |= {min(losses)[1]} if losses else set()
    assert kept == expected and len(gone) == len(saves) - len(kept)
