"""Texts in configs, and configs as YAML: a config is read back as it was written."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.configs import OF_JOBS, Inner, Outer, never, write
from helpers.texts import TEXTS
from manta.arguments import read
from manta.config import config, differences, from_dict, help_text, load, to_dict, to_yaml
from manta.errors import ConfigError
from manta.evaluate.inference_settings import GenerateConfig
from manta.job import run_job
from manta.model.presets import PRESETS
from manta.terminal import message, visible
from manta.train.settings import PretrainConfig

few = settings(deadline=None, max_examples=25)


# --- texts ---------------------------------------------------------------------------------------


texts = st.text() | st.text(alphabet="\\${}?:#'\"[] =\na") | st.sampled_from(TEXTS)


@config
class Texts:
    text: str = "default"
    """A text."""
    maybe: str | None = "default"
    """A text, or none."""
    from_: str = "default"
    """A text under a word of Python's."""
    by_name: dict[str, str] = dataclasses.field(default_factory=dict)
    """Texts in a dict."""
    several: tuple[str, ...] = ()
    """Texts in a list."""
    one_or_several: str | tuple[str, ...] | None = None
    """What may be of another type too."""


@config
class Page:
    title: str = "default"
    """Another text."""
    texts: Texts = Texts()


@few
@given(texts)
def test_a_text_comes_back_as_it_was_given_whatever_is_in_it(text: str) -> None:
    keys = ("title", "texts.text", "texts[maybe]", "texts.from", "texts.by_name.a", "[title]")
    for key in keys:
        c = load(Page, [f"{key}=before", f"{key}={text}"])
        found = {"a": c.title, **to_dict(c.texts), **c.texts.by_name}
        names = re.findall(r"\w+", key)
        name = {"title": "a", "from": "from_"}.get(names[-1], names[-1])
        assert found[name] == (None if (name, text) == ("maybe", "null") else text), key


def test_null_is_no_text_where_there_may_be_none_and_a_word_where_there_may_not() -> None:
    c = load(Page, ["texts.maybe=null", "texts.text=null"])
    assert (c.texts.maybe, c.texts.text) == (None, "null")
    assert load(Page, ["texts.maybe=null "]).texts.maybe == "null "


def test_keys_of_other_types_and_files_are_yaml(tmp_path: Path) -> None:
    c = load(Texts, ["several=[a, 'b: c', '7', ]  # two", "one_or_several=[a, b]"])
    assert (c.several, c.one_or_several) == (("a", "b: c", "7"), ("a", "b"))
    assert load(Texts, ["one_or_several='a'"]).one_or_several == "a"
    assert load(Texts, ["one_or_several="]).one_or_several is None
    file = write(tmp_path, "text: 'a'  # not b\nmaybe: 5\nfrom: x ${text}\n")
    c = load(Texts, [file])
    assert (c.text, c.maybe, c.from_) == ("a", "5", "x a")
    assert load(Texts, [file, "text=#${c}"]).from_ == "x #${c}"
    assert load(Texts, ["text=b", file]).text == "a"


@few
@given(texts, st.lists(texts, max_size=2))
def test_texts_come_back_from_the_file_that_a_config_becomes(
    tmp_path_factory: pytest.TempPathFactory, text: str, several: list[str]
) -> None:
    c = from_dict(Page, {"title": text, "texts": {"by_name": {"a": text}, "several": several}})
    file = write(tmp_path_factory.mktemp("texts"), to_yaml(c))
    assert load(Page, [file]) == c
    assert load(Page, [file, file, "texts.maybe=x"]).texts.several == tuple(several)


def of_jobs() -> Iterator[tuple[type, str, str]]:
    """Every key of a job's config, with its type as --help shows it."""
    for cls in OF_JOBS:
        for key, kind in re.findall(r"^  ([\w.]+): (.*) = ", help_text(cls), re.MULTILINE):
            yield cls, key, kind


