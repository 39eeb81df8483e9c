"""Files that somebody else may have written: whatever is in them, Manta refuses them in one line or
reads them right."""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from faults.damage import rewrite_manifest
from helpers.checkpoints import MODELS, model_of, save
from helpers.common import TEXT
from helpers.datasets import random_ids, write_dataset
from helpers.sweeps import Truth, simulated
from helpers.sweeps import config as sweep_config
from manta import foreign, storage
from manta.data import manifest as manifests
from manta.errors import CheckpointError, DataError, MantaError
from manta.evaluate import report
from manta.evaluate.differences import differences
from manta.evaluate.entries import Entry, _add_scores
from manta.export import huggingface, llmc
from manta.model.gpt import GPT
from manta.plot import loss_curve
from manta.sweep.journal import Journal, Notes
from manta.sweep.plan import Plan
from manta.terminal import LONGEST, message, visible
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer
from manta.train import rollbacks
from manta.train.checkpoints import checkpoint, fragments
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.pretrain import Outcome, summary
from manta.train.records import ledger, lines, logbook
from manta.train.settings import PretrainConfig

VOCAB = 300
RANK = "rank-00000.safetensors"
DEEP = "a place for a value that is very deep"


@dataclasses.dataclass
class Target:
    """A file of a folder, and what reads it: it raises MantaError, or checks that all is right."""

    file: str
    read: Callable[[Path], None]
    folder: str = "checkpoint"
    kind: str = "json"


def is_right(model: GPT, tokenizer: Tokenizer | None) -> None:
    tokens = torch.arange(8)[None] % (model.config.vocab_size or 1)
    tokens = tokens[:, : model.config.context_length]
    with torch.no_grad():
        assert model.eval()(tokens).shape[-1] == model.config.vocab_size
    if tokenizer is not None:
        assert tokenizer.decode(tokenizer.encode(TEXT[:200])) == TEXT[:200]
        assert len(tokenizer.token_bytes()) == tokenizer.vocab_size


def read_checkpoint(folder: Path) -> None:
    """Reads the checkpoint file by file, and by its manifest, as a run that resumes does."""
    path = str(folder)
    if (folder / "MANIFEST.json").stat().st_mtime_ns == MADE:
        rewrite_manifest(folder)
    with contextlib.suppress(CheckpointError):
        assert checkpoint.load_state(path).step >= 0
    with contextlib.suppress(CheckpointError):
        is_right(checkpoint.load_model(path), checkpoint.load_tokenizer(path))
    checkpoint.verify(path)
    assert checkpoint.load_state(path).step == 7
    fragments.whole_state(fragments.read_index(path), folder / "optimizer")
    model, tokenizer = checkpoint.load_model(path), checkpoint.load_tokenizer(path)
    is_right(model, tokenizer)
    assert tokenizer.vocab_size <= (model.config.vocab_size or 0)


MADE = 10**18  # the time of a manifest that no variant has changed


def read_huggingface(folder: Path) -> None:
    c, state, tokenizer = huggingface.read(folder)
    model = GPT(c)
    model.load_state_dict(state, strict=False)
    is_right(model, tokenizer)
    assert all(weight.isfinite().all() for weight in state.values())


def read_llmc(folder: Path) -> None:
    c, state = llmc.read(folder / "model.bin")
    model = GPT(c)
    model.load_state_dict(state, strict=False)
    is_right(model, None)


def read_dataset(folder: Path) -> None:
    file = folder / "MANIFEST.json"
    with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):  # an attacker
        content = json.loads(file.read_bytes())
        content.pop("sha256", None)
        content["sha256"] = manifests._digest(content)
        file.write_text(json.dumps(content))
    made = manifests.load(str(folder))
    assert made.tokens("train") >= 0 and made.documents("val") >= 0
    assert all(Path(shard.file).name == shard.file for shard in made.shards)


