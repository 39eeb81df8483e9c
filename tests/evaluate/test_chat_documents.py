"""Suites on a dataset of conversations: its documents have the ids that a run trains on."""

import json
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import MODELS, model_of
from helpers.evaluation import HABITS, TEXT
from helpers.preparing import silent, without_ray
from manta.config import from_dict
from manta.data import prepare
from manta.data.conversations import conversations_of
from manta.data.manifest import Manifest
from manta.data.recipe import PrepareConfig
from manta.evaluate.adapter import in_process
from manta.evaluate.conversation import Conversation, ids_of
from manta.evaluate.documents import texts_of, whole_texts
from manta.evaluate.suites import run_suite
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer

COUNT = 60


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([TEXT], 300)


@pytest.fixture
def chats(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    without_ray(monkeypatch)
    animals = [*HABITS.items()] * (COUNT // len(HABITS))
    rows = [
        {
            "instruction": f"Where did the {animal} {i} go?",
            "input": "",
            "output": f"To the {place}.",
        }
        for i, (animal, (place, _)) in enumerate(animals)
    ]
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    (tmp_path / "encoding.json").write_bytes(tokenizer.serialized)
    keys = {
        "kind": "chat", "source": str(tmp_path / "chats.json"), "name": "chats",
        "tokenizer": str(tmp_path / "encoding.json"), "vocab_size": None, "row_tokens": 128,
        "val_fraction": 0.4,
    }  # fmt: skip
    return prepare.prepare(from_dict(PrepareConfig, keys), str(tmp_path), silent)


def test_a_conversation_is_a_document_with_its_own_ids(chats: Manifest) -> None:
    made = chats.load_tokenizer()
    found = texts_of(chats, made)
    ids = [c.tolist() for shard in chats.split("val") for c in conversations_of(chats, shard)]
    assert [[made.start, *ids_of(text, made)] for text in found] == ids
    assert all(isinstance(text, Conversation) and "<|" not in text for text in found)
    assert all("\nassistant\nTo the " in text for text in found)


def test_a_model_without_the_special_tokens_reads_the_text(
    chats: Manifest, tokenizer: Tokenizer
) -> None:
    found = texts_of(chats, tokenizer)
    assert found == texts_of(chats, chats.load_tokenizer())
    assert not any(isinstance(text, Conversation) for text in found)


@pytest.mark.parametrize("most", [None, 25, 200])
def test_perplexity_is_over_the_ids_of_the_conversations(chats: Manifest, most: int | None) -> None:
    """The same holds for the split's beginning, as suite=quick measures it."""
    made = chats.load_tokenizer()
    model = model_of({**MODELS["llama"], "context_length": 128}, made.vocab_size)
    documents = whole_texts(texts_of(chats, made), made, most)
    found = run_suite(
        in_process(model, made), "perplexity", lambda *_: documents, say=lambda _: None
    ).results["perplexity"]
    whole = [c.tolist() for shard in chats.split("val") for c in conversations_of(chats, shard)]
    total, count, left = 0.0, 0, most if most is not None else 10**9
    for ids in whole:
        ids = ids[: 1 + left]
        with torch.no_grad():
            log = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
        total -= sum(log[i, token].item() for i, token in enumerate(ids[1:]))
        count += len(ids) - 1
        left -= len(ids) - 1
        if left <= 0:
            break
    assert sum(document["num_tokens"] for document in documents) == count
    assert found["token_perplexity"] == pytest.approx(
        torch.tensor(total / count).exp().item(), rel=1e-4
    )