def test_every_job_takes_texts_as_they_are() -> None:
    keys = [item for item in of_jobs() if item[2] in ("str", "str | null")]
    assert len(keys) > 50 and (GenerateConfig, "prompt", "str") in keys and len(TEXTS) >= 65
    for index, (cls, key, kind) in enumerate(keys):
        for text in TEXTS[index % 9 :: 9]:
            found: Any = read(cls, [f"{key}={text}"])  # not checked yet: many are no name or file
            for name in key.split("."):
                found = found[name]
            assert found == (None if (text, kind) == ("null", "str | null") else text), key


@pytest.mark.parametrize("text", TEXTS)
def test_a_dry_run_prints_a_text_so_that_it_reads_back_the_same(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [f"prompt={text}", "temperature=0.5"]
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments, "--dry-run"])
    with pytest.raises(SystemExit):
        run_job(never, GenerateConfig)  # type: ignore[arg-type]
    again = load(GenerateConfig, [write(tmp_path, capsys.readouterr().out)])
    assert again == load(GenerateConfig, arguments)
    assert again.prompt == text


# --- keys that another key overrides --------------------------------------------------------------


FILE = """
tokens_per_batch: 2048
model: {tie_embeddings: false, qk_norm: true, rope_theta: 100000.0}
init: {kind: identity, previous_tokens: 1, induction_heads: [1], bigram_steps: 3}
optimizer: {kind: muon, lr: 0.005, head_lr: 0.001, muon_rounds: 3, muon_lr: 0.02}
schedule: {kind: wsd, decay_shape: linear}
micro_batch_size: auto
memory_per_worker: 2.5
"""


@pytest.mark.parametrize(
    ("arguments", "dropped"),
    [
        (["optimizer.kind=adamw"], ["optimizer.muon_lr=0.02", "optimizer.muon_rounds=3"]),
        (["optimizer={kind: adamw}"], ["optimizer.muon_lr=0.02", "optimizer.muon_rounds=3"]),
        (["schedule.kind=cosine"], ["schedule.decay_shape=linear"]),
        (["model.tie_embeddings=true"], ["optimizer.head_lr=0.001", "init.bigram_steps=3"]),
        (["model.qk_norm=false"], ["init.previous_tokens=1", "init.induction_heads=[1]"]),
        (["init.kind=gpt2"], ["init.induction_heads=[1]"]),
        (["micro_batch_size=4"], ["memory_per_worker=2.5"]),
        (["seed=3", "optimizer.kind=muon"], []),
    ],
    ids=str,
)
def test_a_key_of_a_file_that_an_argument_overrides_is_dropped_with_a_line(
    arguments: list[str], dropped: list[str], tmp_path: Path
) -> None:
    file, said = write(tmp_path, FILE), list[str]()
    c = load(PretrainConfig, [file, *arguments], said.append)
    assert [text.partition(f" of {file} is not used: it is for ")[0] for text in said] == dropped
    assert load(PretrainConfig, [write(tmp_path, to_yaml(c))]) == c
    # A run's own config.yaml has every key, and those that are not set need no line.
    whole = to_yaml(load(PretrainConfig, [write(tmp_path, FILE)]))
    assert load(PretrainConfig, [write(tmp_path, whole), *arguments], said.append) == c
    assert len(said) == 2 * len(dropped)


def test_a_key_that_a_person_gives_is_not_dropped(tmp_path: Path) -> None:
    file = write(tmp_path, FILE)
    for arguments in (
        [file, "optimizer.muon_rounds=2", "optimizer.muon_lr=null", "optimizer.kind=adamw"],
        [write(tmp_path, FILE.replace("kind: muon", "kind: adamw"))],
    ):
        with pytest.raises(ConfigError, match=r"muon_rounds=. is for kind=muon: omit it"):
            load(PretrainConfig, arguments)


def test_what_is_not_utf8_is_said_with_its_key(tmp_path: Path) -> None:
    for text in ("prompt=\udcff", "checkpoint=a\udcffb", "home=\ud800"):
        key, _, value = text.partition("=")
        with pytest.raises(ConfigError) as caught:
            load(GenerateConfig, [text])
        assert message(caught.value).startswith(f"{key}={visible(value)}: not a text in UTF-8")
    with pytest.raises(ConfigError, match=r"cannot be read: .*invalid Unicode"):
        load(GenerateConfig, [write(tmp_path, 'prompt: "\\ud800"')])
    with pytest.raises(ConfigError, match=r"by_name=.*not a text"):
        from_dict(Texts, {"by_name": {"\udcff": "a"}})
    with pytest.raises(ConfigError) as caught:
        load(GenerateConfig, ["\udcff.yaml"])
    assert message(caught.value).startswith(r"'\udcff.yaml': no such config file")