def read_scores(folder: Path) -> None:
    for scores in report.all_of(str(folder)):
        assert report.table(scores["results"]).startswith("task")
    report._read(str(folder / SCORES))


def read_scored_documents(folder: Path) -> None:
    """Compares the run with itself, then raises what is wrong with the file, if something is."""
    found = Entry("run")
    _add_scores(found, str(folder), None)
    assert found.scores["perplexity loss"][0] == 3.5
    assert all("within noise" in text or "known" in text for text in differences([found, found]))
    said = report.read_documents(str(folder), "step-00000007", "quick")
    if not said:
        raise DataError("left out")


def read_rollbacks(folder: Path) -> None:
    found = rollbacks.passed_over(str(folder))
    assert 10**30 in found or all(len(str(steps)) < 5000 for steps in found.ranges)


def read_ledger(folder: Path) -> None:
    table = ledger.table(str(folder))
    if not table:
        raise DataError("left out")
    assert table[0].startswith("goodput") and ledger.seconds_of(str(folder)) >= 0


def read_metrics_file(folder: Path) -> None:
    records = logbook.read_metrics(str(folder / "metrics.jsonl"))
    assert all(float(r["val_loss"]) or True for r in logbook.evaluations(records, 1 << 62))
    state = TrainState(step=9)
    done = Outcome(str(folder), str(folder), state, records)
    assert summary(PretrainConfig(), done).startswith("run ")
    assert loss_curve(records, "title").startswith(b"\x89PNG") if len(records) < 2 else True
    if lines.read(str(folder / "metrics.jsonl"), lines.Metrics)[1]:
        raise DataError("left out")


def read_samples(folder: Path) -> None:
    found, problem = lines.read(str(folder / "samples.jsonl"), lines.Sample)
    assert all(isinstance(r["step"], int | float | str) for r in found)
    if problem:
        raise DataError("left out")


def read_journal(folder: Path) -> None:
    journal = Journal(str(folder / "decisions.jsonl"))
    plan = Plan(sweep_config(**SWEEP), journal, 1)
    assert len(plan.ready()) + len(plan.standings()) >= 4
    again = Plan(sweep_config(**SWEEP), Notes(journal.records), 1)
    assert again.standings() == plan.standings()


SWEEP: dict[str, Any] = {"lr": [1e-3, 2e-3, 4e-3, 8e-3], "scheduler": "asha"}
SCORES = "evals/step-00000007/quick.json"

