"""Loss spikes are found where they are and nowhere else, also after a resume."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta import storage
from manta.errors import TrainingError
from manta.train import rollbacks
from manta.train.faults.spikes import FEWEST, Anomaly, Detector, SpikeConfig

losses = st.lists(st.floats(1.0, 3.0), min_size=FEWEST, max_size=200)


def looked(detector: Detector, values: list[float], first: int = 1) -> list[Anomaly]:
    found = (detector.look(first + i, loss, 1.0) for i, loss in enumerate(values))
    return [f for f in found if f is not None]


@given(st.integers(0, 2**32), st.floats(0.005, 0.05))
@settings(max_examples=50, deadline=None)
def test_a_falling_noisy_loss_is_no_spike(seed: int, noise: float) -> None:
    import numpy as np

    random = np.random.default_rng(seed)
    steps = np.arange(1, 1500)
    values = (2 + 8 / np.sqrt(steps)) * (1 + noise * random.standard_normal(len(steps)))
    assert looked(Detector(SpikeConfig(), {}), values.tolist()) == []


@given(losses, st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_a_spike_is_found_at_its_step_and_does_not_enter_the_window(
    values: list[float], more: int
) -> None:
    detector = Detector(SpikeConfig(threshold=30), {})
    before = looked(detector, values)
    state = json.loads(json.dumps(detector.state))
    spikes = looked(detector, [1000.0] * (1 + more), 500)
    assert [f.kind for f in spikes] == ["spike"] * (1 + more)
    assert (spikes[0].first, spikes[0].last) == (500, 500)
    assert detector.state == state
    assert all(f.kind == "spike" for f in before)


@given(losses, st.data())
@settings(max_examples=50, deadline=None)
def test_its_state_goes_through_a_checkpoint(values: list[float], data: st.DataObject) -> None:
    odd = st.sampled_from([math.nan, math.inf, 900.0])
    values = [data.draw(odd) if i % 7 == 6 else v for i, v in enumerate(values)]
    cut = data.draw(st.integers(0, len(values)))
    whole = Detector(SpikeConfig(), {})
    looked(whole, values)
    first = Detector(SpikeConfig(), {})
    looked(first, values[:cut])
    second = Detector(SpikeConfig(), json.loads(json.dumps(first.state)))
    looked(second, values[cut:], cut + 1)
    assert second.state == whole.state
    assert all(math.isfinite(v) for key in ("losses", "norms") for v in whole.state[key])


def test_steps_that_were_not_taken_are_counted_and_too_many_in_a_row_are_reported() -> None:
    detector = Detector(SpikeConfig(max_skipped=3), {})
    looked(detector, [2.0] * FEWEST)
    kinds = []
    for step, norm in enumerate([math.nan, math.inf, 1.0, math.inf, math.inf, math.inf], 100):
        found = detector.look(step, 2.0, norm)
        kinds.append(found.kind if found else None)
    assert kinds == ["skipped", "skipped", None, "skipped", "skipped", "stuck"]
    stuck = detector.look(106, math.nan, 1.0)
    assert stuck is not None and stuck.first == 103 and "loss of step 106 is nan" in stuck.why
    assert Detector(SpikeConfig(action="off"), {}).look(1, math.nan, math.nan) is None


def test_only_skip_limits_the_gradient_norm() -> None:
    for action, is_limited in (("skip", True), ("rollback", False), ("warn", False)):
        detector = Detector(SpikeConfig(action=action), {})
        assert detector.norm_limit == math.inf
        looked(detector, [2.0] * FEWEST)
        assert (detector.norm_limit < math.inf) == is_limited
        assert detector.norm_limit > 1.0


def passed(run: str) -> set[int]:
    found = rollbacks.passed_over(run)
    return {step for step in range(100) if step in found}


def test_going_back_notes_what_is_passed_over_until_it_has_been_often_enough(
    tmp_path: object,
) -> None:
    run = str(tmp_path)
    assert passed(run) == set()
    lines: list[str] = []
    c = SpikeConfig(margin=2, max_rollbacks=2)
    rollbacks.go_back(run, c, Anomaly(10, 12, "the loss jumped", "spike"), lines.append)
    assert passed(run) == {7, 8, 9, 10, 11}  # steps number 8 to 12
    assert "steps 8 to 12" in lines[0] and "back to the start" in lines[0]
    rollbacks.go_back(run, c, Anomaly(1, 1, "again", "spike"), lines.append)
    assert passed(run) == {0, 7, 8, 9, 10, 11}
    before = storage.read_json(f"{run}/rollbacks.json")
    with pytest.raises(TrainingError, match=r"gone back 2 times.*8 to 12, 1 to 1.*optimizer\.lr"):
        rollbacks.go_back(run, c, Anomaly(20, 20, "once more", "spike"), lines.append)
    assert storage.read_json(f"{run}/rollbacks.json") == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "an object: should be a valid list"),
        ("[3]", "0=3: should be a dictionary"),
        ('[{"first": 1, "last": null, "why": ""}]', "0.last=None: should be a valid integer"),
        ('[{"first": 8, "last": 7, "why": ""}]', "last=7 is before first=8"),
        ("[" * 100_000, "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_a_damaged_note_of_what_is_passed_over_is_said_and_stays(
    content: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "rollbacks.json"
    file.write_text(content)
    for read in (
        rollbacks.passed_over,
        lambda run: rollbacks.go_back(run, SpikeConfig(), Anomaly(1, 1, "", "spike"), print),
    ):
        with pytest.raises(TrainingError) as caught:
            read(str(tmp_path))
        assert said in str(caught.value) and str(caught.value).startswith(str(file))
        assert str(caught.value).endswith("; restore the file, or delete it to train on all tokens")
    assert file.read_text() == content


def test_as_many_steps_as_a_note_names_take_no_memory(tmp_path: Path) -> None:
    entry = {"first": 5, "last": 10**300, "why": ""}
    (tmp_path / "rollbacks.json").write_text(json.dumps([entry]))
    assert passed(str(tmp_path)) == set(range(4, 100))
