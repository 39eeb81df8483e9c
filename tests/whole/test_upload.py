"""What `ray job submit --working-dir .` uploads of a checkout, by Ray's own packaging; jobs start
from it."""

import os
import shutil
import subprocess
import sys
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
UNUSED = (".ci", ".github/", "clusters/image/", "clusters/slurm/", "tests/")
USED = "tests/bench/"
SINGLE = {
    ".pre-commit-config.yaml", "Makefile", "clusters/stop-ray.sh",
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md",
    *(f"{folder}/README.md" for folder in
      ("clusters", "evals", "jobs", "platform", "platform/manta/bench")),
}  # fmt: skip
# Ray compresses nothing, and all but 0.2 MB of this is the package itself, which is what runs.
MOST_BYTES = 2_800_000
# Imports each job from where it was unpacked, with all that it imports; finds the files that jobs
# read next to the code.
EACH = """
import runpy, sys
from pathlib import Path
folder = Path.cwd()
jobs = sorted((folder / "jobs").glob("*.py"))
for job in jobs:
    runpy.run_path(str(job), run_name="job")
from manta.bench import curves, gpu_parts
from manta.evaluate import catalog, entries
from manta.plan import prices
from manta.serve.protocol.conversation_routes import PAGE
there = [curves.RECORDED, gpu_parts.ROOT / "tests" / "bench" / "test_gpu.py", catalog.FOLDER,
         entries.REFERENCES, prices.PRICES, PAGE / "index.html"]
assert all(path.exists() and path.is_relative_to(folder) for path in there), there
ours = [m.__file__ for n, m in sys.modules.items() if n.startswith("manta.")]
assert all(Path(file).is_relative_to(folder) for file in ours)
print(len(jobs), "jobs")
"""


def tracked() -> list[str]:
    """The files of this checkout; skips the test outside a clone."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git, and a clone")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def uploaded(tmp_path: Path) -> Path:
    """The package that Ray makes of a checkout in which somebody has worked."""
    checkout = tmp_path / "checkout"
    for name in tracked():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    for name in LEFT:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(bytes(MOST_BYTES))
    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(checkout), package, include_gitignore=True, excludes=excludes)
    return package


def test_a_submitted_job_uploads_the_checkout_and_nothing_else(tmp_path: Path) -> None:
    package = uploaded(tmp_path)
    with zipfile.ZipFile(package) as zipped:
        names = {name for name in zipped.namelist() if not name.endswith("/")}
    used = {n for n in tracked() if n.startswith(USED) or not n.startswith(UNUSED)}
    assert names == used - SINGLE
    assert package.stat().st_size < MOST_BYTES


@pytest.mark.long
def test_every_job_starts_from_the_upload(tmp_path: Path) -> None:
    with zipfile.ZipFile(uploaded(tmp_path)) as zipped:
        zipped.extractall(tmp_path / "job")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", EACH]
    done = subprocess.run(
        command, cwd=tmp_path / "job", env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{len(list((ROOT / 'jobs').glob('*.py')))} jobs"
