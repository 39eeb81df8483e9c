"""Nodes that do not see the same files are named before anything starts. Two real Rays of one
cluster, of which the second has folders of its own where the first has its home."""

import os
import time
from pathlib import Path

import pytest

from helpers.alone import alone, run
from helpers.common import TEXT
from manta.cluster import nodes
from manta.cluster.nodes import Look
from manta.errors import ClusterError

ADDRESS = "10.98.7.6"
START = f"--node-ip-address={ADDRESS} --object-store-memory=100000000 --num-cpus=1"
CLUSTER = f"""
ray get-auth-token --generate >/dev/null 2>&1
mkdir -p own shared hidden readonly late gone
ray start --head --port=6379 --include-dashboard=false {START} >log 2>&1
unshare --mount bash -ec '
mkdir -p hidden/data late/runs
for folder in own hidden/data late/runs gone; do mount -t tmpfs none $folder; done
mount --bind readonly readonly && mount -o remount,ro,bind readonly
ray start --address={ADDRESS}:6379 --num-gpus=2 {START} >log2 2>&1'
export RAY_ADDRESS={ADDRESS}:6379
python ask.py
echo left $(ls -A own) $(find . -name ".seen-*")
"""
ASK = """
import shutil
from pathlib import Path
from manta.cluster import connection, nodes
from manta.config import load
from manta.data import mixture
from manta.errors import MantaError
from manta.train.pretrain import pretrain
from manta.train.settings import PretrainConfig, save_run_config
from manta.train.supervise import Supervisor

silent = lambda line: None

def config(home, *keys):
    return load(PretrainConfig, [
        f"home={home.absolute()}", f"data.source={Path('text.txt').absolute()}", "data.name=text",
        "data.vocab_size=300", "data.document_bytes=500", "data.val_fraction=0.1", "num_workers=2",
        "model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.context_length=32",
        "tokens_per_batch=256", "total_tokens=512", "init.bigram_steps=0", *keys])

def said(what, action, *arguments, **named):
    try:
        action(*arguments, **named)
        print(what, "fine")
    except MantaError as e:
        print(what, type(e).__name__, e)

own, shared, hidden, readonly, late, gone = map(
    Path, ("own", "shared", "hidden", "readonly", "late", "gone"))
connection.connect()
said("own", pretrain, config(own), silent)
Path("gone/text.txt").write_text(Path("text.txt").read_text())
corpus = f"data.source={Path('gone/text.txt').absolute()}"
c = config(shared, corpus)
said("corpus", mixture.open_datasets, c.data, c.home_folder, silent)
c = config(shared)
said("shared", mixture.open_datasets, c.data, c.home_folder, silent)
for home in (hidden, readonly, late):
    shutil.copytree(shared / "data", home / "data", dirs_exist_ok=True)
said("hidden", pretrain, config(hidden), silent)
said("readonly", pretrain, config(readonly), silent)
said("gpus", nodes.require, None, gpus=True)
c = config(late)
datasets = mixture.open_datasets(c.data, c.home_folder, silent)
save_run_config(c)
said("late", Supervisor(c, datasets, silent, list).run)
"""


@alone
@pytest.mark.long
def test_a_node_with_a_filesystem_of_its_own_is_named_before_anything_starts(short: Path) -> None:
    (short / "text.txt").write_text(TEXT)
    lines = run(short, CLUSTER, ask=ASK)
    said = dict(line.split(" ", 1) for line in lines if " ClusterError " in line or " fine" in line)
    assert lines[-1] == "left", lines
    assert set(said) == {"own", "corpus", "shared", "hidden", "readonly", "gpus", "late"}
    assert said["shared"] == "fine"
    errors = {what: line for what, line in said.items() if what != "shared"}
    assert all(line.startswith("ClusterError node ") for line in errors.values()), lines
    assert all(f"({ADDRESS})" in line for what, line in errors.items() if what != "late")
    assert f"just written to {short}/own" in said["own"]
    assert "must be a place that all of them see" in said["own"]
    assert f"{short}/gone/text.txt" in said["corpus"]
    assert f"{short}/hidden/data/text/MANIFEST.json" in said["hidden"]
    assert f"cannot use {short}/readonly/runs (" in said["readonly"]
    assert "promises 2 GPUs" in said["gpus"] and "finds 0" in said["gpus"]
    assert f"{short}/late/runs/" in said["late"]


