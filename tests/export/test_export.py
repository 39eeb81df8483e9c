"""Export and import, against transformers, gguf's reader, and files laid out by hand."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checkpoints import MODELS, model_of, save
from helpers.common import TEXT
from helpers.models import some_tokens
from manta.config import load
from manta.errors import CheckpointError, ConfigError, DataError
from manta.export import ggml, huggingface, llmc
from manta.export import weights as layouts
from manta.export.convert import ExportConfig, ImportConfig, export, import_model
from manta.model.generate import Sampling, generate
from manta.model.gpt import GPT
from manta.text import tokenizer as tokenizers
from manta.text import tokenizer_json
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import RESERVED
from manta.train.checkpoints import checkpoint
from manta.train.resume import check_tokenizer

few = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([TEXT], 330, RESERVED)


def exported(home: Path, *keys: str) -> Path:
    return export(load(ExportConfig, [f"home={home}", "checkpoint=run", *keys]), lambda line: None)


def imported(home: Path, *keys: str) -> str:
    return import_model(load(ImportConfig, [f"home={home}", *keys]), lambda line: None)


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_opens_what_is_exported_and_it_comes_back(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """`export` itself compares logits and tokens; this test compares a completion, token by
    token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = model_of(MODELS[kind], tokenizer.vocab_size)
    save(model, tokenizer, tmp_path)
    out = exported(tmp_path, f"out={tmp_path / 'model'}")
    theirs = AutoModelForCausalLM.from_pretrained(out)
    prompt = AutoTokenizer.from_pretrained(out)("The cat", return_tensors="pt")
    new = 32 - prompt["input_ids"].shape[1]
    found = theirs.generate(**prompt, max_new_tokens=new, do_sample=False)[0].tolist()
    tokens = tokenizer.encode("The cat")
    ours = list(generate(model, tokens, new, sampling=Sampling(temperature=0), stop=tokenizer.eot))
    assert found[: len(tokens) + len(ours)] == [*tokens, *ours]
    assert "# run" in (out / "README.md").read_text()
    back = imported(tmp_path, f"path={out}", "name=back")
    again = checkpoint.load_model(back)
    assert checkpoint.load_tokenizer(back).sha256 == tokenizer.sha256
    rows = some_tokens(2, 32) % tokenizer.vocab_size
    torch.testing.assert_close(again(rows), model(rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_a_model_of_transformers_is_imported(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = (
        {"n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96}
        if kind == "gpt2"
        else {
            "max_position_embeddings": 32, "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
            "head_dim": 16, "tie_word_embeddings": False,
        }
    )  # fmt: skip
    torch.manual_seed(1)
    c = AutoConfig.for_model(kind, vocab_size=tokenizer.vocab_size, **shape)
    theirs = AutoModelForCausalLM.from_config(c).eval()
    for weight in theirs.parameters():
        weight.data += torch.randn(weight.shape) * 0.1
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer_json.to_json(tokenizer))
    path = imported(tmp_path, f"path={tmp_path / 'theirs'}", "name=mine")
    rows = some_tokens(2, 32) % tokenizer.vocab_size
    with torch.no_grad():
        expected = theirs(rows).logits
        torch.testing.assert_close(checkpoint.load_model(path)(rows), expected, atol=1e-4, rtol=0)


def test_names_and_buffers_of_gpt2s_first_files_are_known(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = model_of(MODELS["gpt2"], tokenizer.vocab_size)
    save(model, tokenizer, tmp_path)
    out = exported(tmp_path, f"out={tmp_path / 'model'}")
    tensors = load_file(out / "model.safetensors")
    short = {name.removeprefix("transformer."): weight for name, weight in tensors.items()}
    short |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    save_file(short, out / "model.safetensors")
    again = checkpoint.load_model(imported(tmp_path, f"path={out}"))
    rows = some_tokens(2, 32) % tokenizer.vocab_size
    torch.testing.assert_close(again(rows), model(rows))


@given(text=st.text(max_size=200))
@few
def test_the_exported_tokenizer_reads_every_text_alike(text: str) -> None:
    ours, fast = both()
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert fast.encode(mended, add_special_tokens=False).ids == ours.encode(text)


def both(made: dict[str, Any] = {}) -> tuple[Tokenizer, Any]:  # noqa: B006  # a cache
    from tokenizers import Tokenizer as FastTokenizer

    if not made:
        ours = tokenizers.train([TEXT, "naïve 日本語 " * 50, "    if x:\n        y\n" * 50], 400)
        fast = FastTokenizer.from_str(tokenizer_json.to_json(ours))
        fast.encode_special_tokens = True
        made |= {"ours": ours, "fast": fast}
    return made["ours"], made["fast"]


def test_a_tokenizer_that_manta_cannot_have_is_refused(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer_json.to_json(tokenizer))
    assert tokenizer_json.from_json(json.dumps(content).encode(), "x").sha256 == tokenizer.sha256

    def refused(words: str, **keys: Any) -> None:
        data = json.dumps({**content, **keys}).encode()
        with pytest.raises(DataError, match=words) as caught:
            tokenizer_json.from_json(data, "x/tokenizer.json")
        assert "\n" not in str(caught.value)

    refused("not byte-level", model={"type": "WordPiece", "vocab": {"a": 0}})
    refused("not byte-level", model={"type": "BPE", "vocab": {"\u2581the": 0}})
    refused("normalizer={'type': 'NFKC'}", normalizer={"type": "NFKC"})
    refused("special tokens", added_tokens=[])
    refused("splits text", pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        tokenizer_json.from_json(b"[]", "x")


def test_a_tokenizer_that_would_give_other_tokens_is_refused(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer_json.to_json(tokenizer))
    merges = content["model"]["merges"]
    regex, bytes_ = content["pre_tokenizer"]["pretokenizers"]

    def refused(words: str, change: dict[str, Any], **keys: Any) -> None:
        data = json.dumps({**content, "model": {**content["model"], **change}, **keys}).encode()
        with pytest.raises(DataError, match=words):
            tokenizer_json.from_json(data, "x/tokenizer.json")

    refused("in the order of their ids", {"merges": [*merges[1:], merges[0]]})
    refused("in the order of their ids", {"merges": merges[:-1]})
    refused("model.dropout=0.5", {"dropout": 0.5})
    refused("model.byte_fallback=True", {"byte_fallback": True})
    for parts in ([regex, {"type": "Digits"}, bytes_], [regex, regex, bytes_], [bytes_]):
        splitter = {"type": "Sequence", "pretokenizers": parts}
        refused("splits text in a way", {}, pre_tokenizer=splitter)
    nothing = {**regex, "pattern": {"Regex": "zzz"}}
    splitter = {"type": "Sequence", "pretokenizers": [nothing, bytes_]}
    refused("it loses parts of a text", {}, pre_tokenizer=splitter)


def by_hand(model: GPT, version: int) -> bytes:
    """A file as llm.c's train_gpt2.py writes it: weights in its order, linear layers as (out,
    in)."""
    c, s = model.config, model.state_dict()
    header = np.zeros(256, np.int32)
    header[:8] = 20240326, version, 32, c.vocab_size, 2, 4, 64, 384
    wte = torch.zeros(384, 64)
    wte[: c.vocab_size] = s["embedding.weight"]
    weights = [wte, s["positions.weight"]]
    for part in (
        "attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up", "mlp.down",
    ):  # fmt: skip
        for kind in ("weight", "bias"):
            weights += [s[f"blocks.{layer}.{part}.{kind}"] for layer in range(2)]
    weights += [s["norm.weight"], s["norm.bias"]]
    data = header.tobytes()
    for weight in weights:
        bits = weight.bfloat16().view(torch.int16) if version == 5 else weight
        data += bits.numpy().tobytes()
    return data


def with_number(data: bytes, at: int, value: int) -> bytes:
    """The file with another int32 at place `at`; from place 256 on there are weights."""
    numbers = np.frombuffer(data, np.int32).copy()
    numbers[at] = value
    return numbers.tobytes()


@pytest.mark.parametrize("version", [3, 5])
def test_llm_cs_files_are_read_and_written(
    version: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = model_of(MODELS["gpt2"], tokenizer.vocab_size)
    file = tmp_path / "gpt2.bin"
    file.write_bytes(by_hand(model, version))
    c, state = llmc.read(file)
    for name, weight in model.state_dict().items():
        if name != "head.weight":
            expected = weight.bfloat16().float() if version == 5 else weight
            assert torch.equal(state[name], expected), name
    if version == 3:
        save(model, tokenizer, tmp_path)
        out = exported(tmp_path, "to=llmc", f"out={tmp_path / 'again.bin'}")
        assert out.read_bytes() == file.read_bytes()
        assert c.context_length == 32
    for data, words in (
        (file.read_bytes()[:-1], "cut short"),
        (file.read_bytes() + b"x", "continues after"),
        (b"x" * 2000, "not an llm.c model"),
        (with_number(file.read_bytes(), 7, 10), "vocabulary of 330 tokens has 10 rows"),
        (with_number(file.read_bytes(), 4, 10**9), "cut short"),
        (with_number(file.read_bytes(), 300, 0x7FC00000), "NaN or infinite"),
    ):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=words):
            llmc.read(file)


def test_llm_c_has_no_other_models(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, keys, words in (
        ("a", {"family": "modern"}, "model.family=modern"),
        (
            "b",
            {"family": "gpt2", "tie_embeddings": False, "mlp_hidden": 96},
            "tie_embeddings=false.*mlp_hidden=96.*use to=hf",
        ),
    ):
        save(model_of(keys, tokenizer.vocab_size), tokenizer, tmp_path, name)
        with pytest.raises(CheckpointError, match=words):
            exported(tmp_path, f"checkpoint={name}", "to=llmc", f"out={tmp_path / name}.bin")
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", MODELS)
def test_gguf_has_the_same_model(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """gguf's own reader reads what was written, and transformers reads it as a model with the same
    logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = model_of(MODELS[kind], tokenizer.vocab_size + 5)  # ids without a token
    save(model, tokenizer, tmp_path)
    file = exported(tmp_path, "to=gguf", f"out={tmp_path / 'model.gguf'}")
    assert ggml.check(file, model, tokenizer)["tokens"] == tokenizer.vocab_size + 5
    # (transformers reads neither the context of a GPT-2 nor the size of a Qwen3's heads.)
    keys = layouts.to_config(model.config, {"eos_token_id": tokenizer.eot})
    c = AutoConfig.for_model(**keys)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", config=c)
    theirs.eval()
    rows = some_tokens(2, 32) % tokenizer.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(theirs(rows).logits, model(rows), atol=1e-3, rtol=0)


@pytest.mark.parametrize("to", ["hf", "gguf", "llmc"])
def test_an_lstm_has_no_form_elsewhere(tokenizer: Tokenizer, tmp_path: Path, to: str) -> None:
    path = save(model_of({"family": "lstm"}, tokenizer.vocab_size), tokenizer, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"an LSTM \(model\.family=lstm\), for which"
    ) as refused:
        exported(tmp_path, f"to={to}", f"out={tmp_path / 'out'}")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
    found, expected = (
        checkpoint.load_model(path),
        model_of({"family": "lstm"}, tokenizer.vocab_size),
    )
    for name, weight in expected.state_dict().items():  # it is read back as it was written
        assert torch.equal(found.state_dict()[name], weight)


def test_what_cannot_be_exported_or_imported_is_said_and_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    save(model_of(MODELS["llama"], tokenizer.vocab_size), tokenizer, tmp_path)
    out = exported(tmp_path, f"out={tmp_path / 'model'}")
    with pytest.raises(ConfigError, match="it already exists; give overwrite=true"):
        exported(tmp_path, f"out={out}")
    assert exported(tmp_path, f"out={out}", "overwrite=true") == out
    (out / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"mine\.txt is not on its manta-files"):
        exported(tmp_path, f"out={out}", "overwrite=true")
    with pytest.raises(ConfigError, match="it is a folder"):
        exported(tmp_path, f"out={out}", "to=gguf", "overwrite=true")
    (out / "mine.txt").unlink()
    with pytest.raises(ConfigError, match="there is no folder"):
        exported(tmp_path, f"out={tmp_path / 'no' / 'where'}")
    with pytest.raises(CheckpointError, match=r"checkpoint=typo: no checkpoint there.*run"):
        exported(tmp_path, "checkpoint=typo", f"out={tmp_path / 'x'}")

    def refused(error: type[Exception], words: str, **keys: Any) -> None:
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(out, broken)
        for name, content in keys.pop("files", {}).items():
            if content is None:
                (broken / name).unlink()
            else:
                (broken / name).write_bytes(content)
        if keys:
            config = json.loads((broken / "config.json").read_text())
            (broken / "config.json").write_text(json.dumps({**config, **keys}))
        with pytest.raises(error, match=words) as caught:
            imported(tmp_path, f"path={broken}", "name=broken")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "runs" / "broken").exists()

    refused(CheckpointError, "model_type=mamba is not one.*gpt2, llama, qwen3", model_type="mamba")
    refused(
        CheckpointError,
        "attention_bias=True.*",
        attention_bias=True,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4},
    )
    refused(CheckpointError, "hidden_act='gelu'", hidden_act="gelu")
    for key, value in (
        ("quantization_config", {"quant_method": "gptq"}),
        ("sliding_window", 8),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("partial_rotary_factor", 0.5),
        ("logits_scaling", 8.0),
        ("attention_bias", True),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}}),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ):
        refused(CheckpointError, f"Manta has no such model: {key}=", **{key: value})
    refused(CheckpointError, r"n_layer=1000000 \(there are", num_hidden_layers=10**6)
    refused(CheckpointError, "n_embd=1099511627776", hidden_size=1 << 40, head_dim=None)
    refused(CheckpointError, "n_head x head_dim=", head_dim=1 << 31)
    refused(CheckpointError, "context_length=.*at most", max_position_embeddings=10**9)
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        tensors = load_file(out / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
        save_file(tensors, tmp_path / "other.safetensors")
        data = (tmp_path / "other.safetensors").read_bytes()
        words = r"model\.norm\.weight is .*, and Manta reads F16"
        refused(CheckpointError, words, files={"model.safetensors": data})
    for value in (math.nan, math.inf):
        tensors = load_file(out / "model.safetensors")
        tensors["model.norm.weight"][3] = value
        save_file(tensors, tmp_path / "other.safetensors")
        data = (tmp_path / "other.safetensors").read_bytes()
        words = r"model\.norm\.weight has values that are NaN or infinite"
        refused(CheckpointError, words, files={"model.safetensors": data})
    refused(CheckpointError, r"no config\.json there", files={"config.json": None})
    refused(CheckpointError, "not valid JSON", files={"config.json": b"{"})
    gone: dict[str, bytes | None] = {"model.safetensors": None}
    refused(CheckpointError, "no such file; get the model's weights", files=gone)
    pickle = {"pytorch_model.bin": b"pickle"}
    refused(CheckpointError, r"pytorch_model\.bin is a pickle", files={**gone, **pickle})
    shard = {"model.safetensors.index.json": b'{"weight_map": {"a": "b-2-of-3.safetensors"}}'}
    words = r"b-2-of-3\.safetensors: no such file, but model\.safetensors\.index\.json says"
    refused(CheckpointError, words, files={**shard, **pickle})
    refused(CheckpointError, "not safetensors data", files={"model.safetensors": b"x" * 50})
    refused(DataError, r"no tokenizer\.json.*50,257", files={"tokenizer.json": None})
    tensors = load_file(out / "model.safetensors")
    lacking = {k: v for k, v in tensors.items() if "layers.1" not in k}
    lacking["model.layers.0.extra.weight"] = torch.zeros(3)
    lacking["model.norm.weight"] = torch.ones(5)
    save_file(lacking, tmp_path / "some.safetensors")
    refused(
        CheckpointError,
        r"layers\.1\.input_layernorm\.weight is missing.*layers\.0\.extra\.weight is surplus.*"
        r"model\.norm\.weight is \(5,\), not \(64,\)",
        files={"model.safetensors": (tmp_path / "some.safetensors").read_bytes()},
    )
    with pytest.raises(ConfigError, match=r"name=run: .* is there already"):
        imported(tmp_path, f"path={out}", "name=run")
    with pytest.raises(ConfigError, match="path: give the folder"):
        load(ImportConfig, ["from=hf"])
    with pytest.raises(ConfigError, match=r"^from='gguf'"):
        load(ImportConfig, ["from=gguf", "path=x"])


def test_transformers_has_no_llama_whose_heads_do_not_divide_its_width(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save(model_of({"n_head": 6, "head_dim": 8}, tokenizer.vocab_size), tokenizer, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.n_embd=64 with model\.n_head=6.*to=gguf"):
        exported(tmp_path, f"out={tmp_path / 'model'}")
    assert exported(tmp_path, "to=gguf", f"out={tmp_path / 'model.gguf'}").is_file()


def test_the_check_finds_a_wrong_weight_and_a_wrong_token(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = model_of(MODELS["llama"], tokenizer.vocab_size)
    huggingface.write(tmp_path, model, tokenizer, "card")
    huggingface.check(tmp_path, model, tokenizer, [TEXT])
    other = tokenizers.train(["something else " * 9, TEXT[:99]], tokenizer.vocab_size)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json.to_json(other))
    with pytest.raises(CheckpointError, match="as other tokens"):
        huggingface.check(tmp_path, model, tokenizer, [TEXT])
    model.norm.weight.data[3] += 0.1
    with pytest.raises(CheckpointError, match="logits of transformers' model differ"):
        huggingface.check(tmp_path, model, tokenizer, [])


def test_weights_are_trained_further_on_data_of_their_tokenizer_only(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = save(model_of(MODELS["llama"], tokenizer.vocab_size), tokenizer, tmp_path)
    check_tokenizer(path, tokenizer)
    with pytest.raises(ConfigError, match=rf"set data\.tokenizer={path}/encoding\.json"):
        check_tokenizer(path, tokenizers.train([TEXT], 300))
