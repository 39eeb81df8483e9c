"""Saving while training runs: a checkpoint is whole or absent whatever the disk does, on two
ranks."""

import errno
import gc
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from faults.damage import DAMAGE, flip, rewrite_manifest
from helpers.checkpoints import MODELS, model_of, save
from helpers.preparing import content
from helpers.ranks import device, engine_of, on_ranks, train
from manta import layout, storage
from manta.bench import stages
from manta.config import load
from manta.errors import CheckpointError, ConfigError, DataError
from manta.messages import Saved
from manta.model.cost import parameters
from manta.model.gpt import GPT
from manta.text import tokenizer as tokenizers
from manta.train.checkpoints import checkpoint, fragments, listing
from manta.train.checkpoints import saver as savers
from manta.train.checkpoints.checkpoint import CheckpointConfig, TrainState
from manta.train.checkpoints.host_memory import ALIGNMENT
from manta.train.checkpoints.listing import CheckpointsConfig
from manta.train.checkpoints.saver import Saver
from manta.train.faults.signals import Asked
from manta.train.step.engine import Engine
from manta.train.step.optimizer import OptimizerConfig

TEXT = "a text to train a tokenizer on"


def failing(times: int, error: OSError, rank: int) -> Callable[..., Any]:
    """Stands for `fragments.write`: fails this often on one rank."""
    left = [times]

    def write(state: Any, file: Path) -> Any:
        if dist.get_rank() == rank and left[0]:
            left[0] -= 1
            raise error
        return real(state, file)

    real = fragments.write
    return write


def run_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    savers.FIRST_PAUSE = 0.01
    said: list[Any] = []
    engine = engine_of("modern", OptimizerConfig(), 1)
    model, tokenizer = engine.module.config, tokenizers.train([TEXT], 257)
    run = f"{folder}/run"
    c = CheckpointConfig(keep=2, keep_every=4, every_minutes="auto", hours_between_failures=100)
    saver = Saver(run, c, model, tokenizer, said.append)
    found: dict[str, Any] = {}
    real = fragments.write

    # The file has the weights at the time of the copy, although training continues.
    train(engine, range(1))
    before = engine.full_weights()

    trained_on = threading.Event()
    in_time: list[bool] = []

    def held(state: Any, file: Path) -> Any:
        in_time.append(trained_on.wait(60))  # False if training waited for this
        return real(state, file)

    fragments.write = held
    waited = saver.save(engine, TrainState(step=1))
    train(engine, range(1, 2))
    after = engine.full_weights()
    was_writing = saver.is_writing
    trained_on.set()
    saver.finish()
    fragments.write = real
    saved = load_file(layout.checkpoint_folder(run, 1) + "/model.safetensors")
    found["beside"] = was_writing and in_time == [True]
    found["copied"] = rank > 0 or all(torch.equal(saved[name], before[name]) for name in before)
    found["moved on"] = rank > 0 or any(not torch.equal(saved[name], after[name]) for name in after)
    saver._last_time -= c.seconds_between(waited) or 0
    found["not yet"] = saver.asked() is Asked.NOTHING

    # The storage has errors for a while.
    fragments.write = failing(2, OSError(errno.EIO, "Input/output error"), 1)
    saver.save(engine, TrainState(step=2, val_loss=1.0))
    saver.finish()
    found["after errors"] = checkpoint.find(run) == [
        layout.checkpoint_folder(run, n) for n in (1, 2)
    ]

    # One rank's disk is full: nobody commits, and the run continues.
    fragments.write = failing(1, OSError(errno.ENOSPC, "No space left on device"), 1)
    saver.save(engine, TrainState(step=3))
    saver.wait()
    found["full"] = saver.problem
    found["kept"] = [Path(path).name for path in checkpoint.find(run)]
    found["gone"] = not storage.exists(layout.checkpoint_folder(run, 3))
    with pytest.raises(CheckpointError) as caught:
        saver.finish()
    found["error"] = str(caught.value)
    fragments.write = real
    for step in range(4, 8):
        saver.save(engine, TrainState(step=step, val_loss=1.0 + step))
    saver.finish()  # each save has waited for the one before
    found["pruned"] = [Path(path).name for path in checkpoint.find(run)]
    found["lines"] = [line for line in said if isinstance(line, str)]
    found["steps"] = [message.step for message in said if isinstance(message, Saved)]

    # A line says once that rank 1 cannot lock memory; all copies' memory is freed at the end.
    told: list[Any] = []
    saver = Saver(f"{folder}/unlocked", c, model, tokenizer, told.append)
    if rank == 1:
        saver._memory.problem = "out of memory"
    for step in (8, 9):
        saver.save(engine, TrainState(step=step))
    held = saver._memory.size
    saver.close()
    found["told"] = [x for x in told if isinstance(x, str) and "saved step" not in x]
    found["given back"] = held > 0 and saver._memory.size == 0
    return found