JSON_FILES = ("config.json", "state.json", "encoding.json", "MANIFEST.json", "optimizer.json")
TARGETS = [
    *(Target(file, read_checkpoint) for file in JSON_FILES),
    Target("model.safetensors", read_checkpoint, kind="safetensors"),
    Target(f"optimizer/{RANK}", read_checkpoint, kind="safetensors"),
    Target("config.json", read_huggingface, "transformers"),
    Target("tokenizer.json", read_huggingface, "transformers"),
    Target("model.safetensors.index.json", read_huggingface, "transformers"),
    Target("model.safetensors", read_huggingface, "transformers", "safetensors"),
    Target("model.bin", read_llmc, "llm.c", "int32"),
    Target("MANIFEST.json", read_dataset, "dataset"),
    Target(SCORES, read_scores, "run"),
    Target("evals/step-00000007/quick.documents.json", read_scored_documents, "run"),
    Target("rollbacks.json", read_rollbacks, "run"),
    Target("goodput.json", read_ledger, "run"),
    Target("metrics.jsonl", read_metrics_file, "run", "lines"),
    Target("samples.jsonl", read_samples, "run", "lines"),
    Target("decisions.jsonl", read_journal, "sweep", "lines"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("foreign")
    tokenizer = tokenizers.train([TEXT], VOCAB)
    model = model_of({**MODELS["llama, grouped"], "n_layer": 1}, VOCAB)
    path = Path(save(model, tokenizer, home))
    (path / "optimizer").mkdir()
    save_file({"norm.weight:exp_avg": torch.ones(64)}, path / "optimizer" / RANK)
    index = {"norm.weight": {"step": 7.0, "parts": {"exp_avg": [[0, 64, RANK]]}}}
    (path / "optimizer.json").write_text(json.dumps(index))
    files = json.loads((path / "MANIFEST.json").read_text())["files"]
    files |= {name: {} for name in ("optimizer.json", f"optimizer/{RANK}")}
    (path / "MANIFEST.json").write_text(json.dumps({"files": files}))
    rewrite_manifest(path)
    found = {name: home / name for name in ("transformers", "llm.c", "dataset", "run", "sweep")}
    for folder in found.values():
        folder.mkdir()
    huggingface.write(found["transformers"], model, tokenizer, "card")
    shard = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    (found["transformers"] / "model.safetensors.index.json").write_text(json.dumps(shard))
    gpt2 = model_of({**MODELS["gpt2"], "n_layer": 1}, VOCAB)
    llmc.write(found["llm.c"] / "model.bin", gpt2)
    write_dataset(found["dataset"], [random_ids(0, 64)], [random_ids(1, 64)]).save()
    scores = found["run"] / SCORES
    scores.parent.mkdir(parents=True)
    results = {"perplexity": {"loss": 3.5, "loss_stderr": None, "samples": 20}}
    keys = {"step": 7, "tokens": 512, "limit": None, "dtype": "fp32", "asked": {}, "seconds": 1.5}
    content = {"suite": "quick", "checkpoint": str(path), "results": results, **keys}
    scores.write_text(json.dumps(content))
    each = {"perplexity": {"documents": "ab", "loss": [[3.0 + i / 19, 1] for i in range(20)]}}
    scores.with_suffix(".documents.json").write_text(json.dumps(each))
    run = found["run"]
    skipped = [{"first": 3, "last": 5, "why": "a spike"}]
    (run / "rollbacks.json").write_text(json.dumps(skipped))
    entry = {"seconds": {"productive": 3.5, "down": 1.0}, "updated": 1e9, "starts": 2}
    (run / "goodput.json").write_text(json.dumps(entry))
    record = {"step": 7, "tokens": 70, "loss": 3.5, "val_loss": 3.25, "val_bpb": 1.5}
    texts = {"step": 7, "prompt": "a", "completion": "b"}
    for name, row in (("metrics", record), ("samples", texts)):
        each_step = ({**row, "step": step} for step in (1, 2, 3))
        text = "".join(json.dumps(content) + "\n" for content in each_step)
        (run / f"{name}.jsonl").write_text(text)
    journal = Journal(str(found["sweep"] / "decisions.jsonl"))
    simulated(sweep_config(**SWEEP), Truth(), lanes=1, notes=journal)
    return {"checkpoint": path, **found}


# --- variants of a file --------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([-1, 1 << 31, 1 << 40, 1 << 63, 10**30, 10**400]),
    st.sampled_from([0.5, -1.5, 1e300, math.nan, math.inf]),
    st.sampled_from(["", "x", "7", "../x", "/etc/passwd", "\x1b[2J", "\ud800", "a" * 5000, DEEP]),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["a", "type", "", "../x", "size"]), SCALARS, max_size=3),
)


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """Plain values of which some are replaced, dropped, added, moved or doubled."""
    for _ in range(draw(st.integers(1, 3))):
        holders: list[Any] = [content]
        while draw(st.integers(0, 3)):  # a walk down: keys near the top are changed most often
            inside = holders[-1].values() if isinstance(holders[-1], dict) else holders[-1]
            inside = [item for item in inside if isinstance(item, dict | list) and item]
            if not inside:
                break
            holders.append(draw(st.sampled_from(inside)))
        holder = holders[-1]
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            continue
        key, other = draw(st.sampled_from(keys)), draw(st.sampled_from(keys))
        what = draw(st.sampled_from(["replace", "replace", "drop", "add", "copy"]))
        if what == "replace":
            holder[key] = draw(VALUES)
        elif what == "drop":
            del holder[key]
        elif what == "copy":
            holder[key] = json.loads(json.dumps(holder[other]))
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(["extra", "", "../x", "\x1b[2J"]))] = draw(VALUES)
        else:
            holder.append(draw(VALUES))
    return draw(VALUES) if draw(st.integers(0, 30)) == 0 else content


