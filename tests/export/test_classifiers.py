"""Classifiers as transformers' sequence-classification models, with the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoints import MODELS, model_of, save
from manta.config import load
from manta.errors import CheckpointError
from manta.export.convert import ExportConfig, ImportConfig, export, import_model
from manta.text import tokenizer

LABELS = ["ham", "spam", "neither"]
TEXTS = ["You have won!", "See you at home.", "x"]


def silent(line: str) -> None:
    pass


def saved(home: Path, keys: dict[str, Any]) -> Any:
    made = tokenizer.train(["You have won! See you at home."] * 9, 280)
    keys = keys | {"tie_embeddings": False, "labels": LABELS}
    model = model_of(keys, made.vocab_size)
    save(model, made, home)
    return model, made


@pytest.mark.parametrize("name", MODELS)
def test_transformers_has_the_same_logits(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, made = saved(tmp_path, MODELS[name])
    out = export(load(ExportConfig, [f"home={tmp_path}", "checkpoint=run"]), silent)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert list(config["id2label"].values()) == LABELS
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    fast = transformers.AutoTokenizer.from_pretrained(out)
    batch = fast(TEXTS, padding=True, return_tensors="pt")
    expected = [model(torch.tensor([[made.start, *made.encode(t)]]), last_only=True) for t in TEXTS]
    with torch.no_grad():
        logits = theirs(**batch).logits
    assert torch.allclose(logits, torch.cat(expected)[:, 0], atol=1e-5)
    assert "text-classification" in (out / "README.md").read_text()


def test_formats_of_language_models_refuse_a_classifier(tmp_path: Path) -> None:
    saved(tmp_path, {})
    for to in ("gguf", "llmc"):
        c = load(ExportConfig, [f"home={tmp_path}", "checkpoint=run", f"to={to}"])
        with pytest.raises(CheckpointError, match=f"to={to}: .* is a classifier of texts"):
            export(c, silent)
    assert not list((tmp_path / "exports").glob("*"))


def test_a_classifier_is_not_imported(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    saved(tmp_path, {})
    out = export(load(ExportConfig, [f"home={tmp_path}", "checkpoint=run"]), silent)
    c = load(ImportConfig, [f"home={tmp_path}", f"path={out}", "name=back"])
    with pytest.raises(CheckpointError, match="a classifier of texts, and Manta imports language"):
        import_model(c, silent)
