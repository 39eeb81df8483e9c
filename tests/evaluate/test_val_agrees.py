"""Val bits per byte while a run trains, against lm-eval's over the whole val split."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from helpers.common import tiny_model_arguments
from helpers.datasets import write_shard
from manta import layout, storage
from manta.config import load
from manta.data.manifest import Manifest
from manta.evaluate.adapter import in_process
from manta.evaluate.documents import val_texts, whole_texts
from manta.evaluate.suites import run_suite
from manta.text import tokenizer as tokenizers
from manta.train.checkpoints import checkpoint
from manta.train.pretrain import pretrain
from manta.train.settings import PretrainConfig

CONTEXT, DOCUMENTS, TABLES = 64, 60, 12


def prose(rng: random.Random) -> str:
    who, where = ("cat", "dog", "ray", "bird"), ("sea", "hill", "town", "reef")
    verb = ("went to", "slept near", "looked at", "came back from")
    parts = (
        f"The {rng.choice(who)} {rng.choice(verb)} the {rng.choice(where)}." for _ in range(80)
    )
    return " ".join(parts)


def table(rng: random.Random) -> str:
    return "\n".join(f"{rng.randrange(10**6):06d},{rng.randrange(10**6):06d}" for _ in range(60))


def write_odd(folder: Path) -> Manifest:
    """A dataset of prose and tables, whose val split begins with all of its tables."""
    rng = random.Random(0)
    train = [make(rng) for _ in range(DOCUMENTS) for make in (prose, table)]
    val = [(table if i < TABLES else prose)(rng) for i in range(DOCUMENTS)]
    tokenizer = tokenizers.train(train, 320)
    storage.write_bytes(str(folder / layout.ENCODING), tokenizer.serialized)
    found = []
    for split, texts in (("train", train), ("val", val)):
        ids = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eot)]
        shard = write_shard(folder, f"{split}-00000.parquet", np.array(ids, np.uint16), 1024, split)
        size = sum(len(text.encode()) for text in texts)
        found.append(dataclasses.replace(shard, documents=len(texts), text_bytes=size))
    lengths = {"documents": [1], "tokens": [1]}
    recipe = {"source": {"location": "/none", "subset": None}, "val_fraction": 0.5}
    manifest = Manifest(
        str(folder), recipe, tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eot,
        "uint16", 1024, {"empty": 0}, lengths, tuple(found),
    )  # fmt: skip
    manifest.save()
    return manifest


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_a_part_of_the_val_split_has_the_bits_per_byte_of_the_whole(tmp_path: Path) -> None:
    """The part, an eighth of the split, is no larger than the tables at its beginning."""
    folder = tmp_path / "data" / "odd"
    folder.mkdir(parents=True)
    total = sum(shard.tokens for shard in write_odd(folder).split("val"))
    arguments = [
        *tiny_model_arguments(tmp_path), "name=odd", "data.mix={odd: 1}", "tokens_per_batch=512",
        f"model.context_length={CONTEXT}", "total_tokens=128000", "checkpoint.every=1000",
        "eval.every=1000", f"eval.tokens={total // 8}", "optimizer.lr=3e-3",
    ]  # fmt: skip
    done = pretrain(load(PretrainConfig, arguments), lambda _: None)
    assert total // 8 <= sum(done.state.val_sample.values()) < total // 8 + CONTEXT

    model = checkpoint.load_model(done.checkpoint)
    tokenizer = checkpoint.load_tokenizer(done.checkpoint)
    documents = whole_texts(val_texts(done.checkpoint), tokenizer, None)
    assert sum(d["num_tokens"] for d in documents[:TABLES]) > total // 8

    def bits_per_byte(chosen: list[dict[str, object]]) -> float:
        lm = in_process(model, tokenizer)
        scores = run_suite(lm, "perplexity", lambda *_: chosen, say=lambda _: None)
        return float(scores.results["perplexity"]["bits_per_byte"])

    whole, beginning = bits_per_byte(documents), bits_per_byte(documents[:TABLES])
    assert done.last_eval["val_bpb"] == pytest.approx(whole, rel=0.02)
    assert abs(beginning - whole) > 0.2 * whole
