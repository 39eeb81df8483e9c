"""What `ray job submit --working-dir .` uploads of a checkout, by Ray's own packaging."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from helpers.common import ROOT

# What working with a checkout leaves in it.
LEFT = (
    ".git/objects/pack/pack-1.pack", ".venv/lib/torch.so", ".hypothesis/examples/1",
    ".mypy_cache/1", ".pytest_cache/1", ".ruff_cache/1", "faults.md", "gpu.json",
    "platform/manta/__pycache__/job.cpython-311.pyc", "platform/manta.egg-info/PKG-INFO",
)  # fmt: skip
# What no job reads (.rayignore), but for the tests that jobs/bench.py what=gpu runs.
UNUSED, USED = (".github/", "tests/"), "tests/bench/"
DOCUMENTS = {
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md",
    *(f"{folder}/README.md" for folder in
      ("clusters", "evals", "jobs", "platform", "platform/manta/bench")),
}  # fmt: skip
MOST_BYTES = 11 << 18  # Ray compresses nothing


def tracked() -> list[str]:
    """The files of this checkout; skips the test outside a clone."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git, and a clone")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_a_submitted_job_uploads_the_checkout_and_nothing_else(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    files = tracked()
    for name in files:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    for name in LEFT:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(bytes(MOST_BYTES))
    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(checkout), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as zipped:
        uploaded = {name for name in zipped.namelist() if not name.endswith("/")}
    used = {n for n in files if n.startswith(USED) or not n.startswith(UNUSED)}
    assert uploaded == used - DOCUMENTS
    assert package.stat().st_size < MOST_BYTES