def test_many_problems_of_a_config_have_a_limit() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Texts, {f"key{i}": 1 for i in range(2_000)})
    lines = str(caught.value).split("\n")
    assert lines[0] == "2,000 problems in the config:" and len(lines) == 22
    assert lines[-1] == "  and 1,980 more"


# --- the way back --------------------------------------------------------------------------------


FRACTIONS = st.floats(0, 1, allow_subnormal=False)
TREES = st.fixed_dictionaries(
    {"tokens_per_batch": st.integers(1, 4).map(lambda n: n * 12 * 2048)},
    optional={
        "seed": st.integers(0, 2**40),
        "num_workers": st.integers(1, 4),
        "zero_stage": st.integers(0, 3),
        "dtype": st.sampled_from(["auto", "bf16", "fp32"]),
        "name": st.sampled_from(["a", "b/c"]),
        "home": st.none() | st.text(max_size=5),
        "model": st.fixed_dictionaries(
            {},
            optional={
                # (No batch that is drawn here divides by the 50 tokens of char-rnn.)
                "preset": st.sampled_from(sorted(set(PRESETS) - {"char-rnn"})),
                "n_layer": st.integers(1, 5),
                "tie_embeddings": st.booleans(),
                "dropout": FRACTIONS,
            },
        ),
        "optimizer": st.fixed_dictionaries(
            {},
            optional={
                "lr": st.floats(1e-9, 1e9),
                "betas": st.lists(FRACTIONS, min_size=2, max_size=2),
            },
        ),
        "sample": st.fixed_dictionaries(
            {},
            optional={
                "prompts": st.lists(st.text(max_size=8), max_size=3),
                "top_k": st.none() | st.integers(1, 9),
            },
        ),
        "data": st.fixed_dictionaries(
            {}, optional={"document_bytes": st.none() | st.integers(0, 9), "name": st.just("d")}
        ),
    },
)


@few
@given(TREES)
def test_a_config_comes_back_equal_from_its_values_and_its_yaml(tree: dict[str, Any]) -> None:
    c = from_dict(PretrainConfig, tree)
    assert from_dict(PretrainConfig, to_dict(c)) == c
    assert from_dict(PretrainConfig, yaml.safe_load(to_yaml(c))) == c


@few
@given(TREES)
@example({"tokens_per_batch": 4096, "model": {"preset": "gpt2-124m", "n_layer": 4}})
def test_differences_come_back_equal(tree: dict[str, Any]) -> None:
    c = from_dict(PretrainConfig, tree)
    assert from_dict(PretrainConfig, differences(c)) == c


def test_differences_hold_only_what_differs() -> None:
    assert differences(PretrainConfig()) == {}
    c = load(PretrainConfig, ["optimizer.lr=0.5", "optimizer.eps=1e-8", "seed=1337"])
    assert differences(c) == {"optimizer": {"lr": 0.5}}


@few
@given(
    st.dictionaries(st.sampled_from("ab"), st.integers()),
    st.dictionaries(
        st.sampled_from([8000, 9000]), st.dictionaries(st.sampled_from("ab"), st.integers(0, 2))
    ),
)
@example({}, {})
@example({}, {8000: {"a": 1}})
@example({}, {8000: {"a": 1, "b": 2}})
def test_differences_hold_the_whole_of_a_dict_that_differs(
    named: dict[str, int], by_number: dict[int, dict[str, int]]
) -> None:
    c = Outer(named, Inner(by_number))
    tree = differences(c)
    assert ("named" in tree, "inner" in tree) == (c.named != {}, c.inner != Inner())
    assert from_dict(Outer, tree) == from_dict(Outer, to_dict(c)) == c
    assert from_dict(Outer, yaml.safe_load(to_yaml(c))) == c
