"""Alerts: each fault alerts within a minute of its condition, once until it is over, and a healthy
hour has none."""

import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.watching import Story
from manta.config import from_dict
from manta.errors import ConfigError
from manta.messages import WentBack
from manta.monitor import board, figures
from manta.monitor.conditions import CONDITIONS, Condition
from manta.monitor.metrics import DECLARED
from manta.monitor.settings import AlertsConfig
from manta.train.settings import PretrainConfig

NAME = re.compile(r"ray_manta_(\w+)")


def hang(story: Story) -> None:
    story.is_hanging = True


def diverge(story: Story) -> None:
    story.more = {"loss": math.nan}


def go_back(story: Story) -> None:
    story.figures.hear(WentBack("the loss spiked"), story.now)


def slow_down(story: Story) -> None:
    story.slow = 2.0


def wait_for_data(story: Story) -> None:
    story.more = {"data_wait_seconds": 0.04}


def stop_saving(story: Story) -> None:
    story.saves = False


def lose_a_node(story: Story) -> None:
    story.outside["nodes_lost"] = 1.0


def fill_the_disk(story: Story) -> None:
    story.outside["disk_free_share"] = 0.05


# The fault, its alerts, and the seconds after which the first one's condition is fulfilled.
FAULTS: list[tuple[Callable[[Story], None], set[str], int]] = [
    (hang, {"no step", "goodput", "checkpoint"}, 600),
    (diverge, {"loss"}, 0),
    (go_back, {"loss"}, 0),
    (slow_down, {"slower than planned", "slower than before"}, 0),
    (wait_for_data, {"data wait"}, 0),
    (stop_saving, {"checkpoint"}, 600),
    (lose_a_node, {"node lost"}, 0),
    (fill_the_disk, {"disk"}, 0),
]


def test_a_healthy_hour_has_no_alert() -> None:
    story = Story()
    story.go_on(3600)
    assert story.told == []
    found = story.figures.at(story.now)
    assert found["recent_goodput"] > 0.9 and found["speed_of_median"] == pytest.approx(1)
    assert found["checkpoint_intervals"] <= 1.01 and found["speed_of_plan"] == pytest.approx(1.024)


@pytest.mark.parametrize(
    ("fault", "names", "after"), FAULTS, ids=lambda x: getattr(x, "__name__", "")
)
def test_a_fault_alerts_within_a_minute_of_its_condition(
    fault: Callable[[Story], None], names: set[str], after: int
) -> None:
    story = Story()
    story.go_on(1200)
    fault(story)
    since = story.now
    story.go_on(after + 60)
    first = story.told[0]
    assert first[1].name in names and after <= first[0] - since <= after + 60
    print(f"{fault.__name__}: {first[1].name} {first[0] - since - after:.0f} s")
    story.go_on(900)
    assert set(story.on) <= names and len(story.on) == len(set(story.on))  # each once


def test_an_alert_is_told_again_after_it_was_over() -> None:
    story = Story()
    story.go_on(600)
    for _ in range(2):
        lose_a_node(story)
        story.go_on(120)
        story.outside["nodes_lost"] = 0.0
        story.go_on(120)
    assert [(a.name, a.is_over) for _, a in story.told] == [
        ("node lost", False), ("node lost", True), ("node lost", False), ("node lost", True),
    ]  # fmt: skip
    assert story.told[0][1].since == story.told[1][1].since


def test_low_goodput_alerts_once_a_quarter_of_an_hour_is_known() -> None:
    story = Story()
    story.go_on(600)
    while story.now < 2400:  # 20 seconds of steps, then 40 seconds of restarting
        story.is_hanging = story.now % 60 >= 20
        story.go_on(10)
    assert "goodput" in story.on and "no step" not in story.on


def test_a_run_that_logs_rarely_is_not_one_without_steps() -> None:
    story = Story(AlertsConfig(no_step_minutes=1))
    story.go_on(30)
    for _ in range(20):  # a line every 100 seconds
        story.is_hanging = True
        story.go_on(99)
        story.is_hanging = False
        story.go_on(1)
    assert story.on.count("no step") <= 1  # the first gap is not known to be usual


def test_a_restart_is_no_slow_step() -> None:
    story = Story()
    story.go_on(600)
    story.is_hanging = True
    story.go_on(60)
    story.is_hanging, story.starts = False, 2
    story.go_on(600)
    assert story.told == [] and story.figures.at(story.now)["restarts"] == 1


@given(st.sampled_from(CONDITIONS), st.floats(0, 1e6), st.floats(0.01, 0.99))
def test_a_condition_is_one_comparison(condition: Condition, value: float, share: float) -> None:
    """The predicate and Prometheus' expression compare the same figure on the same side."""
    key = condition.setting
    c = AlertsConfig(**({key: share} if key else {}))
    limit = condition.unit * share if key else 0.0
    holds = condition.holds({condition.figure: value}, c)
    assert holds == (value > limit if condition.side == "above" else value < limit)
    assert condition.holds({}, c) is None
    sign = ">" if condition.side == "above" else "<"
    assert f"(ray_manta_{condition.figure}) {sign} on (run, job)" in condition.expression
    assert f'alert_threshold{{alert="{condition.name}"}}' in condition.expression
    assert "{" not in condition.what(value)


def test_rules_and_board_name_only_metrics_that_are_declared() -> None:
    named = {n for c in CONDITIONS for n in NAME.findall(c.expression)}
    named |= {
        n for panel in board.PANELS for query, _ in panel.queries for n in NAME.findall(query)
    }
    assert named <= DECLARED.keys() and len(named) > 30
    assert {c.figure for c in CONDITIONS} <= DECLARED.keys()
    assert len({c.name for c in CONDITIONS}) == len(CONDITIONS)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"webhook": "hooks.slack.com/x"}, "alerts.webhook: not an address"),
        ({"webhook": "ftp://a/b"}, "alerts.webhook: not an address"),
        ({"kind": "slack"}, "alerts.kind=slack is for alerts.webhook"),
        ({"speed": 2}, "alerts.speed"),
        ({"no_step_minutes": 0}, "alerts.no_step_minutes"),
    ],
)
def test_settings_that_cannot_be_are_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        from_dict(PretrainConfig, {"alerts": keys})
    assert str(keys.get("webhook", "no address")) not in str(caught.value)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_nodes_that_left_as_intended_are_not_lost(most: int, gone: int, left: int) -> None:
    alive = max(0, most - gone - left)
    assert figures.lost(most, alive, left) == max(0, most - alive - left)
    assert figures.lost(most, most, 0) == 0
