"""A jobs/prepare.py whose processes are all killed again and again ends as if left alone.

Only with -m long: each of the fifteen runs starts a Ray, for exact and for near duplicates. -s
shows where the kills fell.
"""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from helpers.common import ROOT
from manta import layout, storage
from manta.data import manifest as manifests
from manta.data import shards
from manta.data.passes import WORK
from manta.text import sources

pytestmark = pytest.mark.long

CORPUS_BYTES, FILES = 20 << 20, 40
# The real job, but with a Ray of its own and many parts, shards and merges of a small corpus. Only
# the driver reads these sizes.
JOB = """
import runpy, sys
from manta.cluster import connection
from manta.data import near, prepare, runs
from manta.text import sources
connection.connect(own=True, num_cpus=2)
sources.PART_BYTES, prepare.LEAST_SHARD_TOKENS = 1 << 20, 1 << 18
runs.FAN_IN, near.TASK_ROWS = 8, 1 << 17
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STAGES = ("starting", "training", "tokenizing", "merging", "shuffling", "committing", "committed")
# A kill is due some seconds after this share of a stage's records exists (this number of them, when
# runs are merged and near duplicates are found).
MOMENTS = [
    ("starting", 0.0),
    ("training", 0.0),
    ("tokenizing", 0.0),
    ("tokenizing", 0.3),
    ("tokenizing", 0.7),
    ("merging", 0),
    ("merging", 4),
    ("merging", 12),
    ("shuffling", 0.0),
    ("shuffling", 0.3),
    ("shuffling", 0.7),
    ("committing", 0.0),
    ("committed", 0.0),
]
PAUSE = {
    "starting": (0.0, 5.0),
    "training": (0.0, 2.0),
    "tokenizing": (0.0, 0.5),
    "merging": (0.0, 0.3),
    "shuffling": (0.0, 0.2),
    "committing": (0.0, 0.2),
    "committed": (0.0, 0.0),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in which some documents occur twice, some of them with another word."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    letters = list("etaoinshrdlucmfwypvbgkéß")
    words = ["".join(draw.choice(letters, n)) for n in draw.integers(2, 11, 5000)]
    paragraph = ""
    for number in range(FILES):
        with (folder / f"{number}.txt").open("w") as f:
            while f.tell() < CORPUS_BYTES // FILES:
                if draw.random() > 0.02:
                    paragraph = " ".join(words[i] for i in draw.integers(0, len(words), 80))
                elif draw.random() < 0.5:
                    paragraph = paragraph.rpartition(" ")[0] + " another"
                f.write(f"{paragraph}.\n\n")
    return folder


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A folder with a short path, because a socket's path has to fit into 107 characters."""
    folder = tempfile.mkdtemp(prefix="mk", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(home: Path, corpus: Path, ray_folder: str, deduplicate: str) -> subprocess.Popen[bytes]:
    job = [str(ROOT / "jobs" / "prepare.py"), f"data.source={corpus}", "data.name=rows"]
    keys = ["data.document_bytes=400", "data.vocab_size=600", f"data.deduplicate={deduplicate}"]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "platform"),
        "MANTA_HOME": str(home),
        "RAY_TMPDIR": ray_folder,
    }
    env.pop("RAY_ADDRESS", None)
    home.mkdir(exist_ok=True)
    with (home.parent / f"{home.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", JOB, *job, *keys],
            env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def processes_of(job: subprocess.Popen[bytes], known: set[psutil.Process]) -> set[psutil.Process]:
    """The processes of the job and of its Ray, also those whose parent is dead: they keep their
    session."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            parents = set(process.parents())
            if process in known or parents & known or os.getsid(process.pid) == job.pid:
                found.add(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            continue
    return found


def kill(job: subprocess.Popen[bytes]) -> int:
    """Kills all of a job's processes; returns how many there were."""
    job.send_signal(signal.SIGSTOP)  # the driver must do nothing while the others are found
    known = {psutil.Process(job.pid)}
    known |= set(psutil.Process(job.pid).children(recursive=True))
    while alive := processes_of(job, known):
        known |= alive
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        job.poll()  # takes it out of the list of processes
        time.sleep(0.01)
    return len(known)


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a preparation, by the files in its folder."""

    folder: Path
    parts: int
    shards: int

    def now(self) -> tuple[int, float, str]:
        """The number of the stage, the share of its records that exist, and both in words."""
        work = self.folder / WORK
        if (self.folder / layout.MANIFEST).exists():
            return 6, 0.0, "committed" + (", work not deleted yet" if work.exists() else "")
        if not (work / "plan.json").exists():
            return 0, 0.0, "starting"
        if not (self.folder / layout.ENCODING).exists():
            return 1, 0.0, "training the tokenizer"
        names = [file.name for file in work.glob("*-*.json")]
        parts = sum(name.startswith("part-") for name in names)
        shards = sum(name.startswith(("train-", "val-")) for name in names)
        between = len(names) - parts - shards
        if parts < self.parts:
            return 2, parts / self.parts, f"tokenizing, {parts} of {self.parts} parts"
        if not shards:
            return 3, between, f"merging, {between} tasks done"
        if shards < self.shards:
            return 4, shards / self.shards, f"shuffling, {shards} of {self.shards} shards"
        return 5, 0.0, "committing"


def wait_for(job: subprocess.Popen[bytes], progress: Progress, moment: tuple[str, float]) -> None:
    stage, share = STAGES.index(moment[0]), moment[1]
    while progress.now()[:2] < (stage, share):
        assert job.poll() is None, "the job ended by itself"
        time.sleep(0.002)


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("deduplicate", ["exact", "near"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    deduplicate: str,
    corpus: Path, ray_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seed = time.time_ns()
    draw = random.Random(seed)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    began = time.monotonic()
    assert start(undisturbed, corpus, ray_folder, deduplicate).wait() == 0, log_of(undisturbed)
    seconds = time.monotonic() - began
    print(f"\nseed {seed}; undisturbed {seconds:.0f} s")
    manifest = manifests.load(f"{undisturbed}/data/rows")
    monkeypatch.setattr(sources, "PART_BYTES", 1 << 20)
    parts = sources.parts(sources.Source(str(corpus), cut_bytes=400))
    assert len(parts) > 15 and len(manifest.shards) > 15 and manifest.dropped["duplicate"] > 100
    assert deduplicate == "exact" or manifest.dropped["near_duplicate"] > 100
    progress = Progress(killed / "data" / "rows", len(parts), len(manifest.shards))

    began = time.monotonic()
    for moment in MOMENTS:
        job = start(killed, corpus, ray_folder, deduplicate)
        try:
            wait_for(job, progress, moment)
            time.sleep(draw.uniform(*PAUSE[moment[0]]))
        finally:
            count = kill(job)
        torn = len(list(killed.rglob(f"*{storage.UNFINISHED}")))
        print(f"killed {count} processes, {torn} torn files: {progress.now()[2]}")
        assert job.wait() == -signal.SIGKILL, log_of(killed)
    assert start(killed, corpus, ray_folder, deduplicate).wait() == 0, log_of(killed)
    print(f"killed {len(MOMENTS)} times and ended, {time.monotonic() - began:.0f} s")

    assert content(killed / "data" / "rows") == content(undisturbed / "data" / "rows")
    assert not (killed / "data" / "rows" / WORK).exists()
    assert not list(killed.rglob(f"*{storage.UNFINISHED}"))
    shards.verify(manifests.load(f"{killed}/data/rows"), full=True)


def log_of(home: Path) -> str:
    return (home.parent / f"{home.name}.log").read_text()[-3000:]
