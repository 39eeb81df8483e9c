"""The page and the pictures of a sweep."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from helpers.sweeps import Truth, config, simulated
from manta.sweep.findings import findings
from manta.sweep.page import page, write
from manta.sweep.pictures import pictures
from manta.sweep.plan import Plan
from manta.sweep.results import conclude

GRID: dict[str, Any] = {"lr": [5e-4, 1e-3, 2e-3, 4e-3, 64.0], "tokens_per_batch": [1024, 2048]}
TRUTH = Truth(diverges_from=64.0)


def swept(home: Path, **sweep: Any) -> Plan:
    """A simulated sweep in a home, whose runs have some losses on their way."""
    c = dataclasses.replace(config(**sweep), home=str(home))
    plan = simulated(c, TRUTH)
    for standing in plan.standings():
        run = home / "runs" / standing.trial.name
        run.mkdir(parents=True)
        tokens = [8_192, 16_384, *standing.losses]
        losses = [{"tokens": t, "step": t, "val_loss": 3.0 - t / 65_536} for t in tokens]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in losses))
        (run / "goodput.json").write_text('{"seconds": {"productive": 60.0, "start": 3.5}}')
    return plan


class Links(HTMLParser):
    """What a page would fetch, and its texts."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize(
    ("sweep", "shown"),
    [
        ({**GRID, "repeats": 2}, 5),
        pytest.param({"lr": GRID["lr"], "tokens_per_batch": None}, 2, marks=pytest.mark.long),
        pytest.param({**GRID, "scheduler": "asha"}, 5, marks=pytest.mark.long),
        ({"lr": GRID["lr"], "tokens_per_batch": None, "scheduler": "pbt", "exchanges": 4}, 1),
    ],
    ids=str,
)
def test_the_page_is_whole_by_itself_and_the_same_when_made_again(
    tmp_path: Path, sweep: dict[str, Any], shown: int
) -> None:
    plan = swept(tmp_path, **sweep)
    ranking = conclude(plan)
    path = Path(write(plan, ranking))
    data = path.read_bytes()
    write(plan, conclude(plan))
    assert path.read_bytes() == data
    assert len(data) < 1_000_000
    links = Links()
    links.feed(data.decode())
    assert len(links.fetched) == shown
    assert all(link.startswith("data:image/png;base64,") for link in links.fetched)
    text = "\n".join(links.texts)
    assert str(tmp_path) not in text
    for finding in ranking.findings[1:]:
        assert finding.sentence[1:] in text
    assert "Ranking" in text and "What it cost" in text
    assert "Trials that failed or diverged" in text
    assert ("Lineage" in text) == (sweep.get("scheduler") == "pbt")
    saved = json.loads((path.parent / "findings.json").read_text())
    assert [f["sentence"] for f in saved["findings"]] == [f.sentence for f in findings(plan)]


def test_combinations_that_no_run_can_have_are_on_the_page(tmp_path: Path) -> None:
    plan = swept(tmp_path, space={"model.n_head": [2, 3], "model.n_embd": [32, 48]}, lr=None)
    text = page(plan, conclude(plan))
    assert "Combinations that no run can have" in text
    assert "n_head3" in text


def test_pictures_are_drawn_for_what_there_is(tmp_path: Path) -> None:
    ranges = {"optimizer.lr": {"log_uniform": [1e-4, 1e-2]}, "optimizer.kind": ["adamw", "muon"]}
    drawn = swept(tmp_path, space=ranges, lr=None, tokens_per_batch=None, search="random",
                  trials=12)  # fmt: skip
    found = pictures(drawn)
    assert [name.split()[0] for name in found] == ["Val", "Parallel", "Val", "Importance"]
    assert all(data.startswith(b"\x89PNG") for data in found.values())
