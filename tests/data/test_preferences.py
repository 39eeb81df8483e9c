"""A dataset of pairs: each pair whole in one row, and its two answers found in the ids alone."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.pairs import chat_tokenizer, encoded, rows_of, some_pairs
from helpers.preparing import silent, tokens_of
from manta.config import from_dict
from manta.data import conversations, preferences, prepare, reference
from manta.data.inspect import InspectConfig, inspect
from manta.data.manifest import Manifest
from manta.data.recipe import DataConfig
from manta.errors import ConfigError, DataError
from manta.text.templates import Template
from manta.text.tokenizer import Tokenizer

ROW = 384
pytestmark = pytest.mark.usefixtures("ray_session")  # preparation asks for its CPUs
TEMPLATES = ("chatml", "alpaca")


def config_of(folder: Path, rows: list[Any], made: Tokenizer, **keys: Any) -> DataConfig:
    (folder / "pairs.json").write_text(json.dumps(rows))
    (folder / "made.json").write_bytes(made.serialized)
    given = {
        "kind": "preference", "source": str(folder / "pairs.json"), "name": "pairs",
        "row_tokens": ROW, "val_fraction": 0.2, "tokenizer": str(folder / "made.json"),
    }  # fmt: skip
    return from_dict(DataConfig, given | keys)


def pieces(manifest: Manifest) -> Counter[bytes]:
    """The pairs of both splits, by their ids."""
    each = (preferences.pairs_of(manifest, shard) for shard in manifest.shards)
    return Counter(pair.tobytes() for pairs in each for pair in pairs)


@pytest.mark.parametrize("template", TEMPLATES)
def test_each_pair_is_there_once_and_whole(
    here: pytest.MonkeyPatch, tmp_path: Path, template: str
) -> None:
    made, rows = chat_tokenizer(template), some_pairs(150)
    c = config_of(tmp_path, [*rows, *rows[:9]], made)
    data = prepare.prepare(c, str(tmp_path / "home"), silent)
    dtype = made.dtype
    assert pieces(data) == Counter(encoded(made, row).astype(dtype).tobytes() for row in rows)
    assert data.dropped["duplicate"] == 9 and data.recipe["train_on"] == "last"
    rule = conversations.rule_of(data)
    total = 0
    for split in ("train", "val"):
        ids = tokens_of(data, split).reshape(-1, ROW).astype(np.int64)
        ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=made.start)
        found = preferences.answers_in(rule, ids)
        total += found.pairs
        for number in range(2 * found.pairs):
            text = made.decode(ids[:, 1:][found.of_target == number].tolist())
            end = made.decode([Template.of(made).end])
            assert text.endswith(f" {'+-'[number % 2]}{end}")
    assert total == len(rows)
    shown = "\n".join(inspect(from_dict(InspectConfig, {"dataset": data.path, "samples": 2})))
    assert "in the chosen and then the rejected answer, which are marked" in shown
    assert shown.count("\nsample ") == 2


def test_only_the_last_answers_count_and_a_conversation_has_one_key_wherever_it_is() -> None:
    made = chat_tokenizer()
    rule = conversations.rule(made, "last")
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"))
    long = [{"role": role, "content": text} for role, text in turns]
    pair = {"prompt": long, "chosen": "sea", "rejected": "ray"}
    others = some_pairs(3)
    ids = rows_of(made, [[pair, others[0]], [others[1], pair, others[2]]], 256)
    found = preferences.answers_in(rule, ids)
    decode = made.decode
    texts = [decode(ids[:, 1:][found.of_target == n].tolist()) for n in range(2 * found.pairs)]
    assert texts[:2] == texts[6:8] == ["sea<|im_end|>", "ray<|im_end|>"]
    assert (found.keys[:2] == found.keys[6:8]).all() and len(set(found.keys.tolist())) == 8
    unread = np.vstack([np.full_like(ids[:1], -100), ids])
    again = preferences.answers_in(rule, unread)
    assert (again.of_target[1:] == found.of_target).all() and (again.of_target[0] == -1).all()


def test_what_is_no_pair_for_a_row_is_named_or_counted(
    here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, rows = chat_tokenizer(), some_pairs(60)
    long = {"prompt": "x", "chosen": "sea " * 200, "rejected": "ray"}
    equal = {"prompt": "x", "chosen": "ray", "rejected": "ray"}
    home = str(tmp_path / "home")
    c = config_of(tmp_path, [*rows, long], made)
    with pytest.raises(DataError, match=r"pair 61: its .* do not fit in a row of 384; raise data"):
        prepare.prepare(c, home, silent)
    said: list[str] = []
    c = config_of(tmp_path, [*rows, long, equal], made, on_unlabelled="skip", on_bad_rows="skip")
    data = prepare.prepare(c, home, said.append)
    assert data.dropped["unlabelled"] == 1
    assert any("left out 2 rows" in line and "1 longer than a row" in line for line in said)
    bare = dataclasses.replace(made.extras, chat_template=None)
    other = Tokenizer("plain", made.pattern, made.ranks, made.eot, bare)
    (tmp_path / "plain.json").write_bytes(other.serialized)
    for given in ("bpe", str(tmp_path / "plain.json")):
        c = config_of(tmp_path, rows, made, name="other", tokenizer=given)
        with pytest.raises(DataError, match="has no chat template; preferences are learnt by a"):
            prepare.prepare(c, home, silent)
    for keys, words in (
        ({"template": "alpaca"}, "template is for kind=chat: omit it"),
        ({"train_on": "all"}, "train_on is for kind=chat: omit it"),
        ({"text_key": "x"}, "text_key is for kind=text or classify: omit it"),
    ):
        with pytest.raises(ConfigError, match=words):
            config_of(tmp_path, rows, made, **keys)


def test_a_reference_is_of_its_shard_and_whole(here: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made, rows = chat_tokenizer(), some_pairs(150)
    data = prepare.prepare(config_of(tmp_path, rows, made), str(tmp_path / "home"), silent)
    name = reference.name_of("ab" * 32, "fp32")
    assert name == "reference-abababababababab-fp32"
    assert reference.missing(data, name) == list(data.shards)
    rng = np.random.default_rng(0)
    expected = {}
    for shard in data.shards:
        keys = rng.integers(0, 2**64, 7, dtype=np.uint64)
        values = rng.random(7)
        expected |= dict(zip(keys.tolist(), values.tolist(), strict=True))
        reference.write(data, name, shard, keys, values)
    assert not reference.missing(data, name)
    found = reference.read(data, name)
    keys = np.array(list(expected), dtype=np.uint64)
    assert found.of(keys).tolist() == list(expected.values())
    with pytest.raises(DataError, match="lacks an answer of the dataset; delete this folder"):
        found.of(np.array([1], dtype=np.uint64))
    file = Path(reference.file_of(data, name, data.shards[0]))
    other = Path(reference.file_of(data, name, data.shards[1]))
    whole = file.read_bytes()
    flips = [bytes([*whole[:at], whole[at] ^ 4, *whole[at + 1 :]]) for at in range(len(whole))]
    deep = b"[" * 100_000 + b"\n" + whole
    for content in (whole[:-9], b"", other.read_bytes(), deep, *flips):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"train-00000\.bin: damaged.* delete it, and run"):
            reference.read(data, name)
    file.unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin: missing; run the same jobs/finetune"):
        reference.read(data, name)
    file.write_bytes(whole)
    assert (reference.read(data, name).keys == found.keys).all()
