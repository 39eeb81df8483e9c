"""Goodput: all time is accounted for, across restarts and jumps of the clock."""

import json
import time
from pathlib import Path

import pytest

from manta import layout
from manta.train.records import ledger as ledgers
from manta.train.records.ledger import Ledger


def test_causes_add_up_to_the_time_that_passed(tmp_path: Path) -> None:
    began = time.monotonic()
    ledgers.begin(str(tmp_path), time.time() - 2.0)
    ledger = Ledger(str(tmp_path), 0.0)
    with ledger.timing("evaluation"):
        time.sleep(0.05)
    ledger.add("productive", 0.02)
    time.sleep(0.05)
    seconds = ledger.seconds
    passed = time.monotonic() - began
    assert 2.1 <= sum(seconds.values()) <= 2.001 + passed  # (two clocks)
    assert 2.0 <= seconds["start"] <= 1.9 + passed
    assert seconds["evaluation"] >= 0.05 and seconds["other"] >= 0.02
    assert ledger.goodput == pytest.approx(0.02 / sum(ledger.seconds.values()), rel=0.1)


def test_a_restart_counts_what_was_lost(tmp_path: Path) -> None:
    first = Ledger(str(tmp_path), 0.0)
    first.add("productive", 100.0)
    first.write(last=True)
    entry = json.loads((tmp_path / layout.GOODPUT).read_text())
    (tmp_path / layout.GOODPUT).write_text(json.dumps({**entry, "updated": time.time() - 60}))
    ledgers.begin(str(tmp_path), time.time() - 10)
    second = Ledger(str(tmp_path), 30.0)
    seconds = second.seconds
    assert second.starts == 2
    assert seconds["productive"] == pytest.approx(70)
    assert seconds["replay"] == pytest.approx(30)
    assert seconds["down"] == pytest.approx(50, abs=1)
    assert seconds["start"] == pytest.approx(10, abs=1)
    second.write(last=True)
    (line,) = ledgers.table(str(tmp_path))
    assert "goodput" in line and "down" in line and "replay" in line


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_clock_that_jumps_makes_no_time_negative(
    tmp_path: Path, jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(str(tmp_path), 0.0)
    ledger.add("productive", 1.0)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    ledger.write(last=True)
    assert sum(ledger.seconds.values()) < 5  # the process's own time does not jump
    ledgers.begin(str(tmp_path), time.time())
    again = Ledger(str(tmp_path), 0.0)
    assert all(s >= 0 for s in again.seconds.values())


def test_what_ray_starts_again_by_itself_is_counted_once(tmp_path: Path) -> None:
    """This happens in an elastic run, where nobody has begun anything again."""
    ledgers.begin(str(tmp_path), time.time() - 100)
    first = Ledger(str(tmp_path), 0.0)
    first.write(last=True)
    second = Ledger(str(tmp_path), 0.0)
    assert sum(second.seconds.values()) == pytest.approx(100, abs=1)
    assert second.seconds["down"] == 0


def test_time_counts_from_the_first_start_also_if_that_came_to_nothing(tmp_path: Path) -> None:
    now = time.time()
    ledgers.begin(str(tmp_path), now - 100)
    ledgers.begin(str(tmp_path), now - 30)  # the same command again
    first = Ledger(str(tmp_path), 0.0)
    assert first.starts == 1
    assert first.seconds["down"] == pytest.approx(70, abs=1)
    assert first.seconds["start"] == pytest.approx(30, abs=1)


def test_other_ranks_and_damaged_files_count_for_nothing(tmp_path: Path) -> None:
    Ledger(None, 0.0).write(last=True)
    assert list(tmp_path.iterdir()) == [] and ledgers.table(str(tmp_path)) == []
    (tmp_path / layout.GOODPUT).write_text('{"seconds": 3}')
    assert Ledger(str(tmp_path), 5.0).starts == 1


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"seconds": {"down": -1}, "updated": 1, "starts": 1}',
        '{"seconds": {"down": NaN}, "updated": 1, "starts": 1}',
        '{"seconds": {}, "updated": 1e300, "starts": 1}',
        '{"seconds": {}, "updated": 1, "starts": "x"}',
        "[" * 100_000,
    ],
    ids=lambda content: content[:50],
)
def test_a_damaged_ledger_is_said_once_and_kept_and_the_run_goes_on(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / layout.GOODPUT
    file.write_text(content)
    assert ledgers.table(str(tmp_path)) == [] and ledgers.seconds_of(str(tmp_path)) == 0
    ledgers.begin(str(tmp_path), time.time() - 100)
    said = capsys.readouterr().err
    assert said.startswith(f"{file}: ") and said.count("\n") == 1
    (aside,) = tmp_path.glob(f"damaged-{layout.GOODPUT}-*")
    assert aside.read_text() == content
    assert Ledger(str(tmp_path), 5.0).seconds["start"] == pytest.approx(100, abs=1)
