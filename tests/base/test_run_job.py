"""Configs and run_job, as the tests' reader meets them: this line is what --help shows here."""

import ast
import dataclasses
import errno
import inspect
import os
import re
import signal
import subprocess
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.configs import OF_JOBS, Outer, never, write
from manta.cluster import ending
from manta.config import help_text, load
from manta.errors import DataError
from manta.job import OF_A_PLACE, hint, run_job, with_default
from manta.train.settings import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]


# --- help ----------------------------------------------------------------------------------------


def documented(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a config class, also inherited ones and those of groups, with its docstring as
    the source has it."""
    docstrings: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                is_docstring = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                docstrings[field.target.id] = str(after.value.value) if is_docstring else ""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from documented(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name.removesuffix("_"), docstrings[field.name]


@pytest.mark.parametrize("cls", OF_JOBS)
def test_help_has_every_key_with_its_docstring(cls: type) -> None:
    paragraphs = re.split(r"^  (?=[\w.]+: )", help_text(cls), flags=re.MULTILINE)[1:]
    shown = {p.partition(":")[0]: " ".join(p.split()) for p in paragraphs}
    keys = dict(documented(cls))
    assert shown.keys() == keys.keys()
    assert [key for key, text in keys.items() if not text] == []
    assert [key for key, text in keys.items() if " ".join(text.split()) not in shown[key]] == []


def test_help_shows_what_is_in_a_dict() -> None:
    assert help_text(Outer).splitlines()[::2] == [
        "  named: {str: int} = {}",
        '  inner.by_number: {int: {str: int}} = {"8000": {"a": 1}}',
        "  inner.n: int = 0",
    ]


def test_help_has_a_keys_type_and_default_on_one_line() -> None:
    form = re.compile(r"  [\w.]+: \S.* = \S.*|      \S.*")
    lines = help_text(PretrainConfig).splitlines()
    assert [line for line in lines if not form.fullmatch(line)] == []


# --- run_job -------------------------------------------------------------------------------------


def run(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[PretrainConfig], Any], *arguments: str
) -> int:
    """The exit code of a job with this main function and these arguments."""
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    main.__module__ = __name__
    with pytest.raises(SystemExit) as caught:
        run_job(main, PretrainConfig)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_default_config_is_for_arguments_that_name_no_other(tmp_path: Path) -> None:
    default, other = tmp_path / "default.yaml", tmp_path / "other.yaml"
    default.write_text("seed: 5\nmodel: {n_layer: 3}\n")
    other.write_text("log_every: 7\n")

    def loaded(*arguments: str) -> tuple[int, int, int]:
        c = load(PretrainConfig, with_default(list(arguments), default))
        return c.seed, c.model.n_layer, c.log_every

    assert loaded() == (5, 3, 10)
    assert loaded("seed=6", "name=mine") == (6, 3, 10)
    assert loaded(str(other)) == (1337, 4, 7)
    assert loaded("model.preset=gpt2-124m") == (1337, 12, 10)
    assert loaded("seed=6", "model.depth=2") == (6, 2, 10)
    assert with_default(["seed=6"], None) == ["seed=6"]
    others = {"kind=preference": other}
    for arguments, first in ((["kind=preference"], other), (["kind=chat"], default)):
        assert with_default(arguments, default, others) == [str(first), *arguments]
    named = [str(default), "kind=preference"]
    assert with_default(named, default, others) == named


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["lr=1", "--help"]])
def test_help_exits_0_and_runs_nothing(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, never, *arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Configs and run_job, as the tests' reader meets them")
    assert help_text(PretrainConfig) in out
    assert err == ""


def test_dry_run_exits_0_runs_nothing_and_prints_a_config_that_loads_equal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["seed=7", "model.preset=gpt2-124m", "tokens_per_batch=4096", "total_tokens=9000"]
    assert run(monkeypatch, never, *arguments, "--dry-run") == 0
    out, err = capsys.readouterr()
    assert load(PretrainConfig, [write(tmp_path, out)]) == load(PretrainConfig, arguments)
    assert "# steps: 3\n" in out
    assert err == ""


def test_a_problem_exits_2_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: PretrainConfig) -> None:
        raise DataError("a.txt: no such file")

    assert run(monkeypatch, main) == 2
    assert capsys.readouterr() == ("", "error: a.txt: no such file\n")
    assert run(monkeypatch, never, "lr=1") == 2
    assert capsys.readouterr().err == "error: lr: unknown key; did you mean optimizer.lr?\n"
    assert run(monkeypatch, never, "lr=1", "--dry-run") == 2


def test_other_ends_have_their_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def defect(config: PretrainConfig) -> None:
        raise ZeroDivisionError("of mine")

    def interrupted(config: PretrainConfig) -> None:
        raise KeyboardInterrupt

    seen: list[PretrainConfig] = []
    assert run(monkeypatch, seen.append, "seed=7") == 0
    assert [c.seed for c in seen] == [7]
    assert run(monkeypatch, defect) == 1
    assert "Traceback" in capsys.readouterr().err
    assert run(monkeypatch, interrupted) == 130
    assert capsys.readouterr().err.startswith("interrupted")
    assert run(monkeypatch, lambda config: sys.exit(7)) == 7


def test_a_signal_that_ends_a_job_is_its_exit_code_even_if_ray_changed_the_exception(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(config: PretrainConfig) -> None:
        try:
            ending.end(signal.SIGUSR1)
        finally:
            sys.exit(1)  # as a call of Ray's does

    before = [signal.getsignal(number) for number in ending.ENDING]
    monkeypatch.setitem(sys.modules, "ray", sys.modules.get("ray") or types.ModuleType("ray"))
    try:
        assert run(monkeypatch, ended) == 128 + signal.SIGUSR1
        assert {signal.getsignal(number) for number in ending.ENDING} == {signal.SIG_IGN}
    finally:
        for number, handler in zip(ending.ENDING, before, strict=True):
            signal.signal(number, handler)
    assert capsys.readouterr().err == "ended by SIGUSR1; run the same command to continue\n"


@pytest.mark.parametrize("number", OF_A_PLACE, ids=errno.errorcode.get)
def test_what_the_system_says_about_a_file_is_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: PretrainConfig) -> None:
        raise OSError(number, os.strerror(number), "a\nb/x")

    assert run(monkeypatch, main) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: [Errno {number}] {os.strerror(number)}: ") and r"a\nb/x" in err
    assert err.endswith(f"; {OF_A_PLACE[number]}\n") and err.count("\n") == 1


def test_an_argument_that_is_not_utf8_is_one_line_and_help_is_still_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argument in ("name=a\udcff", "home=/\udcff", "\udcff", "\udcff=3", "seed=\udcff"):
        for more in ([], ["--dry-run"]):
            assert run(monkeypatch, never, argument, *more) == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and r"\udcff" in err
        assert run(monkeypatch, never, argument, "--help") == 0
        capsys.readouterr()


def test_a_hint_is_not_among_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: PretrainConfig) -> None:
        print("a result")
        hint("next  another job")

    assert run(monkeypatch, main) == 0
    assert capsys.readouterr() == ("a result\n", "next  another job\n")


def test_another_pipe_that_breaks_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: PretrainConfig) -> None:
        raise BrokenPipeError(errno.EPIPE, "a socket of a library")

    assert run(monkeypatch, main) == 1
    assert "Traceback" in capsys.readouterr().err


LINES = '''"""A job that prints lines."""
from manta.config import config
from manta.job import run_job

@config
class Lines:
    count: int = 3
    """How many lines."""

def main(c):
    for line in range(c.count):
        print(line)

run_job(main, Lines)
'''


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("argument", ["--help", "--dry-run", "count=3", "count=100000"])
def test_an_output_that_ends_early_or_is_full_gives_no_traceback(
    tmp_path: Path, argument: str, unbuffered: str
) -> None:
    """Here `| head` has ended already, and its pipe has no reader."""
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT / "platform")}
    job = tmp_path / "lines.py"
    job.write_text(LINES)
    command = [sys.executable, str(job), argument]

    def ended(stdout: int) -> tuple[int, str]:
        done = subprocess.run(
            command, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
        os.close(stdout)
        return done.returncode, done.stderr

    reader, writer = os.pipe()
    os.close(reader)
    assert ended(writer) == (141, "")
    if Path("/dev/full").exists():
        said = "error: standard output cannot be written: No space left on device\n"
        assert ended(os.open("/dev/full", os.O_WRONLY)) == (1, said)


def test_a_job_started_by_a_person_ends_with_one_line_on_stderr(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), "optimzer.lr=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: optimzer: unknown key; did you mean optimizer?\n"
