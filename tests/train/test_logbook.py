"""A run's records: they survive a crash and a resume, and any program can read them."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manta import storage
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.pretrain import Outcome, summary
from manta.train.records.logbook import Logbook, duration, read_metrics
from manta.train.settings import PretrainConfig


def silent(line: str) -> None:
    """Takes the log lines and drops them."""


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": step * 10, "loss": 1 / step, **more}


def log(run: Path | str, steps: range, resumed_step: int = 0) -> None:
    """Acts like a run's process: logs these steps, each with a sample, and ends."""
    logbook = Logbook(str(run), silent, resumed_step)
    for step in steps:
        logbook.log_metrics([record(step)])
        logbook.log_sample(step, "prompt", f"completion {step}")
    logbook.sync()
    logbook.close()


def no_constants(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file; each one is a line of standard JSON, which has no NaN."""
    text = file.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=no_constants) for line in text.split("\n")[:-1]]


def test_metrics_come_back_as_they_were_logged(tmp_path: Path) -> None:
    log(tmp_path / "run", range(1, 4))
    assert read_metrics(str(tmp_path / "run" / "metrics.jsonl")) == [record(s) for s in (1, 2, 3)]
    assert read_metrics(str(tmp_path / "run" / "none.jsonl")) == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_metrics_survive_a_last_line_that_was_cut_off(cut: int, tmp_path: Path) -> None:
    log(tmp_path, range(1, 4))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[: -1 - cut])
    assert read_metrics(str(file)) == [record(1), record(2)]
    log(tmp_path, range(3, 5), resumed_step=2)
    assert lines(file) == [record(s) for s in (1, 2, 3, 4)]


def test_a_last_line_cut_off_within_a_character_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes('{"step": 1}\n{"step": 2, "é'.encode()[:-1])
    assert read_metrics(str(file)) == [{"step": 1}]


BAD = [
    b"{",
    b"[]",
    b"3",
    b"null",
    b'{"step": "x"}',
    b'{"step": -1}',
    b'{"tokens": 3}',
    b"\xff",
    b"",
]
BAD += [b'{"step": 1e400}', b'{"step": 3, "val_loss": []}', b"[" * 100_000, b"x" * 3_000_000]


@pytest.mark.parametrize("bad", BAD, ids=lambda line: repr(line[:20]))
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_damaged_record_is_left_out_once_and_what_was_there_is_kept(
    bad: bytes, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(tmp_path, range(1, 4))
    file = tmp_path / name
    damaged = [*file.read_bytes().splitlines()[:2], bad, file.read_bytes().splitlines()[2]]
    file.write_bytes(b"\n".join(damaged) + b"\n")
    before = file.read_bytes()
    for _ in range(2):
        read_metrics(str(file))
    said = capsys.readouterr().err
    is_bad = name == "metrics.jsonl" or b"val_loss" not in bad
    assert said.count("\n") == (1 if is_bad else said.count("\n"))
    told: list[str] = []
    Logbook(str(tmp_path), told.append, 3).close()
    kept = [file for file in tmp_path.iterdir() if file.name.startswith("damaged-")]
    if is_bad:
        assert [f"{file}, line 3: " in line and "\n" not in line for line in told] == [True]
        assert [file.read_bytes() for file in kept] == [before] and str(kept[0]) in told[0]
    # What follows a line without an end cannot be told apart from it.
    steps = {1, 2} if len(bad) > 1_000_000 else {1, 2, 3}
    assert {r["step"] for r in lines(file)} == steps
    assert Logbook(str(tmp_path), told.append, 3).lost_seconds == 0.0 and len(told) == len(kept)


def test_a_folder_in_place_of_the_metrics_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl" / "mine").mkdir(parents=True)
    told: list[str] = []
    Logbook(str(tmp_path), told.append, 0).close()
    assert "metrics.jsonl: not a file; the file is kept as" in told[0]
    assert len(list(tmp_path.glob("damaged-metrics.jsonl-*/mine"))) == 1


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log(tmp_path, range(1, 8))
    log(tmp_path, range(5, 7), resumed_step=4)
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in lines(tmp_path / "samples.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_starts_anew_keeps_nothing_of_later_steps(tmp_path: Path) -> None:
    log(tmp_path, range(1, 4))
    log(tmp_path, range(1, 2))
    assert lines(tmp_path / "metrics.jsonl") == [record(1)]


@pytest.mark.parametrize(
    "odd", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\0", "\ufffd", "é🦊\n"]
)
def test_samples_survive_a_resume_whatever_characters_they_hold(odd: str, tmp_path: Path) -> None:
    first = Logbook(str(tmp_path), silent, 0)
    first.log_sample(1, f"prompt{odd}", f"{odd}completion")
    first.log_sample(2, "prompt", "completion")
    first.close()
    Logbook(str(tmp_path), silent, 2).close()
    assert lines(tmp_path / "samples.jsonl") == [
        {"step": 1, "prompt": f"prompt{odd}", "completion": f"{odd}completion"},
        {"step": 2, "prompt": "prompt", "completion": "completion"},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_written_as_valid_json(value: float, tmp_path: Path) -> None:
    logbook = Logbook(str(tmp_path), silent, 0)
    logbook.log_metrics([record(1, grad_norm=value), record(2)])
    logbook.sync(curve="diverged")
    logbook.close()
    first, second = lines(tmp_path / "metrics.jsonl")
    assert math.isclose(float(first["grad_norm"]), value) or math.isnan(float(first["grad_norm"]))
    assert second == record(2)


def test_a_run_whose_loss_became_nan_still_gets_its_summary(tmp_path: Path) -> None:
    logbook = Logbook(str(tmp_path), silent, 0)
    logbook.log_metrics([{"step": 1, "tokens": 10, "val_loss": math.nan, "val_bpb": math.nan}])
    logbook.close()
    metrics = read_metrics(str(tmp_path / "metrics.jsonl"))
    done = Outcome(str(tmp_path), str(tmp_path), TrainState(step=1), metrics)
    assert "nan" in summary(PretrainConfig(), done)


@pytest.mark.parametrize(
    ("step", "shown"),
    [(10, ["4.0000   bits per byte 2"]), (160, ["3.0000 (step 100)   bits per byte 1"]), (5, [])],
)
def test_the_summary_says_of_which_step_its_val_loss_is(step: int, shown: list[str]) -> None:
    """A run that was stopped has trained since its newest evaluation, or has none yet; records of
    steps after its checkpoint, which a killed run leaves, do not count."""
    metrics = [
        {"step": step, "tokens": step, "val_loss": loss, "val_bpb": bits}
        for step, loss, bits in ((10, 4.0, 2.0), (100, 3.0, 1.0), (200, 2.0, 0.5))
    ]
    done = Outcome("run", "run/checkpoint", TrainState(step=step), metrics)
    lines = summary(PretrainConfig(), done).splitlines()
    found = [line.removeprefix("val loss     ") for line in lines if line.startswith("val loss")]
    assert [line[: len(text)] for line, text in zip(found, shown, strict=True)] == shown


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, None])
def test_the_summary_of_a_stopped_run_says_how_to_resume_it(by: signal.Signals | None) -> None:
    """The exit code is the one that a shell gives a program that the signal ends."""
    done = Outcome("run", "run/checkpoint", TrainState(step=3), [], stopped_by=by)
    assert done.exit_code == (128 + by if by else 0)
    text = summary(PretrainConfig(name="it"), done)
    for words in ("run it stopped at step 3", "resume       python jobs/pretrain.py"):
        assert (words in text) == (by is not None)
    assert ("extend  " in text) == (by is None)


def test_tensorboard_has_every_number(tmp_path: Path) -> None:
    log(tmp_path, range(1, 4))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["tokens", "loss"]
    found = [(event.step, event.value) for event in board.Scalars("loss")]
    assert found == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]


def test_sync_draws_the_curve_of_what_was_logged(tmp_path: Path) -> None:
    logbook = Logbook(str(tmp_path), silent, 0)
    logbook.log_metrics([record(1), record(2)])
    logbook.sync()
    assert not (tmp_path / "loss.png").exists()
    logbook.sync(curve="a title")
    logbook.close()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_in_an_object_store_records_arrive_at_each_sync_and_are_resumed() -> None:
    run = "memory://manta-test-logbook/run"
    log(run, range(1, 4))
    log(run, range(3, 5), resumed_step=2)
    assert [r["step"] for r in read_metrics(f"{run}/metrics.jsonl")] == [1, 2, 3, 4]
    assert storage.exists(f"{run}/samples.jsonl")
    boards = storage.list_files(f"{run}/tensorboard")
    assert len(boards) >= 1


def test_durations_read_well() -> None:
    seconds = (0, 0.4, 42, 59.6, 185, 3599.6, 7800, 360_000, math.inf, math.nan)
    assert [duration(s) for s in seconds] == (
        ["0s", "0s", "42s", "1m00s", "3m05s", "1h00m", "2h10m", "100h00m", "?", "?"]
    )
