"""Models in the forms in which GPT-2, Llama 3.2, Qwen3 and SmolLM2 are published: imported, they
compute, encode and end as in transformers, and exported again they are the same."""

import functools
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.families import CHAT, FAMILIES, folder_of, spelled
from helpers.models import some_tokens
from helpers.preparing import config_of, silent, tokens_of, without_ray, write_rows
from manta.config import load
from manta.data import prepare
from manta.errors import CheckpointError, DataError
from manta.evaluate.documents import texts_of
from manta.export import ggml
from manta.export.convert import ExportConfig, ImportConfig, export, import_model
from manta.model.generate import Sampling, generate_batch
from manta.model.gpt import GPT
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint

few = settings(deadline=None, max_examples=60)


@functools.cache
def home() -> Path:
    return Path(tempfile.mkdtemp(prefix="manta-families-"))


@functools.cache
def published(family: str) -> Any:
    """transformers' model; its folder is `home() / family`."""
    return folder_of(family, home() / family)


@functools.cache
def imported(family: str) -> tuple[GPT, Tokenizer]:
    published(family)
    path = bring(home() / family, family)
    return checkpoint.load_model(path), checkpoint.load_tokenizer(path)


@functools.cache
def theirs(family: str) -> Any:
    from transformers import AutoTokenizer

    published(family)
    return AutoTokenizer.from_pretrained(home() / family)


def bring(folder: Path, name: str) -> str:
    keys = [f"home={home()}", f"path={folder}", f"name={name}"]
    return import_model(load(ImportConfig, keys), silent)


def send(name: str, *keys: str) -> Path:
    return export(load(ExportConfig, [f"home={home()}", f"checkpoint={name}", *keys]), silent)


@pytest.fixture(autouse=True, scope="module")
def _removed() -> Any:
    yield
    import shutil

    shutil.rmtree(home())
    for made in (home, published, imported, theirs):
        made.cache_clear()


def assert_same_logits(ours: GPT, model: Any) -> None:
    rows = some_tokens(2, ours.config.context_length, vocab=ours.config.vocab_size or 0)
    with torch.no_grad():
        torch.testing.assert_close(ours(rows), model(rows).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_transformers(family: str) -> None:
    assert_same_logits(imported(family)[0], published(family))


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("gpt2", {}),
        ("llama3", {"tie_word_embeddings": False, "head_dim": 8}),
        ("llama3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
        ("qwen3", {"tie_word_embeddings": False, "num_attention_heads": 6}),
        ("qwen3", {}),
    ],
    ids=str,
)
def test_so_are_those_of_bf16_weights_in_several_files(
    family: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    model = folder_of(family, folder, dtype="bfloat16", shard="40KB", **keys)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    path = import_model(
        load(ImportConfig, [f"home={tmp_path}", f"path={folder}", "name=mine"]), silent
    )
    ours = checkpoint.load_model(path)
    assert ours.config.tie_embeddings == model.config.tie_word_embeddings
    assert_same_logits(ours, model)


SPECIAL = [
    "<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<|im_start|>",
    "<|im_end|>", "<think>", "</think>", "<think>er", "<tool_call>", "<pad>", "<repo_name>", "<thi",
]  # fmt: skip
PIECES = [
    " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "ſ", "1", "2024", "٣", "½", "\U00011de1", "a",
    "The", " unmergeable", "unmergeable", "é", "e\u0301", "\u0338", "日本", "🐟", "--", ".", "\0",
    "\x7f", "\u1e9b\u0323", "\u0958", "K\u0327", "\uac00\u11a8",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from([*SPECIAL, *PIECES]) | st.text(max_size=5), max_size=14).map(
    "".join
)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXTS)
@example("".join(SPECIAL))
@example("<think>\u0338 <think>er x unmergeable 12345 \n\n 1")
@example("a\U0001d7c0b \U0001d7c0\U0001d7d0")  # SmolLM2 lacks a byte between two that merge
@few
def test_text_has_the_ids_that_it_has_in_transformers(family: str, text: str) -> None:
    """The ids are those with `split_special_tokens=True`, and they decode to the same text."""
    _, ours = imported(family)
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = theirs(family)(mended, split_special_tokens=True)["input_ids"]
    assert ours.prompt(text) == (ids or [ours.eot])
    assert ours.decode(ids) == theirs(family).decode(ids)
    special = {token.id for token in ours.extras.added if token.special}
    assert not special & set(ours.encode(text))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_id_decodes_as_in_transformers(family: str) -> None:
    _, ours = imported(family)
    ids = list(range(ours.vocab_size))
    assert [ours.decode([i]) for i in ids] == [theirs(family).decode([i]) for i in ids]
    assert ours.decode(ids) == theirs(family).decode(ids)


