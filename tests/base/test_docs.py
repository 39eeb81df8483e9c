"""The documents: their links lead somewhere, and the jobs accept the commands they show."""

import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.common import ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]*)`")
JOB = re.compile(r"\bpython jobs/(\w+)\.py\b([^`]*)")
PLACEHOLDER = re.compile(r"[A-Z_]+|.*\.\.\.")


class Command(NamedTuple):
    """A command that a document shows, and its place there."""

    place: str
    job: str
    arguments: str


def documents() -> list[Path]:
    """All Markdown files of the repository, except those in hidden folders (an environment)."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in files if name.endswith(".md")]
    return sorted(found)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parts(path: Path) -> tuple[list[str], list[tuple[int, str]]]:
    """The lines of a document outside its code blocks, and those inside, with their numbers; a line
    that ends in a backslash is joined to the next."""
    prose, code, is_code = [], [], False
    lines = iter(enumerate(path.read_text().splitlines(), start=1))
    for number, line in lines:
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code:
            prose.append(line)
        else:
            while line.endswith("\\"):
                line = line[:-1] + next(lines)[1]
            code.append((number, line))
    return prose, code


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, by GitHub's rule."""
    found: set[str] = set()
    for line in parts(path)[0]:
        if heading := re.match(r"#+ +(.*)", line):
            text = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading[1])
            text = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            numbered = (f"{text}-{n}" for n in range(1, 100))
            found.add(text if text not in found else next(n for n in numbered if n not in found))
    return found


def commands() -> Iterator[Command]:
    """Every `python jobs/X.py ...` in a code block, or alone in a code span of the text."""
    for path in documents():
        prose, code = parts(path)
        shown = [(f"{name_of(path)}:{number}", line) for number, line in code]
        paragraphs = "\n".join(prose).split("\n\n")
        spans = [span for text in paragraphs for span in CODE.findall(text.replace("\n", " "))]
        shown += [(name_of(path), span) for span in spans if span.startswith("python jobs/")]
        for place, line in shown:
            if (found := JOB.search(line)) and found[1] != "X":
                yield Command(place, *found.groups())


def problems(path: Path) -> Iterator[str]:
    """The links of a document that lead nowhere in this repository."""
    for target in LINK.findall("\n".join(parts(path)[0])):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        if not to.exists():
            yield f"{target}: there is no such file"
        elif anchor and anchor not in anchors(to):
            yield f"{target}: there is no such heading"


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    assert not list(problems(path))


def test_a_link_to_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "# One `two`, three!\n# One two three\n```\n# no heading [x](in-code.md)\n```\n"
        "[a](#one-two-three) [b](#one-two-three-1) [c](b.md) [d](#no-heading) [e](https://x.y/#z)"
    )
    assert list(problems(tmp_path / "a.md")) == [
        "b.md: there is no such file",
        "#no-heading: there is no such heading",
    ]


def test_the_first_document_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("command", list(commands()), ids=lambda c: f"{c.place} {c.job}")
def test_a_command_is_one_that_its_job_takes(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Config files that only the reader has are left out; those of jobs/ must exist."""
    given = [
        argument
        for argument in shlex.split(command.arguments, comments=True)
        if not PLACEHOLDER.fullmatch(argument)
        and ("=" in argument or argument.startswith(("-", "jobs/")))
    ]
    job = ROOT / "jobs" / f"{command.job}.py"
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))  # a job changes it
    monkeypatch.setattr(sys, "argv", [str(job), *given, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(job), run_name="__main__")
    assert ended.value.code == 0, f"{command.place}: {shlex.join(given)}: {capsys.readouterr().err}"