def run_stages(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """The size of the copies at each stage, and where they are at the next save."""
    found: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        engine = engine_of("modern", OptimizerConfig(), stage)
        tokenizer = tokenizers.train([TEXT], 257)
        saver = Saver(
            f"{folder}/{stage}", CheckpointConfig(), engine.module.config, tokenizer, print
        )
        train(engine, range(1))
        places = []
        for step in (1, 2):
            saver.save(engine, TrainState(step=step))
            places.append(view.data_ptr() for _, view in saver._memory._places.values())
        saver.finish()
        path = Path(layout.checkpoint_folder(f"{folder}/{stage}", 2))
        share = load_file(path / f"optimizer/rank-{rank:05d}.safetensors")
        weights = engine.full_weights()
        copied = [*share.values(), *weights.values()]
        found[f"{stage}"] = {
            "blocks": len(saver._memory._blocks),
            "waste": saver._memory.size - sum(values.nbytes for values in copied),
            "copies": len(copied),
            "stays": list(places[0]) == list(places[1]),
        }
        saver.close()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(run_rank, 2, tmp_path_factory.mktemp("saver"))


def test_each_stage_copies_into_one_block_without_waste_and_keeps_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    for stage, it in on_ranks(run_stages, 2, tmp_path_factory.mktemp("stages")).items():
        assert it["blocks"] == 1 and it["stays"], stage
        assert 0 <= it["waste"] < it["copies"] * ALIGNMENT, stage


def test_memory_that_cannot_be_locked_is_said_once_and_all_is_given_back(
    found: dict[str, Any],
) -> None:
    (line,) = found["told"]
    assert "worker(s) 1 (out of memory)" in line and "ulimit -l" in line
    assert found["given back"]
    # Rank 0 told of each checkpoint that is on the disk, and of no other.
    assert found["steps"] == [1, 2, 4, 5, 6, 7]


# --- the memory of a save ------------------------------------------------------------------------

STATUS = Path("/proc/self/status")
BESIDE = 24 << 20  # extra bytes that a save may hold: what libraries allocate at first


def resident(line: str) -> int:
    """Bytes of this process: VmRSS is the size now, VmHWM the peak since the last reset."""
    lines = STATUS.read_text().splitlines()
    return next(1024 * int(text.split()[1]) for text in lines if text.startswith(f"{line}:"))


def run_large(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """The peak memory of saves of 332 MB of state, on a machine on which a GPU is seen."""
    model = stages.MODEL
    stages.return_freed_memory()
    engine = Engine(
        GPT(model),
        OptimizerConfig(),
        device(),
        zero_stage=0,
        micro_batch_size=1,
        grad_accum_steps=1,
    )
    tokens = torch.randint(model.vocab_size or 0, (1, 9))
    loss = engine(tokens[:, :-1], tokens[:, 1:].contiguous())
    engine.backward(loss, is_last=True)
    engine.step(1.0)
    del loss
    found: dict[str, Any] = {"state": 12 * parameters(model).total}
    torch.cuda.is_available = lambda: True  # any real call of CUDA would raise here
    for name, run in {"disk": f"{folder}/run", "store": f"local://{folder}/far"}.items():
        tokenizer = tokenizers.train([TEXT], 257)
        saver = Saver(run, CheckpointConfig(), model, tokenizer, lambda line: None)
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        saver.save(engine, TrainState(step=1))
        saver.finish()
        peak = resident("VmHWM")
        saver.close()
        found[name] = {"peak": peak - before, "left": resident("VmRSS") - before}
        checkpoint.verify(layout.checkpoint_folder(run, 1))
    return found


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc")
def test_a_save_holds_one_copy_of_the_state_and_gives_it_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    found = on_ranks(run_large, 1, tmp_path_factory.mktemp("large"))
    print(found)
    for place in ("disk", "store"):
        assert found["state"] <= found[place]["peak"] < found["state"] + BESIDE, place
        assert found[place]["left"] < BESIDE, place


def test_training_goes_on_while_what_was_copied_is_written(found: dict[str, Any]) -> None:
    assert found["beside"] and found["copied"] and found["moved on"]


def test_the_interval_counts_the_writing_too(found: dict[str, Any]) -> None:
    assert found["not yet"]


def test_a_passing_error_is_tried_again(found: dict[str, Any]) -> None:
    assert found["after errors"]


def test_a_full_disk_costs_one_checkpoint_and_is_said(found: dict[str, Any]) -> None:
    assert found["kept"] == ["step-00000001", "step-00000002"] and found["gone"]
    for text in (found["full"], found["error"], "\n".join(found["lines"])):
        assert "step 3 was not saved" in text and "the disk is full" in text
    assert any("training continues" in line and "step-00000002" in line for line in found["lines"])
    assert "run the same command again" in found["error"]


def test_newest_best_and_every_nth_are_kept(found: dict[str, Any]) -> None:
    names = [f"step-{step:08d}" for step in (2, 4, 6, 7)]  # 2 is the best, 4 a multiple
    assert found["pruned"] == names


@pytest.fixture
def whole(found: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run's checkpoints."""
    source = next(tmp_path_factory.getbasetemp().glob("saver*/run"))
    shutil.copytree(source, tmp_path / "run")
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return Path(checkpoint.find(str(run))[-1])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_set_aside_and_not_read(
    whole: Path, damage: str, tmp_path: Path
) -> None:
    act, words = DAMAGE[damage]
    path, trap = newest(whole), tmp_path / "code-has-run"
    act(path, trap)
    lines: list[str] = []
    assert checkpoint.latest(str(whole), say=lines.append) == str(path.with_name("step-00000006"))
    assert path.exists() and len(lines) == 1 and words in lines[0] and path.name in lines[0]
    checkpoint.latest(str(whole), set_aside=True, say=lines.append)
    assert not path.exists()
    aside = list(whole.glob(f"checkpoints/damaged-{path.name}-*"))
    assert len(aside) == 1 and str(aside[0]) in lines[-1]
    assert newest(whole).name == "step-00000006"
    assert not trap.exists()


def test_a_folder_of_another_name_is_no_checkpoint_and_stays(whole: Path) -> None:
    before = checkpoint.find(str(whole))
    for name in ("step-abc", "step-", "step--5"):
        (whole / "checkpoints" / name).mkdir()
    shutil.copytree(newest(whole), whole / "checkpoints" / "step-abc", dirs_exist_ok=True)
    assert checkpoint.find(str(whole)) == before
    assert checkpoint.latest(str(whole), say=print) == before[-1]
    checkpoint.remove_unfinished(str(whole))
    assert (whole / "checkpoints" / "step-").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"n_layer": 10**6}),
        ("config.json", []),
        ("state.json", {"step": None}),
        ("encoding.json", {"eot": 1 << 40}),
        ("optimizer.json", {"norm.weight": {"step": 1, "parts": {"exp_avg": [[0, 64, "../x"]]}}}),
        ("optimizer.json", {"norm.weight": None}),
        ("MANIFEST.json", {"files": {}}),
    ],
)
def test_a_run_falls_back_when_a_file_is_wrong_whatever_the_manifest_says(
    whole: Path, file: str, content: Any
) -> None:
    path = newest(whole)
    before = json.loads((path / file).read_text())
    made = {**before, **content} if isinstance(content, dict) and content else content
    (path / file).write_text(json.dumps(made))
    if file != "MANIFEST.json":
        rewrite_manifest(path)
    lines: list[str] = []
    assert checkpoint.latest(str(whole), say=lines.append) == str(path.with_name("step-00000006"))
    assert len(lines) == 1 and path.name in lines[0]


