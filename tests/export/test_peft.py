"""Checkpoints with adapters: PEFT opens what is exported, and all else opens them as they are."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoints import MODELS, model_of, save
from helpers.common import TEXT
from helpers.models import some_tokens
from manta import layout, storage
from manta.config import load
from manta.errors import CheckpointError, ConfigError
from manta.export import huggingface
from manta.export.convert import ExportConfig, export
from manta.model import lora
from manta.model.gpt import GPT
from manta.model.lora import LoraConfig
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import RESERVED
from manta.train.checkpoints import checkpoint

# Models, and the adapters of each.
CASES: dict[str, tuple[str, LoraConfig]] = {
    "gpt2": ("gpt2", LoraConfig(rank=4)),
    "gpt2 attention": ("gpt2", LoraConfig(rank=3, alpha=5.0, targets=("out", "qkv"))),
    "llama": ("llama, grouped", LoraConfig(rank=8, dropout=0.1)),
    "qwen3": ("qwen3", LoraConfig(rank=2, alpha=16.0, targets=("qkv", "gate", "down"))),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([TEXT], 330, RESERVED)


def saved(kind: str, c: LoraConfig, tokenizer: Tokenizer, home: Path, name: str = "run") -> GPT:
    """Saves a model with adapters that have learnt something; returns it."""
    model = model_of(MODELS[kind], tokenizer.vocab_size)
    model.norm.weight.data += name == "other"
    lora.attach(model, c)
    torch.manual_seed(len(name))
    for key, weight in model.named_parameters():
        if key.endswith(lora.B):
            torch.nn.init.normal_(weight, std=0.05)
    save(model.eval(), tokenizer, home, name, c)
    return model


def exported(home: Path, *keys: str) -> Path:
    return export(load(ExportConfig, [f"home={home}", "checkpoint=run", *keys]), lambda line: None)


def path_of(home: Path, name: str = "run") -> str:
    return layout.checkpoint_folder(f"{home}/runs/{name}", 7)


@pytest.mark.parametrize("case", CASES)
def test_peft_opens_the_adapters_and_merges_them(
    case: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind, c = CASES[case]
    model = saved(kind, c, tokenizer, tmp_path)
    out = exported(tmp_path, "to=peft", f"out={tmp_path / 'made'}")
    shutil.move(out, moved := tmp_path / "moved")  # nothing depends on where it was written
    base = AutoModelForCausalLM.from_pretrained(moved / "base").eval()
    tokens = some_tokens(2, 32) % tokenizer.vocab_size
    with torch.no_grad():
        alone = base(tokens).logits
        theirs: Any = PeftModel.from_pretrained(base, moved / "adapter")
        found, expected = theirs.eval()(tokens).logits, model(tokens)
        assert (found - expected).abs().max() < 1e-5
        assert (alone - expected).abs().max() > 1e-3
        merged = theirs.merge_and_unload()
        assert (merged(tokens).logits - expected).abs().max() < 1e-5
        whole = exported(tmp_path, f"out={tmp_path / 'whole'}")
        assert huggingface.difference(huggingface.opened(whole), model, tokenizer) < 1e-5
    config = json.loads((moved / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == c.rank and config["lora_alpha"] == c.scale * (c.rank or 0)
    assert not Path(config["base_model_name_or_path"]).is_absolute()
    assert 'PeftModel.from_pretrained(base, "made/adapter")' in (moved / "README.md").read_text()


def test_a_classifiers_adapters_are_exported_with_its_head(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from peft import PeftModel

    made = model_of(MODELS["llama, grouped"], tokenizer.vocab_size)
    model = GPT(made.config.classifying(("ham", "spam"))).eval()
    lora.attach(model, LoraConfig(rank=4))
    learnt = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learnt == {"head.weight", *lora.split(model.state_dict())[1]}
    for name in learnt:
        torch.nn.init.normal_(model.get_parameter(name), std=0.05)
    save(model, tokenizer, tmp_path, adapters_of=LoraConfig(rank=4))
    out = exported(tmp_path, "to=peft", f"out={tmp_path / 'made'}")
    theirs = PeftModel.from_pretrained(huggingface.opened(out / "base"), out / "adapter")
    assert huggingface.difference(theirs.eval(), model, tokenizer) < 1e-5


def test_a_checkpoint_opens_merged_bare_and_for_training(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    c = LoraConfig(rank=4)
    model = saved("qwen3", c, tokenizer, tmp_path)
    path = path_of(tmp_path)
    checkpoint.verify(path)
    tokens = some_tokens(2, 32) % tokenizer.vocab_size
    own, adapters = lora.split(model.state_dict())
    with torch.no_grad():
        merged = checkpoint.load_model(path)
        assert not lora.has_adapters(merged)
        assert (merged(tokens) - model(tokens)).abs().max() < 1e-5
        bare = checkpoint.load_model(path, bare=True).state_dict()
        assert all(torch.equal(bare[name], weight) for name, weight in own.items())
        again = GPT(model.config)
        lora.attach(again, c)
        checkpoint.load_weights(path, again)
        for name, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight), name
        # A run that starts from it starts from what it computes, with no adapters or new ones.
        for given in (LoraConfig(), LoraConfig(rank=2)):
            new = GPT(model.config).eval()
            if given.rank is not None:
                lora.attach(new, given)
            checkpoint.load_weights_for(path, tokenizer, new)
            assert (new(tokens) - model(tokens)).abs().max() < 1e-5
    found = checkpoint.load_adapter(path)
    assert found is not None and found.config == c.for_model(model.config)
    assert found.weights.keys() == adapters.keys()


def forged(path: str, change: Any) -> None:
    """Writes the manifest for files that `change` has changed, as somebody else may do."""
    change(Path(path))
    manifest = Path(path, layout.MANIFEST)
    files = json.loads(manifest.read_text())["files"]
    for name in files:
        file = Path(path, name)
        files[name] = {"size": file.stat().st_size, "sha256": storage.sha256(str(file))}
    manifest.write_text(json.dumps({"files": files}))


def test_adapters_for_another_model_are_refused_with_what_differs(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    saved("llama", LoraConfig(rank=4), tokenizer, tmp_path)
    saved("llama", LoraConfig(rank=4), tokenizer, tmp_path, "other")  # with other weights
    saved("gpt2", LoraConfig(rank=4), tokenizer, tmp_path, "shape")
    names = (layout.ADAPTER, layout.ADAPTER_CONFIG)

    def taken(source: str, base: bool = False) -> Any:
        def change(folder: Path) -> None:
            for name in names:
                shutil.copy(Path(path_of(tmp_path, source), name), folder / name)
            if base:  # as if it were for these weights
                about = json.loads((folder / names[1]).read_text())
                about["base"] = storage.sha256(str(folder / layout.WEIGHTS))
                (folder / names[1]).write_text(json.dumps(about))

        return change

    def more_rank(folder: Path) -> None:
        about = json.loads((folder / names[1]).read_text())
        about["lora"]["rank"] = 5
        (folder / names[1]).write_text(json.dumps(about))

    path = path_of(tmp_path)
    whole = tmp_path / "whole"
    shutil.copytree(path, whole)
    for change, words in (
        (taken("other"), "the adapter is for other weights"),
        (taken("shape", base=True), r"down.lora_a is \(4, 256\), not \(4, 192\)"),
        (more_rank, r"lora_a is \(4, .*\), not \(5, "),
        (lambda folder: (folder / names[1]).write_text("{}"), names[1]),
    ):
        forged(path, change)
        for opens in (checkpoint.load_model, checkpoint.verify):
            with pytest.raises(CheckpointError, match=words) as caught:
                opens(path)
            assert "\n" not in str(caught.value)
        shutil.rmtree(path)
        shutil.copytree(whole, path)
    Path(path, layout.ADAPTER).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=layout.ADAPTER):
        checkpoint.load_model(path)


def test_a_checkpoint_without_adapters_has_none_to_export(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save(model_of(MODELS["gpt2"], tokenizer.vocab_size), tokenizer, tmp_path)
    with pytest.raises(ConfigError, match=r"to=peft writes LoRA's adapters, and .* has none"):
        exported(tmp_path, "to=peft")
    assert dataclasses.asdict(load(ExportConfig, []))["to"] == "hf"
