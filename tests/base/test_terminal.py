"""Text that a file or a model brings cannot steer the terminal that shows it; what jobs write is
private."""

import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.configs import Outer
from manta import storage
from manta.errors import DataError
from manta.job import run_job
from manta.progress import Progress
from manta.terminal import exact_pipe, marked, message, named, show, visible, visible_output

ATTACK = "\x1b]0;title\x07\x1b[2K\rdone\u202e\u2066\x9b31m\x85\u2028"


@pytest.fixture(autouse=True)
def mask() -> Iterator[None]:
    """The umask that was there before."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@given(st.text() | st.text(alphabet=ATTACK + "a\n\t\udcff"))
def test_a_visible_text_has_no_character_that_steers(text: str) -> None:
    shown = visible(text)
    kept = set(shown) - {"\n", "\t"}
    assert not {c for c in kept if unicodedata.category(c) in ("Cc", "Zl", "Zp")}
    assert not {c for c in kept if unicodedata.bidirectional(c) in ("LRE", "RLO", "RLI", "PDI")}
    assert visible(shown) == shown
    shown.encode()
    if shown == text:
        assert not set(text) & set(ATTACK + "\udcff") - set("]0;title[2Kdone31m")


def test_no_value_in_a_message_starts_a_line_of_its_own() -> None:
    error = DataError("2 problems:\n  a\n  b\nerror: c")
    assert message(error) == "2 problems:\n  a\n  b\\nerror: c"


@given(st.lists(st.text(max_size=5)), st.integers(1, 6))
def test_a_list_in_a_message_has_a_limit_and_says_how_many_more_there_are(
    items: list[str], most: int
) -> None:
    parts = named(items, most, between="\n").split("\n") if items else []
    assert len(parts) == min(len(items), most + 1)
    assert parts[most:] == ([f"and {len(items) - most} more"] if len(items) > most else [])
    assert named(dict.fromkeys("abc"), 2) == "a, b, and 1 more"


def test_what_a_job_prints_is_visible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def main(config: Outer) -> None:
        print(f"sample: {ATTACK}")
        with Progress(ATTACK, 1, "parts") as progress:
            progress.advance(1, ATTACK)
        (tmp_path / "samples").write_text("mine")
        storage.write_bytes(str(tmp_path / "new" / "file"), b"mine")
        raise DataError(f"{ATTACK}.txt\nerror: forged")

    monkeypatch.setattr(sys, "argv", ["job.py"])
    with pytest.raises(SystemExit) as caught:
        run_job(main, Outer)
    assert caught.value.code == 2
    found = capsys.readouterr()
    assert visible(found.out) == found.out and found.out.count("title") == 3
    assert found.err == f"error: {visible(ATTACK)}.txt\\nerror: forged\n"
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"samples": 0o600, "new": 0o700, "file": 0o600}
    monkeypatch.setattr(sys, "argv", ["job.py"])

    def defect(config: Outer) -> None:
        raise ValueError(ATTACK)

    with pytest.raises(SystemExit):
        run_job(defect, Outer)
    err = capsys.readouterr().err
    assert visible(err) == err and "Traceback" in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_completion_is_exact_in_a_pipe_and_visible_in_a_terminal(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    with visible_output():
        with exact_pipe():
            print(ATTACK, end="")
        print("\r", end="")
    shown = visible(ATTACK) if stream.isatty() else ATTACK
    assert stream.getvalue() == shown + r"\r"


@pytest.mark.parametrize(
    ("is_terminal", "no_colour", "expected"),
    [
        (True, "", "a \\x1b[2J \x1b[32mb\\x0e\x1b[0m c\n"),
        (True, "1", "a \\x1b[2J [[b\\x0e]] c\n"),
        (False, "", "a \\x1b[2J [[b\\x0e]] c\n"),
    ],
)
def test_what_is_marked_is_green_on_a_terminal_and_in_brackets_elsewhere(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, no_colour: str, expected: str
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setenv("TERM", "xterm")
    with visible_output():
        show(f"a \x1b[2J {marked('b' + chr(14))} c")
    assert stream.getvalue() == expected
