"""The layout of the tests: small files, none of which imports another test file."""

import ast
from pathlib import Path

import pytest

from helpers.common import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
by_path = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "tests")))


@by_path
def test_no_file_imports_a_file_of_tests(path: Path) -> None:
    """Shared code is in tests/helpers, so a test file runs alone and can be moved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        stems = {other.stem for other in FILES if other.stem.startswith("test_")}
        assert not stems & {part for name in names for part in name.split(".")}, names


@by_path
def test_files_of_tests_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports each test file by its name alone."""
    stems = [path.stem for path in FILES if path.stem.startswith("test_")]
    assert len(stems) == len(set(stems))