def encoded(content: Any) -> bytes:
    depth = 100_000
    return json.dumps(content).replace(f'"{DEEP}"', "[" * depth + "]" * depth).encode()


@st.composite
def variants(draw: st.DrawFn, kind: str, data: bytes) -> bytes:
    """The file's content, changed as plain values, as bytes, or both."""
    how = draw(st.sampled_from(["values", "values", "values", "bytes", "both"]))
    if how != "bytes" and kind == "json":
        data = encoded(draw(changed(json.loads(data))))
    elif how != "bytes" and kind == "lines":
        rows = data.splitlines()
        at = draw(st.integers(0, len(rows) - 1))
        rows[at] = encoded(draw(changed(json.loads(rows[at]))))
        data = b"\n".join(rows) + b"\n"
    elif how != "bytes" and kind == "safetensors":
        length = int.from_bytes(data[:8], "little")
        header = encoded(draw(changed(json.loads(data[8 : 8 + length]))))
        said = draw(st.sampled_from([len(header)] * 8 + [0, 1 << 20, (1 << 64) - 1]))
        data = said.to_bytes(8, "little") + header + data[8 + length :]
    elif how != "bytes":
        numbers = np.frombuffer(data, dtype=np.int32).copy()
        for _ in range(draw(st.integers(1, 2))):
            some = st.sampled_from([0, 1, 7, 300, 384, 65536, (1 << 31) - 1, -1, -(1 << 31)])
            numbers[draw(st.integers(0, 9))] = draw(some)
        data = numbers.tobytes()
    if how != "values" and data:
        if draw(st.booleans()):
            return data[: draw(st.integers(0, len(data) - 1))]
        flipped = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            flipped[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(flipped)
    return data


FEW = 40  # variants of each file in a short test, and then in a long one
SOME = int(os.environ.get("MANTA_TEST_VARIANTS", "10000"))


def fuzz(target: Target, folder: Path, examples: int) -> dict[str, Any]:
    """Reads many variants of the file; returns how many were refused, and how many were right."""
    file, manifest = folder / target.file, folder / "MANIFEST.json"
    whole = file.read_bytes()
    others = {manifest: manifest.read_bytes()} if manifest.exists() else {}
    found: Counter[str] = Counter()
    longest = grown = 0.0

    @given(variants(target.kind, whole))
    @settings(
        max_examples=examples,
        derandomize=examples == FEW,  # the long form looks for what nobody has seen yet
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def run(data: bytes) -> None:
        nonlocal longest, grown
        for other, content in others.items():
            other.write_bytes(content)
            os.utime(other, ns=(MADE, MADE))
        file.write_bytes(data)
        # The memory of one reading alone counts: hypothesis keeps the variants.
        before = memory(reset=True) if examples > FEW else 0.0
        started = time.perf_counter()
        try:
            target.read(folder)
            found["accepted"] += 1
        except MantaError as e:
            assert message(e) == str(e) and "\n" not in str(e) and len(str(e)) < 3000, repr(str(e))
            found["refused"] += 1
        longest = max(longest, time.perf_counter() - started)
        if examples > FEW:
            grown = max(grown, memory() - before)

    try:
        run()
    finally:
        file.write_bytes(whole)
        for other, content in others.items():
            other.write_bytes(content)
    return {**found, "seconds": longest, "grown": grown}


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.folder}-{t.file}")
def test_a_file_is_refused_in_one_line_or_read_right(
    target: Target, folders: dict[str, Path]
) -> None:
    target.read(folders[target.folder])
    found = fuzz(target, folders[target.folder], FEW)
    assert found["refused"]


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.folder}-{t.file}")
def test_ten_thousand_variants_of_a_file(
    target: Target, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints what became of them, as a line of the table in tests/README.md."""
    found = fuzz(target, folders[target.folder], SOME)
    grown = found["grown"]
    refused, right = found.get("refused", 0), found.get("accepted", 0)
    with capsys.disabled():
        print(
            f"\n| {target.folder}: `{target.file}` | {refused + right:,} | {refused:,} | {right:,} "
            f"| {1000 * grown:.0f} MB | {found['seconds']:.2f} s |"
        )
    assert grown < 1 and found["seconds"] < 10


def memory(*, reset: bool = False) -> float:
    """The most memory that this process has taken, since the last reset, in GB (Linux alone)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e6


# --- the door itself -----------------------------------------------------------------------------


@dataclasses.dataclass
class Some:
    name: str
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "x.json: not valid JSON"),
        (b"[" * 100_000, "x.json: not valid JSON"),
        (b'{"name": "a", "sizes": {"b": ' + b"[" * 40 + b"]" * 40 + b"}}", "more than 32 levels"),
        (b"[]", "x.json: a list: should be a dictionary; restore"),
        (b"{}", "x.json: name is missing; restore"),
        (b'{"name": 3}', "x.json: name=3: should be a valid string; restore"),
        (
            b'{"name": "a", "sizes": {"b\\u001b": "c"}}',
            r"sizes.b\x1b='c': should be a valid",
        ),
        (b'{"name": "a", "sizes": {"b": "c", "d": "e"}}', "(and 1 more); restore"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_field(
    content: bytes, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        foreign.read_json(str(file), Some, CheckpointError)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_too_large_or_no_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(DataError, match=r"x\.json: no such file"):
        foreign.read_json(str(file), Some, DataError)
    with pytest.raises(DataError, match="not a file"):
        foreign.read_json(str(tmp_path), Some, DataError)
    with file.open("wb") as f:
        f.truncate(1 << 40)  # no bytes on the disk
    with pytest.raises(DataError, match=r"1,099,511,627,776 bytes are too many"):
        foreign.read_json(str(file), Some, DataError)


def test_a_file_of_wrong_values_takes_no_more_memory_than_a_right_one(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    sizes = {str(i): "no" for i in range(20_000)}
    file.write_text(json.dumps({"name": "a", "sizes": sizes}))
    with pytest.raises(DataError, match="20,000 of its values have a wrong type"):
        foreign.read_json(str(file), Some, DataError)


@given(st.text(max_size=400))
def test_a_terminal_obeys_no_character_of_a_file(text: str) -> None:
    shown = foreign.line(text)
    assert visible(shown) == shown and not {"\n", "\t"} & set(shown) and len(shown) <= LONGEST + 3


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b c", "\x00", "\\.."]), min_size=1))
def test_a_plain_name_stays_in_its_folder(parts: list[str]) -> None:
    name = "/".join(parts)
    is_plain = all(part in ("a", "b c") for part in parts)
    assert foreign.is_plain_name(name) == is_plain


def test_a_manifest_names_the_models_files_and_none_elsewhere(folders: dict[str, Path]) -> None:
    path = folders["checkpoint"]
    manifest = path / "MANIFEST.json"
    whole = json.loads(manifest.read_text())
    entry = whole["files"]["config.json"]
    for files, words in (
        ({}, "does not name model.safetensors, config.json, state.json, encoding.json"),
        ({**whole["files"], "../x": entry}, "names '../x', which is no file in this folder"),
        ({**whole["files"], "/etc/passwd": entry}, "names '/etc/passwd'"),
    ):
        storage.write_json(str(manifest), {"files": files})
        with pytest.raises(CheckpointError, match="not a whole checkpoint") as caught:
            checkpoint.verify(str(path))
        assert words in str(caught.value)
    storage.write_json(str(manifest), whole)
    checkpoint.verify(str(path))