def test_what_a_save_left_that_was_cut_short_is_removed(whole: Path) -> None:
    (newest(whole) / "MANIFEST.json").unlink()
    before = checkpoint.find(str(whole))
    checkpoint.remove_unfinished(str(whole))
    assert checkpoint.find(str(whole)) == before
    assert not (whole / "checkpoints" / "step-00000007").exists()


def test_a_persons_files_and_links_survive_pruning(whole: Path, tmp_path: Path) -> None:
    folder = whole / "checkpoints"
    (folder / "step-00000006").rename(tmp_path / "elsewhere")
    (folder / "step-00000006").symlink_to(tmp_path / "elsewhere")
    (folder / "step-00000002" / "notes.txt").write_text("mine")
    for name in ("step-by-step", "step-00000003"):
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("mine")
    before = content(tmp_path / "elsewhere")
    said = looked(whole, "action=prune", "checkpoint.keep=1", "checkpoint.keep_best=false")
    checkpoint.remove_unfinished(str(whole))
    assert f"left {folder}/step-00000006: a symbolic link" in said
    assert "kept: steps 6, 7" in said
    assert content(tmp_path / "elsewhere") == before
    for name in ("step-00000002/notes.txt", "step-by-step/thesis.txt", "step-00000003/thesis.txt"):
        assert (folder / name).read_text() == "mine"
    assert [f.name for f in (folder / "step-00000002").iterdir()] == ["notes.txt"]
    assert not (folder / "step-00000004").exists()