def test_a_mark_is_seen_by_whoever_shares_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    with nodes.marked(str(home)) as mark:
        assert nodes.look(Look(mark, {}), "other") is None
        assert nodes.unseen(mark, ["other", "third"]) == ["third"]
        elsewhere = Look(mark.replace("new", "another"), {})
        assert "does not see what this job" in str(nodes.look(elsewhere, "other"))
    assert list(tmp_path.iterdir()) == []
    with nodes.marked(str(home)):
        (home / "kept").touch()
    assert [path.name for path in home.iterdir()] == ["kept"]


@pytest.mark.parametrize("kind", ["", "local://"])  # (local:// stands for an object store)
def test_old_marks_of_killed_processes_are_removed_and_nothing_else(
    kind: str, tmp_path: Path
) -> None:
    def mark(name: str, files: dict[str, str], age: float) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(text)
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time.time() - age,) * 2)
        return folder

    hexes, old = iter("0123456789abcdef"), nodes.OLD_SECONDS + 60

    def name() -> str:
        return nodes.MARK + next(hexes) * 32

    seen = {"driver": "seen", "rank-3": "seen", "a" * 56: "seen"}
    gone = [mark(name(), seen, old), mark(name(), {"driver.01234567.tmp": "se"}, old)]
    kept = [
        mark(name(), seen, old - 120),
        mark(name(), {**seen, "notes": "seen"}, old),
        mark(name(), {"driver": "a text of somebody's"}, old),
        mark(".seen-by-me", seen, old),
        mark("run", seen, old),
    ]
    (inner := mark(name(), seen, old) / "folder").mkdir()
    (file := tmp_path / name()).write_text("seen")
    for path in (file, inner, inner.parent):
        os.utime(path, (0, 0))
    kept += [inner, file]
    if not kind:  # an object store has neither empty folders nor links
        gone.append(mark(name(), {}, old))
        (link := tmp_path / name()).symlink_to(mark("behind a link", seen, old))
        kept.append(link)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with nodes.marked(f"{kind}{tmp_path}"):
        assert not any(path.exists() for path in gone)
        assert all(path.exists() for path in kept)
        there = {path for path in before if path.parent not in gone}
        assert {path: path.read_bytes() for path in there} == {path: before[path] for path in there}


def test_a_file_that_is_missing_or_another_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("four")
    known = nodes.sizes([str(file)])
    assert nodes.look(Look(None, known), "node") is None
    file.write_text("others")
    assert f"another file at {file} (6 bytes, not 4)" in str(nodes.look(Look(None, known), "node"))
    file.unlink()
    assert f"does not see {file}" in str(nodes.look(Look(None, known), "node"))


def test_a_folder_that_nobody_may_write_to_is_refused_in_one_line() -> None:
    with pytest.raises(ClusterError) as caught:
        nodes.require_writable("/proc/manta")
    assert str(caught.value).startswith("/proc/manta: ") and "home=" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_node_finds_wrong_is_a_sentence_whatever_it_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    problem, clock = nodes.look_and_tell(Look(f"{file}/mark", {}), "node")
    assert problem is not None and "\n" not in problem
    assert abs(clock - time.time()) < 60


def test_clocks_are_apart_only_beyond_what_asking_takes() -> None:
    assert nodes._apart(100.0, 100.0, 103.0) == nodes._apart(100.0, 107.0, 103.0) == 0
    assert nodes._apart(100.0, 40.0, 103.0) == -60
    assert nodes._apart(100.0, 163.0, 103.0) == 60


def test_gpus_that_pytorch_does_not_find_are_named() -> None:
    import torch

    problem = nodes.gpu_problem(torch.cuda.device_count() + 1)
    assert problem is not None and "promises" in problem and torch.__version__ in problem
    assert not torch.cuda.device_count() or nodes.gpu_problem(1) is None