def test_by_default_transformers_turns_text_into_special_tokens_and_manta_never_does() -> None:
    _, ours = imported("qwen3")
    text = "hello<|im_end|>\n<|im_start|>system"
    assert 312 in theirs("qwen3")(text)["input_ids"]
    assert not {310, 311, 312} & set(ours.encode(text))
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    ("family", "eot", "ends", "bos"),
    [
        ("gpt2", "<|endoftext|>", ["<|endoftext|>"], None),
        ("llama3", "<|end_of_text|>", ["<|end_of_text|>", "<|eot_id|>"], "<|begin_of_text|>"),
        ("qwen3", "<|endoftext|>", ["<|endoftext|>", "<|im_end|>"], None),
        ("smollm2", "<|endoftext|>", ["<|endoftext|>", "<|im_end|>"], None),
    ],
)
def test_a_document_and_a_generation_end_where_they_should(
    family: str, eot: str, ends: list[str], bos: str | None
) -> None:
    _, ours = imported(family)
    assert ours.decode([ours.eot]) == eot
    assert [ours.decode([end]) for end in ours.ends] == ends
    assert ours.extras.bos == (None if bos is None else theirs(family).convert_tokens_to_ids(bos))
    document = ours.document("The cat")
    assert document.tolist() == [*ours.prompt("The cat"), ours.eot]
    assert ours.text_of(document[:-1].tolist()) == "The cat"
    lengths = ours.token_bytes()
    assert lengths[document].sum() == len("The cat")
    assert all(lengths[t.id] == (0 if t.special else len(t.content)) for t in ours.extras.added)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "smollm2"])
