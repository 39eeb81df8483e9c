"""Preparing: each distinct document once, in an order that the texts decide, and the same bytes
however the corpus is cut into parts and files.

Most tests run the two passes in this process, where the sizes that they set hold; some run them
over Ray, and find the same bytes.
"""

import dataclasses
import gzip
import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.datasets import refusal
from helpers.preparing import (
    VAL_FRACTION,
    all_texts,
    config_of,
    content,
    set_sizes,
    silent,
    texts_of,
    tokens_of,
    write_rows,
)
from manta import layout
from manta.config import from_dict
from manta.data import manifest as manifests
from manta.data import passes, prepare, report, shards, vocabulary
from manta.data.manifest import Manifest
from manta.data.recipe import PrepareConfig
from manta.data.shuffle import SPLITS, Key
from manta.errors import ConfigError

# --- one dataset, over Ray -----------------------------------------------------------------------


def splits_of(rows: list[str]) -> dict[str, set[str]]:
    """The distinct documents of each split, by the digest of their text, computed independently."""
    found: dict[str, set[str]] = {"train": set(), "val": set()}
    for row in rows:
        if row.strip():
            word = int.from_bytes(
                hashlib.blake2b(row.encode(), digest_size=24).digest()[:8], "little"
            )
            found["val" if word / 2**64 < VAL_FRACTION else "train"].add(row)
    return found


def test_the_shards_hold_each_distinct_document_once(dataset: Manifest, rows: list[str]) -> None:
    assert len(dataset.split("train")) > 3
    for split, expected in splits_of(rows).items():
        found = texts_of(dataset, split)
        assert len(found) == len(set(found)) > 30
        assert set(found) == expected


def test_the_manifest_says_what_is_in_the_shards(dataset: Manifest, rows: list[str]) -> None:
    assert manifests.load(dataset.path) == dataset
    manifests.check(dataset)
    shards.verify(dataset, full=True)
    made = dataset.load_tokenizer()
    assert (dataset.vocab_size, dataset.eot, dataset.dtype) == (280, made.eot, "uint16")
    assert dataset.row_group_tokens == 512
    lengths = {"documents": [0] * 40, "tokens": [0] * 40}
    for shard in dataset.shards:
        ids = pq.read_table(f"{dataset.path}/{shard.file}")["tokens"].to_numpy()
        ends = np.flatnonzero(ids == made.eot) + 1
        pieces = np.split(ids, ends)[:-1]
        assert (shard.tokens, shard.documents) == (len(ids), len(ends)) == (ends[-1], len(pieces))
        assert shard.max_token == ids.max()
        text = [made.decode(piece[:-1].tolist()) for piece in pieces]
        assert shard.text_bytes == sum(len(t.encode()) for t in text)
        for piece in pieces:
            power = len(piece).bit_length() - 1
            lengths["documents"][power] += 1
            lengths["tokens"][power] += len(piece)
    assert dataset.lengths == lengths
    count = len([row for row in rows if row.strip()])
    assert dataset.dropped == {
        "empty": len(rows) - count,
        "contaminated": 0,
        "duplicate": count - sum(len(texts) for texts in splits_of(rows).values()),
    }
    assert dataset.dropped["empty"] == 3
    assert dataset.dropped["duplicate"] == 7
    said = report.summary(dataset)
    assert "3 empty, 0 contaminated, 7 duplicate documents" in said
    assert f"{dataset.text_bytes('val'):,} bytes of text" in said


def test_nothing_else_is_in_the_folder(dataset: Manifest) -> None:
    named = {shard.file for shard in dataset.shards}
    others = {layout.MANIFEST, layout.ENCODING, layout.LENGTHS, layout.SOURCES}
    assert set(content(dataset.path)) == named | others
    assert not (Path(dataset.path) / passes.WORK).exists()


