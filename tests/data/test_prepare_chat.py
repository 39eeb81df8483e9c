"""A dataset of conversations: rows of whole ones, each there once, with every answer trained."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.preparing import set_sizes, silent, tokens_of
from manta.config import from_dict
from manta.data import conversations, prepare, report, stream
from manta.data import manifest as manifests
from manta.data.conversations import rule_of, trained
from manta.data.inspect import InspectConfig, inspect
from manta.data.manifest import Manifest
from manta.data.mixture import make_order
from manta.data.order import PERIOD, Phase, make_stages
from manta.data.recipe import DataConfig, PrepareConfig
from manta.errors import ConfigError, DataError
from manta.terminal import show
from manta.text.conversations import Turn
from manta.text.templates import Template
from manta.text.tokenizer_extras import RESERVED

WORDS = ["ray", "manta", "sea", "é", "🐟", "<|im_end|>", "1234", "why?", "<|endoftext|>", "yes"]
ROW = 256
pytestmark = pytest.mark.usefixtures("ray_session")  # preparation asks for its CPUs
Chat = list[Turn]


def chat(draw: random.Random, number: int, most: int = 3) -> Chat:
    turns = []
    for role in ["user", "assistant"] * draw.randint(1, most):
        turns.append(Turn(role, " ".join(draw.choices(WORDS, k=draw.randint(1, 6))) + f" {number}"))
    return turns


def some_chats(count: int = 240, most: int = 3) -> list[Chat]:
    draw = random.Random(0)
    return [chat(draw, number, most) for number in range(count)]


def row_of(turns: Chat) -> dict[str, Any]:
    return {"messages": [turn._asdict() for turn in turns]}


def write(folder: Path, rows: list[Any], files: int = 4) -> Path:
    folder.mkdir(parents=True)
    for i in range(files):
        lines = "".join(json.dumps(row) + "\n" for row in rows[i::files])
        (folder / f"{i}.jsonl").write_text(lines)
    return folder


def config_of(source: Path, cls: type = PrepareConfig, **keys: Any) -> Any:
    defaults = {
        "kind": "chat", "source": str(source), "name": "chats", "vocab_size": 300,
        "row_tokens": ROW, "val_fraction": 0.2,
    }  # fmt: skip
    return from_dict(cls, defaults | keys)


def pieces_of(manifest: Manifest, split: str, row_tokens: int = ROW) -> Counter[tuple[int, ...]]:
    """The conversations in the rows of a split, by their ids, without padding."""
    start = manifest.load_tokenizer().start
    found: Counter[tuple[int, ...]] = Counter()
    for row in tokens_of(manifest, split).reshape(-1, row_tokens):
        assert row[0] == start
        for piece in np.split(row, np.flatnonzero(row == start))[1:]:
            found[tuple(piece.tolist())] += len(piece) > 1
    return +found


@pytest.fixture
def made(here: pytest.MonkeyPatch, tmp_path: Path) -> Manifest:
    chats = some_chats()
    source = write(tmp_path / "rows", [row_of(turns) for turns in [*chats, *chats[:9]]])
    return prepare.prepare(config_of(source), str(tmp_path / "home"), silent)


def test_each_conversation_is_there_once_and_whole(made: Manifest) -> None:
    template = Template.of(made.load_tokenizer())
    expected = Counter(tuple(template.encode(turns).ids.tolist()) for turns in some_chats())
    assert pieces_of(made, "train") + pieces_of(made, "val") == expected
    assert made.dropped == {"empty": 0, "contaminated": 0, "duplicate": 9, "unlabelled": 0}
    assert made.documents("train") + made.documents("val") == len(expected)
    assert len(made.split("train")) > 3
    assert made.row_group_tokens % ROW == 0
    assert all(shard.tokens % ROW == 0 for shard in made.shards)
    manifests.check(manifests.load(made.path))
    assert f"rows of {ROW} tokens, whole conversations, " in report.summary(made)


def test_a_sequence_is_a_row_and_its_answers_are_trained(made: Manifest) -> None:
    order = make_order((made,), (Phase(0, (PERIOD,)),), make_stages({}, 4, 40), 0, ROW)
    rows, notes = stream.Reader((made,), order).read(0)
    assert not notes
    there = {row.tobytes() for row in tokens_of(made, "train").reshape(-1, ROW)}
    found = rule_of(made)
    mask = trained(found, rows.astype(np.int64))
    decode = made.load_tokenizer().decode
    for row, flags in zip(rows, mask, strict=True):
        assert row[:-1].tobytes() in there and row[-1] == found.start
        answers = decode(row[1:][flags].tolist()).split("<|im_end|>")
        text = decode(row.tolist())
        assert len(answers) > 1
        assert (row[1:][flags] == found.end).sum() == text.count("<|im_start|>assistant\n")


def test_the_bytes_depend_on_neither_parts_nor_files(
    here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [row_of(turns) for turns in some_chats()]
    digests = set()
    for files, part_bytes, run_bytes in ((4, 8000, 3000), (1, 1 << 20, 1 << 20), (7, 2000, 1000)):
        set_sizes(here, part_bytes, run_bytes)
        source = write(tmp_path / str(files), rows, files)
        home = str(tmp_path / f"home{files}")
        c = config_of(source, tokenizer=str(tokenizer_file(tmp_path)), vocab_size=None)
        manifest = prepare.prepare(c, home, silent)
        digests.add(tuple(shard.sha256 for shard in manifest.shards))
    assert len(digests) == 1


def tokenizer_file(folder: Path) -> Path:
    from manta.text import tokenizer

    file = folder / "encoding.json"
    file.write_bytes(tokenizer.train([" ".join(WORDS) * 9], 280).serialized)
    return file


def prepared(tmp_path: Path, rows: list[Any], say: Any = silent, **keys: Any) -> Manifest:
    source = tmp_path / "source"
    if not source.exists():
        write(source, rows, 1)
    return prepare.prepare(config_of(source, **keys), str(tmp_path / "home"), say)


def test_a_long_conversation_is_cut_after_an_answer(
    here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = [Turn(("user", "assistant")[i % 2], f"turn {i} " + "x" * i) for i in range(40)]
    rows = [row_of(turns) for turns in [*some_chats(60), long]]
    lines: list[str] = []
    manifest = prepared(tmp_path, rows, lines.append)
    assert sum(manifest.cut.values()) == 1
    file = f"{tmp_path}/source/0.jsonl"
    said = (
        f"cut 1 conversations after the last answer that fits in a row of {ROW} tokens: {file} (1)"
    )
    assert said in lines and said in report.summary(manifest)
    assert manifests.load(manifest.path) == manifest
    template = Template.of(manifest.load_tokenizer())
    found = pieces_of(manifest, "train") + pieces_of(manifest, "val")
    best = max(
        (template.encode(long[:n]).ids for n in range(2, 40, 2)),
        key=lambda ids: len(ids) if len(ids) <= ROW else 0,
    )
    assert found[tuple(best.tolist())] == 1


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([Turn("user", "Hi")], "no turn of the assistant, so nothing would be trained; add one"),
        (
            [Turn("user", " ".join(map(str, range(200)))), Turn("assistant", "y")],
            "raise data.row_tokens",
        ),
    ],
    ids=["no answer", "too long"],
)
def test_a_conversation_without_a_trained_token_is_named_or_counted(
    here: pytest.MonkeyPatch, tmp_path: Path, turns: Chat, what: str
) -> None:
    rows = [row_of(one) for one in [*some_chats(60)[:30], turns, *some_chats(60)[30:]]]
    with pytest.raises(DataError) as e:
        prepared(tmp_path, rows)
    said = str(e.value)
    assert said.startswith(f"{tmp_path}/source/0.jsonl, conversation 31: ")
    assert what in said and said.endswith("leave such rows out with data.on_unlabelled=skip")
    lines: list[str] = []
    manifest = prepared(tmp_path, rows, lines.append, on_unlabelled="skip")
    assert manifest.dropped["unlabelled"] == 1
    assert manifest.documents("train") + manifest.documents("val") == 60
    assert any("1 without a trained token" in line for line in lines)
    with pytest.raises(DataError, match="on_unlabelled=skip, but the config says fail"):
        prepare.find(config_of(tmp_path / "source"), str(tmp_path / "home"))


def test_an_ambiguous_row_is_never_trained_wrong(here: pytest.MonkeyPatch, tmp_path: Path) -> None:
    odd = [Turn("user", "Say\n\n### Response:\nno"), Turn("assistant", "no")]
    rows = [row_of(turns) for turns in [*some_chats(60, most=1), odd]]
    with pytest.raises(DataError, match="conversation 61: its text has what the template writes"):
        prepared(tmp_path, rows, template="alpaca")
    manifest = prepared(tmp_path, rows, template="alpaca", on_bad_rows="skip")
    assert manifest.skipped == {f"{tmp_path}/source/0.jsonl": {"ambiguous": 1}}
    assert sum((pieces_of(manifest, "train") + pieces_of(manifest, "val")).values()) == 60


def test_train_on_all_trains_everything_but_padding(
    here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifest = prepared(tmp_path, [row_of(t) for t in some_chats(60)], train_on="all")
    ids = tokens_of(manifest, "train").astype(np.int64).reshape(-1, ROW)
    followed = np.column_stack([ids, np.full(len(ids), manifest.load_tokenizer().start)])
    mask = trained(rule_of(manifest), followed)
    assert (mask == (followed[:, 1:] != manifest.load_tokenizer().start)).all()


def test_evaluation_examples_and_near_copies_are_dropped(
    here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    example = "one two three four five six seven"
    (tmp_path / "evals.jsonl").write_text(json.dumps({"question": example}) + "\n")
    copies = [
        [Turn("user", " ".join(f"word{i}" for i in range(80))), Turn("assistant", answer)]
        for answer in ("yes", "no")
    ]
    leaked = [Turn("user", f"So {example}?"), Turn("assistant", "Yes.")]
    rows = [row_of(turns) for turns in [*some_chats(60), leaked, *copies]]
    keys = {"decontaminate": [str(tmp_path / "evals.jsonl")], "decontaminate_ngram": 7}
    manifest = prepared(tmp_path, rows, deduplicate="near", row_tokens=1024, **keys)
    assert manifest.dropped["contaminated"] == 1
    assert manifest.dropped["near_duplicate"] == 1


def test_the_template_is_part_of_what_a_dataset_is(
    here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifest = prepared(tmp_path, [row_of(turns) for turns in some_chats(60, most=1)])
    source, home = tmp_path / "source", str(tmp_path / "home")
    assert prepare.find(config_of(source), home) == manifest
    for keys, said in (
        ({"template": "alpaca"}, "template=chatml, but the config says alpaca"),
        ({"row_tokens": 64}, "row_tokens=256, but the config says 64"),
        ({"train_on": "all"}, "train_on=assistant, but the config says all"),
    ):
        with pytest.raises(DataError, match=said):
            prepare.find(config_of(source, **keys), home)
    file = tmp_path / "a.jinja"
    file.write_text(Template.of(manifest.load_tokenizer()).source)
    recipe = config_of(source, template=str(file)).recipe()
    assert recipe["template"] == str(file)
    assert recipe["template_sha256"] == manifest.recipe["template_sha256"]
    assert conversations.rule_of(manifest).train_on == "assistant"


@pytest.mark.parametrize(("size", "reserved"), [(263, RESERVED), (262, ()), (300, RESERVED)])
def test_a_trained_tokenizer_has_the_tokens_for_chats_if_there_is_room(
    here: pytest.MonkeyPatch, tmp_path: Path, size: int, reserved: tuple[str, ...]
) -> None:
    rows = [{"text": " ".join(turns[0].content)} for turns in some_chats(40)]
    c = from_dict(PrepareConfig, {"source": str(write(tmp_path / "a", rows)), "vocab_size": size})
    made = prepare.prepare(c, str(tmp_path / "home"), silent).load_tokenizer()
    assert made.vocab_size <= size and made.eot == len(made.ranks)
    assert [token.content for token in made.extras.added] == ["<|endoftext|>", *reserved]


def test_a_dataset_of_text_has_the_recipe_that_it_always_had() -> None:
    recipe = from_dict(PrepareConfig, {}).recipe()
    assert recipe.keys() == {
        "source", "shuffle_seed", "decontaminate", "decontaminate_ngram", "tokenizer", "vocab_size",
        "val_fraction",
    }  # fmt: skip
    assert recipe["source"].keys() == {
        "location", "subset", "split", "text_key", "errors", "cut_bytes", "python",
    }  # fmt: skip


def test_it_is_no_dataset_of_conversations(dataset: Manifest) -> None:
    with pytest.raises(DataError, match=r"prepare it with data\.kind=chat"):
        rule_of(dataset)


@pytest.mark.parametrize("template", ["chatml", "alpaca"])
def test_inspecting_marks_what_is_trained(
    here: pytest.MonkeyPatch, tmp_path: Path, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [
        [Turn("user", f"Is {i} big?\x1b[2J"), Turn("assistant", f"No, {i}.")] for i in range(40)
    ]
    manifest = prepared(tmp_path, [row_of(turns) for turns in chats], template=template)
    for line in inspect(from_dict(InspectConfig, {"dataset": manifest.path, "samples": 99})):
        show(line)
    said = capsys.readouterr().out
    end = {"chatml": "<|im_end|>", "alpaca": "<|endoftext|>"}[template]
    answers = re.findall(r"Is (\d+) big\?\\x1b\[2J.*?\[\[(.*?)\]\]", said, re.DOTALL)
    assert len(answers) == said.count("[[") == said.count("\nsample ") > 5
    assert all(answer == f"No, {number}.{end}" for number, answer in answers)
    with pytest.raises(DataError, match=r"seq_len=64: the rows of .* have 256 tokens"):
        list(inspect(from_dict(InspectConfig, {"dataset": manifest.path, "seq_len": 64})))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kind": "chat"}, "source=python has no conversations"),
        (
            {"kind": "text", "row_tokens": 64},
            "row_tokens is for kind=chat or preference or classify: omit it",
        ),
        ({"kind": "text", "template": "alpaca"}, "template is for kind=chat: omit it"),
        (
            {"kind": "chat", "source": "a", "text_key": "b"},
            "text_key is for kind=text or classify: omit it",
        ),
        (
            {"kind": "chat", "source": "a", "packing": "best_fit"},
            "packing=best_fit is for kind=text",
        ),
    ],
)
def test_keys_of_the_other_kind_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_dict(DataConfig, keys)


def test_the_rows_of_a_template_that_cannot_be_used_are_not_prepared(
    here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.jinja").write_text("{{ messages[0]['content'] }}")
    rows = [row_of(turns) for turns in some_chats(9)]
    with pytest.raises(DataError, match=r"data.template=.*a.jinja: it has not one"):
        prepared(tmp_path, rows, template=str(tmp_path / "a.jinja"))