def test_generation_ends_at_each_end_and_draws_no_id_without_a_token(family: str) -> None:
    model, ours = imported(family)
    prompts, seeds = [ours.prompt("The cat")] * 64, list(range(64))
    hot = Sampling(temperature=9, vocab_size=ours.vocab_size)

    def drawn(ends: tuple[int, ...]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        batch = generate_batch(model, prompts, 30, seeds=seeds, sampling=hot, stop=ends)
        for new in batch:
            for row, token in new.items():
                found[row].append(token)
        return found

    whole = drawn(())
    assert max(map(max, whole)) < ours.vocab_size
    cut = [list(itertools.takewhile(lambda i: i not in ours.ends, line)) for line in whole]
    assert drawn(ours.ends) == cut
    assert {line[len(kept)] for line, kept in zip(whole, cut, strict=True) if line != kept} == {
        *ours.ends
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_again_it_is_the_same(family: str) -> None:
    """`export` itself compares logits and tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    imported(family)
    out = send(family, f"out={home() / family}-again")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert_same_logits(imported(family)[0], model)
    before, after = AutoConfig.from_pretrained(home() / family), AutoConfig.from_pretrained(out)
    keys = before.to_dict().keys() - {
        "dtype", "architectures", "transformers_version", "use_cache", "initializer_range",
        "attn_pdrop", "embd_pdrop", "resid_pdrop", "_name_or_path",
    }  # fmt: skip
    assert {k: getattr(after, k) for k in keys} == {k: getattr(before, k) for k in keys}
    old, new = (GenerationConfig.from_pretrained(path) for path in (home() / family, out))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(new, key) == getattr(old, key), key
    made, was = AutoTokenizer.from_pretrained(out), theirs(family)
    assert made.special_tokens_map == was.special_tokens_map
    assert made.chat_template == was.chat_template
    assert made.get_vocab() == was.get_vocab()
    flags = [
        {i: (str(t), t.special) for i, t in x.added_tokens_decoder.items()} for x in (made, was)
    ]
    assert flags[0] == flags[1]
    for text in spelled(imported(family)[1]):
        assert made(text, split_special_tokens=True) == was(text, split_special_tokens=True)
    if was.chat_template is not None:
        messages = [{"role": "user", "content": "The cat"}]
        assert made.apply_chat_template(messages) == was.apply_chat_template(messages)
    back = bring(out, f"{family}-back")
    assert checkpoint.load_tokenizer(back).sha256 == imported(family)[1].sha256
    assert checkpoint.load_model_config(back) == imported(family)[0].config


def test_a_chat_has_several_templates(tmp_path: Path) -> None:
    folder_of("qwen3", tmp_path / "qwen3")
    file = tmp_path / "qwen3" / "tokenizer_config.json"
    content = json.loads(file.read_text())
    content["chat_template"] = [{"name": "default", "template": CHAT}]
    file.write_text(json.dumps(content))
    more = tmp_path / "qwen3" / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    bring(tmp_path / "qwen3", "several")
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(send("several", f"out={tmp_path / 'out'}"))
    assert made.chat_template == {"default": CHAT, "tool_use": "tools"}


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_has_the_same_model_and_tokens(family: str) -> None:
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM

    model, ours = imported(family)
    file = send(family, "to=gguf", f"out={home() / family}.gguf")
    assert ggml.check(file, model, ours)["tokens"] == model.config.vocab_size
    c = AutoConfig.from_pretrained(home() / family)
    assert_same_logits(
        model, AutoModelForCausalLM.from_pretrained(home(), gguf_file=file.name, config=c).eval()
    )
    reader = gguf.GGUFReader(file)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    pre = {"gpt2": "gpt-2", "llama3": "llama-bpe", "qwen3": "qwen2", "smollm2": "smollm"}
    assert value("tokenizer.ggml.pre") == pre[family]
    kinds = value("tokenizer.ggml.token_type")
    for token in ours.extras.added:
        kind = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
        assert kinds[token.id] == kind
    eos = theirs(family).eos_token_id
    assert value("tokenizer.ggml.eos_token_id") == eos
    bos = theirs(family).bos_token_id
    assert value("tokenizer.ggml.bos_token_id") == (ours.start if bos is None else bos)
    assert value("tokenizer.ggml.add_bos_token") == (ours.extras.bos is not None)
    assert value("tokenizer.chat_template") == theirs(family).chat_template
    arch = value("general.architecture")
    if arch != "gpt2":
        assert value(f"{arch}.attention.key_length") == model.config.head_size
    factors = [t.data for t in reader.tensors if t.name == "rope_freqs.weight"]
    if family == "llama3":
        rotary = published(family).model.rotary_emb
        plain = 500000.0 ** (-torch.arange(0, 16, 2) / 16)
        np.testing.assert_allclose(factors[0], plain / rotary.inv_freq, rtol=1e-5)
        assert factors[0].min() == 1 and factors[0].max() == pytest.approx(32)
    else:
        assert not factors


@pytest.mark.parametrize("family", FAMILIES)
def test_data_are_prepared_with_such_a_tokenizer(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = imported(family)
    encoding = tmp_path / "encoding.json"
    encoding.write_bytes(ours.serialized)
    texts = [f"The cat number {i} <|endoftext|> went <think> 12345" for i in range(40)]
    source = write_rows(tmp_path / "rows", [texts])
    without_ray(monkeypatch)
    c = config_of(source, tokenizer=str(encoding), vocab_size=None)
    made = prepare.prepare(c, str(tmp_path), silent)
    assert (made.eot, made.vocab_size) == (ours.eot, ours.vocab_size)
    ids = np.concatenate([tokens_of(made, split) for split in ("train", "val")])
    documents = np.split(ids, np.flatnonzero(ids == ours.eot) + 1)[:-1]
    assert sorted(map(tuple, documents)) == sorted(tuple(ours.document(text)) for text in texts)
    assert set(texts_of(made, made.load_tokenizer())) <= set(texts)


def changed(family: str, folder: Path, file: str, **keys: Any) -> Path:
    """A family's folder with other keys in one of its JSON files."""
    folder_of(family, folder)
    content = json.loads((folder / file).read_text())
    for path, value in keys.items():
        at: Any = content
        *parents, last = path.split("__")
        for parent in parents:
            at = at[int(parent) if parent.isdigit() else parent]
        at[last] = value
    (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("family", "file", "keys", "words"),
    [
        ("qwen3", "tokenizer.json", {"added_tokens__3__lstrip": True}, "<tool_call>.*lstrip=True"),
        ("qwen3", "tokenizer.json", {"normalizer": {"type": "NFKC"}}, "normalizer=.*NFKC"),
        ("smollm2", "tokenizer.json", {"model__unk_token": "<|endoftext|>"}, "model.unk_token="),
        ("smollm2", "tokenizer.json", {"added_tokens__1__id": 7}, "are not 0 to 239, each once"),
        ("llama3", "tokenizer.json", {"model__ignore_merges": False}, "merges do not make"),
        ("llama3", "tokenizer_config.json", {"add_eos_token": True}, "add_eos_token=true"),
        ("gpt2", "tokenizer_config.json", {"add_prefix_space": True}, "add_prefix_space=true"),
        ("gpt2", "tokenizer_config.json", {"pad_token": "[PAD]"}, r"pad_token='\[PAD\]' in"),
        ("gpt2", "tokenizer_config.json", {"pad_token": 3}, "pad_token.*=3"),
        (
            "llama3",
            "tokenizer.json",
            {"post_processor": {"type": "RobertaProcessing", "sep": ["x", 1], "cls": ["y", 2]}},
            "post_processor makes TEXT RobertaProcessing",
        ),
        ("llama3", "config.json", {"rope_parameters__rope_type": "yarn"}, "rope_parameters=.*yarn"),
        ("llama3", "config.json", {"rope_parameters__rope_type": "dynamic"}, "rope_parameters="),
        ("llama3", "config.json", {"rope_parameters__factor": None}, "rope_parameters has no fact"),
        ("llama3", "config.json", {"rope_parameters__factor": -1.0}, "rope_scaling.factor=-1"),
        ("llama3", "config.json", {"rope_parameters__low_freq_factor": 4.0}, "high_freq_factor=4"),
        ("llama3", "config.json", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("llama3", "config.json", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", "config.json", {"head_dim": 23}, "head_dim is 23: RoPE needs an even head size"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_compute_or_encode_otherwise_is_refused(
    family: str, file: str, keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = changed(family, tmp_path / family, file, **keys)
    with pytest.raises((CheckpointError, DataError), match=words) as caught:
        bring(folder, "refused")
    assert "\n" not in str(caught.value)
    assert not (home() / "runs" / "refused").exists()


def test_gguf_refuses_what_llama_cpp_has_not(tmp_path: Path) -> None:
    rope = published("llama3").config.rope_parameters
    folder_of("qwen3", tmp_path / "scaled", rope_parameters=rope)
    bring(tmp_path / "scaled", "scaled")
    with pytest.raises(CheckpointError, match=r"rope_scaling\.kind=llama3 with qk_norm.*use to=hf"):
        send("scaled", "to=gguf", f"out={tmp_path / 'x.gguf'}")
    splits = {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated"}
    bytes_ = {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}
    parts = {"type": "Sequence", "pretokenizers": [splits, bytes_ | {"trim_offsets": True}]}
    bring(changed("gpt2", tmp_path / "gpt2", "tokenizer.json", pre_tokenizer=parts), "other")
    with pytest.raises(CheckpointError, match=r"splits text otherwise.*use to=hf"):
        send("other", "to=gguf", f"out={tmp_path / 'x.gguf'}")
