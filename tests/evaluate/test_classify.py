"""jobs/classify.py: labels for texts, as lines and as files, and what it refuses."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoints import model_of, save
from manta.config import load
from manta.errors import CheckpointError, ConfigError, DataError
from manta.evaluate.classify import ClassifyConfig, classify
from manta.evaluate.labelling import probabilities
from manta.model.gpt import GPT
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint

NAMES = ["ham", "spam"]
TEXTS = ["You have won!", "See you at home.", 'a, b\nand "c"', "x" * 200]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a language model, `base`, and a classifier, `run`."""
    folder, made = tmp_path_factory.mktemp("classify"), tokenizer()
    save(model_of({}, made.vocab_size), made, folder, "base")
    keys = {"tie_embeddings": False, "labels": NAMES}
    save(model_of(keys, made.vocab_size), made, folder)
    return folder


def tokenizer() -> Tokenizer:
    return tokenizers.train(["You have won! See you at home."] * 9, 280)


def ran(home: Path, *keys: str) -> tuple[list[str], list[str]]:
    """The lines on standard output, and the hints."""
    hints: list[str] = []
    c = load(ClassifyConfig, [f"home={home}", "checkpoint=run", "device=cpu", *keys])
    return list(classify(c, hints.append)), hints


def expected(home: Path, text: str) -> list[float]:
    path = checkpoint.resolve("run", str(home))
    model, made = checkpoint.load_model(path, classifies=True), checkpoint.load_tokenizer(path)
    ids = [made.start, *made.encode(text)][: model.config.context_length - 1]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), last_only=True)[0, 0]
    return logits.softmax(0).tolist()


def test_a_text_gets_its_label_and_probabilities(home: Path) -> None:
    (line,), hints = ran(home, f"text={TEXTS[0]}")
    label, *shown = line.split("\t")
    chances = expected(home, TEXTS[0])
    assert shown == [f"{name} {p:.4f}" for name, p in zip(NAMES, chances, strict=True)]
    assert label == NAMES[chances.index(max(chances))] and not hints


def test_a_batch_has_the_probabilities_of_its_texts() -> None:
    keys = {"tie_embeddings": False, "labels": NAMES}
    model = model_of(keys, 300)
    texts = [torch.randint(300, (n,)).numpy() for n in (3, 31, 1, 17, 32)]
    found = probabilities(model, texts)
    for ids, row in zip(texts, found, strict=True):
        assert torch.allclose(torch.tensor(row), torch.tensor(probabilities(model, [ids])[0]))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_file_is_labelled_and_scored(home: Path, ending: str, tmp_path: Path) -> None:
    rows = [{"text": t, "label": n} for t, n in zip(TEXTS, [*NAMES, "eggs", "ham"], strict=True)]
    source, out = tmp_path / "in.jsonl", tmp_path / f"out.{ending}"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": " "}]))
    lines, hints = ran(home, f"file={source}", f"out={out}")
    assert lines[0] == f"wrote 4 labels to {out}"
    assert lines[1].startswith("3 texts have a label: accuracy ")
    assert any("does not know: eggs (1); it knows ham, spam. Those 1 texts" in h for h in hints)
    assert "left out 1 empty texts" in hints
    assert any(h.startswith("cut 1 texts at their end") for h in hints)
    if ending == "jsonl":
        found = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        with out.open(newline="") as file:
            dialect = "excel-tab" if ending == "tsv" else "excel"
            found = list(csv.DictReader(file, dialect=dialect, quoting=csv.QUOTE_NONE)
                         if ending == "tsv" else csv.DictReader(file))  # fmt: skip
    texts = [" ".join(t.split()) for t in TEXTS] if ending == "tsv" else TEXTS
    assert [row["text"] for row in found] == texts
    assert [row["expected"] for row in found] == [row["label"] for row in rows]
    for row, text in zip(found, TEXTS, strict=True):
        chances = expected(home, text)
        assert row["label"] == NAMES[chances.index(max(chances))]
        assert float(row["probability"]) == pytest.approx(max(chances), abs=1e-4)
    with pytest.raises(ConfigError, match="it already exists"):
        ran(home, f"file={source}", f"out={out}")


def test_standard_output_is_a_table_without_an_out(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text,label\nYou have won!,spam\nSee you,ham\n")
    lines, hints = ran(home, f"file={source}")
    assert lines[0].split("\t") == ["label", "probability", "expected", "text"] and len(lines) == 3
    assert any(h.startswith("2 texts have a label: accuracy ") for h in hints)
    source.write_text("text\nYou have won!\n")
    assert ran(home, f"file={source}")[0][0].split("\t") == ["label", "probability", "text"]


def test_messages_about_rows_name_the_keys_of_this_job(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "data.csv"
    source.write_text("a,b,c\n1,2,3\n")
    with pytest.raises(DataError, match="; set label_key and text_key to names in it"):
        ran(home, f"file={source}")
    with pytest.raises(DataError, match=r"file=.*none.csv: no such file"):
        ran(home, f"file={tmp_path}/none.csv")
    source.write_text("text\n\n  \n")
    with pytest.raises(DataError, match="no text in it"):
        ran(home, f"file={source}")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "give text=... or file=..., one of them"),
        (["text=a", "file=b.csv"], "give text=... or file=..., one of them"),
        (["text= "], "text: it is empty"),
        (["text=a", "out=b.csv"], "out is for a file of texts"),
        (["file=a.csv", "out=b.txt"], "its ending should be one of"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(ClassifyConfig, keys)


def test_a_model_of_the_other_sort_is_refused(home: Path, load_job: Callable[[str], Any]) -> None:
    with pytest.raises(CheckpointError, match="a language model, not a classifier; make one"):
        ran(home, "checkpoint=base", "text=a")
    path = checkpoint.resolve("run", str(home))
    with pytest.raises(CheckpointError, match=r"a classifier of texts \(ham, spam\), which pred"):
        checkpoint.load_model(path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_starts_from_a_language_model_with_a_head_of_its_own(
    tied: bool, tmp_path: Path
) -> None:
    made = tokenizer()
    base = model_of({"tie_embeddings": tied}, made.vocab_size)
    path = save(base, made, tmp_path)
    torch.manual_seed(5)
    model = GPT(base.config.classifying(("a", "b")))
    head = model.head.weight.detach().clone()
    checkpoint.load_weights_for(path, made, model)
    assert torch.equal(model.head.weight, head) and head.std() > 0
    for name, weight in base.state_dict().items():
        if name != "head.weight":
            assert torch.equal(model.state_dict()[name], weight), name
    again = GPT(model.config)
    checkpoint.load_weights_for(save(model, made, tmp_path, "tuned"), made, again)
    assert torch.equal(again.head.weight, head)  # the same labels: it goes on
