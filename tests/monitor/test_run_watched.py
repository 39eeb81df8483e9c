"""What the watch of a run reads: its plan, and the disk of its home."""

from pathlib import Path

import pytest

from helpers.watching import watched
from manta.monitor.watch import _disks, planned, watching


@pytest.mark.parametrize(
    ("content", "speed", "words"),
    [
        (None, None, None),
        ('{"tokens_per_second": 1234.5, "parameters": 7}', 1234.5, None),
        ('{"tokens_per_second": 0}', None, None),
        ('{"tokens_per_second": "fast"}', None, "tokens_per_second='fast'"),
        ("{}", None, None),
        ('{"tokens_per_second": null}', None, None),
        ("[", None, "not valid JSON"),
    ],
)
def test_a_plan_is_read_and_a_damaged_one_is_said(
    content: str | None, speed: float | None, words: str | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    said: list[str] = []
    assert planned(str(tmp_path), said.append) == speed
    assert [words in line for line in said if words] == ([True] if words else [])
    assert bool(said) == bool(words) and all("goes on without it" in line for line in said)


@pytest.mark.parametrize("home", ["not/there/yet", "s3://bucket/manta"])
def test_a_home_that_is_not_there_yet_or_not_a_disk_has_one(home: str, tmp_path: Path) -> None:
    share = _disks(home if "://" in home else str(tmp_path / home))()
    assert share is not None and 0 <= share <= 1


def test_a_watch_that_hears_nothing_ends(tmp_path: Path) -> None:
    said: list[str] = []
    with watching(watched(tmp_path), said.append):
        pass
    assert said == [] and not (tmp_path / "runs").exists()
