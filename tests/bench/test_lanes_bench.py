"""The bench of lanes: what a trial costs apart from its steps."""

import pytest

from manta.bench.lanes import gaps


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # Two lanes, each with a second trial, whichever lane is free first.
        ([(0, 10), (1, 12), (11, 20), (12.5, 22)], [1, 0.5]),
        ([(0, 10), (1, 9), (9.25, 20), (10.5, 22)], [0.25, 0.5]),
        # One lane, with three.
        ([(0, 3), (4, 6), (8, 9)], [1, 2]),
    ],
)
def test_a_trial_follows_the_one_that_ended_last_before_it(
    times: list[tuple[float, float]], expected: list[float]
) -> None:
    found = [{"began": began, "ended": ended} for began, ended in times]
    later = found[-len(expected) :]
    assert gaps(found, later) == expected