def test_checkpoints_behind_a_link_are_not_deleted(whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "linked"
    other.mkdir()
    (other / "checkpoints").symlink_to(whole / "checkpoints")
    before = content(whole)
    with pytest.raises(DataError, match="linked/checkpoints is a symbolic link"):
        looked(other, "action=prune", "checkpoint.keep=1", "checkpoint.keep_best=false")
    assert content(whole) == before


def test_checkpoints_are_due_by_steps_tokens_and_time() -> None:
    c = CheckpointConfig(every=10, every_tokens=1000)
    due = [step for step in range(1, 41) if c.is_due(step, (step - 1) * 64, step * 64)]
    assert due == [10, 16, 20, 30, 32, 40]
    assert CheckpointConfig(every=None).is_due(100, 0, 1 << 40) is False
    assert CheckpointConfig(every_minutes=2).seconds_between(1.0) == 120
    auto = CheckpointConfig(every_minutes="auto", hours_between_failures=2)
    assert auto.seconds_between(4.0) == pytest.approx((2 * 7200 * 4) ** 0.5)
    assert CheckpointConfig().seconds_between(1.0) is None


def looked(whole: Path, *arguments: str) -> str:
    c = load(CheckpointsConfig, [f"run={whole}", *arguments])
    return "\n".join(listing.report(c))


def test_a_person_lists_verifies_compares_and_prunes(whole: Path) -> None:
    assert [line.split()[0] for line in looked(whole).splitlines()[1:]] == ["2", "4", "6", "7"]
    assert looked(whole, "action=verify").count("whole") == 4
    same = looked(whole, "action=compare", "steps=[6,7]")
    assert same.count("identical, bit for bit") == 2 and "step: 6 and 7" in same
    other = looked(whole, "action=compare", "steps=[2]", f"other={whole}")
    assert "step: 2 and 7" in other
    gone = looked(whole, "action=prune", "checkpoint.keep=1", "checkpoint.keep_best=false")
    assert gone.count("deleted") == 3 and "kept: steps 7" in gone
    with pytest.raises(ConfigError, match=r"steps=\[3\].*it has 7"):
        looked(whole, "action=verify", "steps=[3]")
    flip(newest(whole) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"sha256 differs"):
        looked(whole, "action=verify")
    with pytest.raises(CheckpointError, match=r"run=nowhere: no checkpoint there"):
        listing.report(load(CheckpointsConfig, ["run=nowhere"]))


def test_a_checkpoint_without_an_optimizers_state_is_compared_too(
    whole: Path, tmp_path: Path
) -> None:
    tokenizer = tokenizers.train([TEXT], 257)
    plain = save(model_of(MODELS["llama"], 257), tokenizer, tmp_path)  # as an import writes it
    run = Path(plain).parents[1]
    assert looked(run, "action=verify").startswith("whole")
    same = looked(run, "action=compare", "steps=[7]")
    assert "weights    identical, bit for bit" in same
    assert "optimizer  neither has one: an imported checkpoint is without" in same
    other = looked(run, "action=compare", "steps=[7]", f"other={whole}")
    assert "optimizer  only b has one" in other
    assert "optimizer  only a has one" in looked(
        whole, "action=compare", "steps=[7]", f"other={run}"
    )
