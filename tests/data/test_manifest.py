"""The manifest comes back equal; an edited, damaged or older one is refused."""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from helpers.datasets import GROUP, SIZES, VAL, VOCAB_SIZE, A, B, C, Data, refusal
from manta import layout
from manta.data import manifest as manifests
from manta.data import shards
from manta.text import tokenizer


def test_a_manifest_comes_back_equal(original: Data) -> None:
    path = original.manifest.path
    assert manifests.exists(path)
    back = manifests.load(path)
    assert back == original.manifest
    assert back.sha256 == original.manifest.sha256
    assert back.tokens("train") == SIZES[A] + SIZES[B] + SIZES[C]
    assert (back.tokens("val"), back.text_bytes("val")) == (SIZES[VAL], 2 * SIZES[VAL])
    manifests.check(back)
    for full in (False, True):
        shards.verify(back, full=full)


def test_without_a_manifest_there_is_no_dataset(data: Data) -> None:
    data.path(layout.MANIFEST).unlink()
    assert not manifests.exists(data.manifest.path)
    assert "MANIFEST.json: no such file" in refusal(lambda: manifests.load(data.manifest.path))


def edit(data: Data, change: Callable[[dict[str, Any]], Any]) -> str:
    """Changes the manifest as a person with an editor might; returns the error of loading it."""
    path = data.path(layout.MANIFEST)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return refusal(lambda: manifests.load(data.manifest.path))


def test_another_versions_manifest_is_named_with_both_versions(data: Data) -> None:
    said = edit(data, lambda content: content.update(format="manta-data-1"))
    assert f"{data.path('MANIFEST.json')}: its format is 'manta-data-1'" in said
    assert f"reads '{manifests.FORMAT}'" in said
    assert f"delete {data.folder} " in said
    assert "format is None" in edit(data, lambda content: content.pop("format"))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["shards"][1].update(tokens=content["shards"][1]["tokens"] - 1),
        lambda content: content["shards"][2].update(sha256="0" * 64),
        lambda content: content.update(row_group_tokens=GROUP - 1),
        lambda content: content.update(vocab_size=VOCAB_SIZE + 1),
        lambda content: content["recipe"].update(val_fraction=0.06),
        lambda content: content["shards"].pop(),
        lambda content: content["shards"].clear(),
        lambda content: content["shards"].append(content["shards"][0]),
        lambda content: content["shards"].reverse(),
        lambda content: content.update(more=1),
        lambda content: content.update(tokenizer="\ud800"),
        lambda content: content.pop("eot"),
        lambda content: content.pop("sha256"),
        lambda content: content.update(sha256=None),
    ],
)
def test_an_edited_manifest_is_refused(change: Callable[[dict[str, Any]], Any], data: Data) -> None:
    said = edit(data, change)
    assert f"{data.path('MANIFEST.json')}: edited or damaged (its sha256 differs)" in said
    assert f"delete {data.folder} " in said


def test_a_manifest_with_its_keys_in_another_order_is_the_same(data: Data) -> None:
    path = data.path(layout.MANIFEST)
    content = json.loads(path.read_text())
    reordered = dict(reversed(content.items()))
    reordered["shards"] = [dict(sorted(shard.items())) for shard in content["shards"]]
    path.write_text(json.dumps(reordered, indent=4))
    assert manifests.load(data.manifest.path) == data.manifest


def test_a_manifest_whose_digest_is_right_and_its_keys_are_not_is_refused(data: Data) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["sha256"], content["eot"]
        content["sha256"] = manifests._digest(content)

    assert "MANIFEST.json: damaged (" in edit(data, change)


def test_a_truncated_manifest_is_refused(data: Data) -> None:
    path = data.path(layout.MANIFEST)
    content = path.read_bytes()
    for length in range(0, len(content.rstrip()), 29):
        path.write_bytes(content[:length])
        said = refusal(lambda: manifests.load(data.manifest.path))
        assert f"{path}: not valid JSON" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"shards: [a, b]", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"PAR1", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "format is None"),
        (b"3", "format is None"),
        (b"{}", "format is None"),
        (b'{"format": "manta-data-2"}', "edited or damaged"),
        (b'{"format": "manta-data-2", "recipe": "\xed\xa0\x80"}', "MANIFEST.json: "),
    ],
)
def test_what_is_no_manifest_is_refused(content: bytes, words: str, data: Data) -> None:
    data.path(layout.MANIFEST).write_bytes(content)
    assert words in refusal(lambda: manifests.load(data.manifest.path))


def test_a_manifest_that_contradicts_itself_is_refused(original: Data) -> None:
    largest = max(shard.max_token for shard in original.manifest.shards)
    manifests.check(dataclasses.replace(original.manifest, vocab_size=largest + 1))
    said = refusal(
        lambda: manifests.check(dataclasses.replace(original.manifest, vocab_size=largest))
    )
    assert re.search(rf"/(train|val)-\d+\.parquet: holds token id {largest}, but", said)
    assert f"has {largest}; prepare the data again" in said
    twice = (*original.manifest.shards, original.shard(B))
    said = refusal(lambda: manifests.check(dataclasses.replace(original.manifest, shards=twice)))
    assert f"MANIFEST.json: lists {B} twice" in said


def test_a_missing_or_another_tokenizer_is_refused(data: Data) -> None:
    path = data.path(layout.ENCODING)
    assert data.manifest.load_tokenizer().sha256 == data.manifest.tokenizer_sha256
    content = path.read_bytes()
    path.write_bytes(tokenizer.train(["other text"], 265).serialized)
    said = refusal(data.manifest.load_tokenizer)
    assert f"{path}: not the tokenizer that this dataset was made with" in said
    path.write_bytes(content[:-10])
    assert f"{path}: not a tokenizer" in refusal(data.manifest.load_tokenizer)
    path.unlink()
    assert f"{path}: no such file" in refusal(data.manifest.load_tokenizer)