def test_the_order_is_a_shuffle_that_the_texts_and_the_seed_decide(
    dataset: Manifest, rows: list[str], source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    place = {row: i for i, row in reversed(list(enumerate(rows)))}
    other = prepare.prepare(config_of(source, shuffle_seed=1), str(tmp_path), silent)
    for split in SPLITS:
        found, again = texts_of(dataset, split), texts_of(other, split)
        digests = [Key.digest(text.encode()) for text in found]
        order = Key.of(digests, seed=0).order
        assert (np.diff(order.astype(object)) > 0).all()
        assert sorted(found) == sorted(again)
        after = {text: i for i, text in enumerate(found)}
        for texts, places in ((found, place), (again, place), (again, after)):
            ranks = np.argsort(np.argsort([places[text] for text in texts]))
            correlation = np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]
            assert abs(correlation) < 4 / np.sqrt(len(ranks))


# --- the same bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part_bytes", "run_bytes", "batch_tokens"),
    [(8000, 3000, 300), (1, 10**9, 1), (10**9, 700, 10**9), (10**9, 10**9, 50)],
)
def test_other_parts_runs_and_batches_give_the_same_bytes(
    part_bytes: int, run_bytes: int, batch_tokens: int,
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    set_sizes(here, part_bytes, run_bytes, batch_tokens)
    again = prepare.prepare(config_of(source), str(tmp_path), silent)
    assert content(again.path) == content(dataset.path)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet"])
def test_the_same_documents_in_other_files_give_the_same_shards(
    kind: str, dataset: Manifest, rows: list[str], tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    draw = random.Random(1)
    others = draw.sample(rows, len(rows))
    folder = tmp_path / "others"
    folder.mkdir()
    for start in range(0, len(others), 70):
        piece = others[start : start + 70]
        file = folder / f"{draw.random()}{kind}"
        lines = "".join(json.dumps({"body": row}) + "\n" for row in piece).encode()
        if kind == ".parquet":
            pq.write_table(pa.table({"body": piece}), file, row_group_size=13)
        else:
            file.write_bytes(gzip.compress(lines) if kind == ".jsonl.gz" else lines)
    again = prepare.prepare(config_of(folder), str(tmp_path), silent)
    first, second = content(dataset.path), content(again.path)
    for name in (layout.MANIFEST, layout.SOURCES):  # they name the files
        assert first.pop(name) != second.pop(name)
    assert first == second
    assert dataclasses.replace(again, path=dataset.path, recipe=dataset.recipe) == dataset


def test_more_documents_leave_the_others_in_their_split(
    dataset: Manifest, source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "more", [[f"another one, {i}" for i in range(40)]])
    for file in source.iterdir():
        shutil.copy(file, tmp_path / "more" / f"old-{file.name}")
    more = prepare.prepare(config_of(tmp_path / "more"), str(tmp_path), silent)
    for split in SPLITS:
        old = set(texts_of(dataset, split))
        assert {t for t in texts_of(more, split) if not t.startswith("another")} == old


# --- odd documents -------------------------------------------------------------------------------


def long_text(size: int) -> str:
    """A text of many words that are not all the same, made quickly."""
    numbers = np.random.default_rng(0).integers(0, 10**6, size // 7)
    return " ".join(map(str, numbers.tolist()))


@pytest.mark.parametrize(
    ("letters", "size"),
    [(200_000, 5 << 20), pytest.param(50 << 20, 50 << 20, marks=pytest.mark.long)],
    ids=["short", "long"],
)
def test_odd_documents_come_back_as_they_were(
    letters: int, size: int, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    set_sizes(here, run_bytes=1 << 20, shard_tokens=1 << 19)
    here.setattr(vocabulary, "SAMPLE_BYTES", 100_000)  # all but the last one
    odd = [
        "",
        " \n\t　",
        "\x00",
        "\x00\x00 NUL \x00 bytes",
        "<|endoftext|>",
        "a <|endoftext|> b<|endoftext|>",
        "<|endoftext|>" * 500,
        "🐟🐠👩‍👩‍👧‍👦 e\u0301 \ufffd \ufeff \u2028",
        "\r\n windows \r\n",
        "no newline at the end",
        " white space around it\n\n",
        "x",
        "a" * letters,
        "🐟" * 10_000,
        "-" * 10_000,
        "\n" * 10_000 + "x",
        long_text(size),
    ]
    filler = [f"{i}" for i in range(60)]
    folder = write_rows(tmp_path / "odd", [odd, filler])
    made = prepare.prepare(config_of(folder), str(tmp_path), silent)
    expected = [text for text in [*odd, *filler] if text.strip()]
    # Compared by digest: a difference in 5 MB is nothing to print.
    digests = sorted(Key.digest(text.encode()) for text in all_texts(made))
    assert digests == sorted(Key.digest(text.encode()) for text in expected)
    assert made.dropped == {"empty": 2, "contaminated": 0, "duplicate": 0}
    ends = sum(int((tokens_of(made, split) == made.eot).sum()) for split in SPLITS)
    assert ends == len(expected)
    assert sum(made.text_bytes(split) for split in SPLITS) == sum(len(t.encode()) for t in expected)
    shards.verify(made, full=True)


def test_one_document_far_longer_than_a_shard(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    """Some ranges of hashes are then empty and give no shard."""
    texts = ["long " * 80_000, *(f"short {i}" for i in range(20))]
    c = config_of(write_rows(tmp_path / "rows", [texts]))
    made = prepare.prepare(c, str(tmp_path), silent)
    assert sorted(all_texts(made)) == sorted(texts)
    assert prepare._shards_for(made.tokens("train")) > 21 > len(made.split("train"))


# --- decontamination -----------------------------------------------------------------------------


def test_documents_that_share_n_words_with_an_example_are_dropped_and_counted(
    source: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    example_words = "how many rays of light reach the bottom of the sea"
    copies = [
        f"It asks: HOW many, rays of light! {i}" for i in range(5)
    ]  # five words in a row, set differently
    near = [f"how many rays of lights {i}" for i in range(40)]
    rows = write_rows(tmp_path / "rows", [near[:20] + copies[:2], near[20:] + copies[2:]])
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"question": example_words}) + "\n")
    plain = config_of(rows, name="plain")
    clean = config_of(rows, name="clean", decontaminate=[str(examples)], decontaminate_ngram=5)
    home = str(tmp_path / "home")
    assert sorted(all_texts(prepare.prepare(plain, home, silent))) == sorted(near + copies)
    made = prepare.prepare(clean, home, silent)
    assert sorted(all_texts(made)) == sorted(near)
    assert made.dropped == {"empty": 0, "contaminated": 5, "duplicate": 0}
    assert made.recipe != plain.recipe()
    said = refusal(lambda: prepare.find(dataclasses.replace(plain, name="clean"), home))
    assert "decontaminate=" in said and str(examples) in said
    other = dataclasses.replace(clean, decontaminate_ngram=6)
    said = refusal(lambda: prepare.find(other, home))
    assert "decontaminate_ngram=5, but the config says 6" in said


# --- a val split that is given apart -------------------------------------------------------------


def test_a_val_split_that_is_given_apart_is_all_of_it(
    tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    both = [f"in both {n}" for n in range(5)]
    train = [f"to train on {n}" for n in range(60)]
    val = [f"to measure on {n}" for n in range(20)]
    write_rows(tmp_path / "train", [train[:30], train[30:] + both])
    write_rows(tmp_path / "val", [val, both])
    c = from_dict(
        PrepareConfig,
        {
            "source": str(tmp_path / "train"),
            "val_source": str(tmp_path / "val"),
            "text_key": "body",
            "vocab_size": 280,
            "name": "apart",
        },
    )
    found = prepare.prepare(c, str(tmp_path), silent)
    assert sorted(texts_of(found, "train")) == sorted(train + both)
    assert sorted(texts_of(found, "val")) == sorted(val + both)
    assert found.recipe["val_source"] != found.recipe["source"]
    said = refusal(lambda: prepare.find(dataclasses.replace(c, val_source=None), str(tmp_path)))
    assert "val_" in said
    with pytest.raises(ConfigError, match="with val_source omit it"):
        from_dict(PrepareConfig, {"val_source": "x", "val_fraction": 0.1})
