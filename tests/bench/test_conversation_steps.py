"""Steps on conversations, measured against steps on documents."""

from pathlib import Path

import pytest

from helpers.common import tiny_model_arguments
from manta.bench.command import bench
from manta.bench.conversations import made_rows
from manta.bench.settings import BenchConfig
from manta.config import load


@pytest.mark.long
def test_steps_on_conversations_are_measured_against_steps_on_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keys = ["what=conversations", "rounds=2", "steps_per_round=1"]
    found = bench(load(BenchConfig, [*tiny_model_arguments(tmp_path), *keys]))
    assert set(found["ratios"]) == {"documents", "documents_masked"}
    assert all(len(ratios) == 2 and min(ratios) > 0 for ratios in found["ratios"].values())
    assert 0 < found["trained_share"] < 1
    assert "of documents, masked" in capsys.readouterr().out


def test_rows_of_made_conversations_are_nearly_full() -> None:
    rows, tokenizer = made_rows(256, seed=0)
    assert rows.shape[1] == 257 and rows.max() < tokenizer.vocab_size
    padding = (rows[:, 1:-1] == tokenizer.start) & (rows[:, :-2] == tokenizer.start)
    assert padding.mean() < 0.02
