"""Configs and run_job, as the tests' reader meets them: this line is what --help shows here."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manta.arguments import read
from manta.bench.settings import BenchConfig
from manta.config import Count, config, differences, from_dict, help_text, load, to_dict, to_yaml
from manta.data.inspect import InspectConfig
from manta.data.recipe import DataConfig
from manta.errors import ConfigError, DataError
from manta.evaluate.compare import CompareConfig
from manta.evaluate.inference_settings import GenerateConfig
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.surprise import SurpriseConfig
from manta.export.convert import ExportConfig, ImportConfig
from manta.job import run_job, with_default
from manta.model.presets import PRESETS
from manta.sweep.sweep import SweepConfig
from manta.train.checkpoints.listing import CheckpointsConfig
from manta.train.settings import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]
few = settings(deadline=None, max_examples=25)


def refusal(*arguments: str) -> str:
    """What `load` says against these arguments."""
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, arguments)
    return str(caught.value)


def write(folder: Path, text: str | bytes, name: str = "config.yaml") -> str:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


# --- reading -------------------------------------------------------------------------------------


def test_without_arguments_every_key_has_its_default() -> None:
    assert load(PretrainConfig) == PretrainConfig()


def test_later_arguments_win_over_earlier_ones(tmp_path: Path) -> None:
    file = write(tmp_path, "seed: 1\noptimizer: {lr: 0.5, eps: 1e-6}\n")
    other = write(tmp_path, "optimizer: {lr: 0.25}\n", "other.yaml")
    assert load(PretrainConfig, [file]).optimizer.lr == 0.5
    assert load(PretrainConfig, [file, "optimizer.lr=0.125"]).optimizer.lr == 0.125
    assert load(PretrainConfig, ["optimizer.lr=0.125", file]).optimizer.lr == 0.5
    assert load(PretrainConfig, ["seed=2", "seed=3"]).seed == 3
    both = load(PretrainConfig, [file, other])
    assert (both.seed, both.optimizer.lr, both.optimizer.eps) == (1, 0.25, 1e-6)


def test_values_have_the_types_of_their_keys(tmp_path: Path) -> None:
    c = load(
        PretrainConfig,
        ["optimizer.lr=1e-3", "seq_len=null", "name=5", "sample.prompts=[a, 'b=c', ]"],
    )
    assert (c.optimizer.lr, c.seq_len, c.name) == (1e-3, None, "5")
    assert c.sample.prompts == ("a", "b=c")
    assert load(PretrainConfig, [write(tmp_path, "")]) == PretrainConfig()


def test_keys_go_over_the_preset_whatever_their_order(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {preset: gpt2-350m, n_layer: 6}\ntokens_per_batch: 4096\n")
    for arguments in (
        [file],
        ["model.n_layer=6", "model.preset=gpt2-350m", "tokens_per_batch=4096"],
        [file, "model.n_layer=12", "model.n_layer=6"],
    ):
        c = load(PretrainConfig, arguments)
        assert c.model.n_layer == 6
        assert (c.model.n_embd, c.model.family) == (1024, "gpt2")


@config
class Inner:
    by_number: dict[Count, dict[str, int]] = dataclasses.field(
        default_factory=lambda: {8000: {"a": 1}}
    )
    """A dict in a group, of dicts, with a default."""
    n: int = 0
    """A number."""


@config
class Outer:
    named: dict[str, int] = dataclasses.field(default_factory=dict)
    """A dict, empty at first."""
    inner: Inner = Inner()


def test_a_value_that_is_a_dict_is_replaced_and_its_entries_are_set(tmp_path: Path) -> None:
    file = write(tmp_path, "named: {a: 1, b: 2}\ninner: {by_number: {8_000: {b: 2}}}\n")
    other = write(tmp_path, "named: {c: 3}\n", "other.yaml")
    for later, named in (
        ("named={c: 3}", {"c": 3}),
        ("named={}", {}),
        (other, {"c": 3}),
        ("named.c=3", {"a": 1, "b": 2, "c": 3}),
        ("named[a]=3", {"a": 3, "b": 2}),
        ("named.v1\\.5=3", {"a": 1, "b": 2, "v1.5": 3}),
    ):
        assert load(Outer, [file, later]).named == named
    for later, by_number in (
        ("inner.by_number={9000: {c: 3}}", {9000: {"c": 3}}),
        ("inner={by_number: {9000: {c: 3}}}", {9000: {"c": 3}}),
        ("inner.by_number.8000={c: 3}", {8000: {"c": 3}}),
        ("inner.by_number.8000.c=3", {8000: {"b": 2, "c": 3}}),
        ("inner.by_number[8000][b]=3", {8000: {"b": 3}}),
        ("inner.n=1", {8000: {"b": 2}}),
        ("inner={n: 1}", {8000: {"b": 2}}),
    ):
        c = load(Outer, [file, later])
        assert c.inner.by_number == by_number
        assert c.named == {"a": 1, "b": 2}
        # The file that a config becomes has such keys as text; arguments go over it all the same.
        again = write(tmp_path, to_yaml(load(Outer, [file])), "again.yaml")
        assert load(Outer, [again, later]) == c
    assert load(Outer, ["inner={n: 1}", "inner={by_number: {}}"]).inner == Inner({}, 1)


def test_a_long_value_is_a_value_and_not_a_file_name() -> None:
    prompt = "once upon a time " * 100
    assert load(PretrainConfig, [f"sample.prompts=['{prompt}']"]).sample.prompts == (prompt,)


# --- texts ---------------------------------------------------------------------------------------

TEXTS = [
    "x = 1  # set x", "12:30:45", "007", "1e3", "", "Q: What is 2+2? A:", "# Title", " both ends ",
    "'quoted'", '"quoted"', "a\nb\n", "\\n", "~", "true", "null ", "Null", "[a, b]", "{a: 1}",
    "- a", "&a", "*a", "!!int 3", "${home}", "${", "\\${a}", "\\\\${a}\\", "???", "\\???", "a=b",
    "-1_0.5E+3", "%", "\x85", "\u2028", "naïve 🐟",
    '{"zero_optimization": {"sub_group_size": 5000}}',
]  # fmt: skip
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
    classes = (
        BenchConfig, CheckpointsConfig, CompareConfig, EvaluateConfig, ExportConfig, GenerateConfig,
        ImportConfig, InspectConfig, PretrainConfig, SurpriseConfig, SweepConfig,
    )  # fmt: skip
    for cls in classes:
        for key, kind in re.findall(r"^  ([\w.]+): (.*) = ", help_text(cls), re.MULTILINE):
            yield cls, key, kind


def test_every_job_takes_texts_as_they_are() -> None:
    keys = [(cls, key) for cls, key, kind in of_jobs() if kind in ("str", "str | null")]
    assert len(keys) > 50 and (GenerateConfig, "prompt") in keys
    for cls, key in keys:
        for text in TEXTS:
            found: Any = read(cls, [f"{key}={text}"])  # not checked yet: many are no name or file
            for name in key.split("."):
                found = found[name]
            assert found == text, key


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


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "key", "meant"),
    [
        ("tokens_per_bach=1", "tokens_per_bach", "tokens_per_batch"),
        ("optimzer.lr=1", "optimzer", "optimizer"),
        ("optimizer.wieght_decay=1", "optimizer.wieght_decay", "optimizer.weight_decay"),
        ("model.n_layers=1", "model.n_layers", "model.n_layer"),
        ("lr=1", "lr", "optimizer.lr"),
        ("n_layer=1", "n_layer", "model.n_layer"),
        ("optimizer.context_length=1", "optimizer.context_length", "model.context_length"),
    ],
)
def test_an_unknown_key_names_the_nearest(argument: str, key: str, meant: str) -> None:
    assert refusal(argument) == f"{key}: unknown key; did you mean {meant}?"


def test_an_unknown_key_like_no_other_points_to_help() -> None:
    assert refusal("qqqqqq=1") == "qqqqqq: unknown key; see --help for all keys"


def test_an_unknown_preset_names_the_nearest_or_all() -> None:
    assert refusal("model.preset=gpt2-350") == (
        "model.preset=gpt2-350: unknown preset; did you mean gpt2-350m?"
    )
    for name in PRESETS:
        assert name in refusal("model.preset=zzz")


@pytest.mark.parametrize(
    ("argument", "valid"),
    [
        ("model.n_layer=abc", "integer"),
        ("model.n_layer=1.5", "integer"),
        ("model.n_layer=0", "greater than or equal to 1"),
        ("model.n_layer=null", "integer"),
        ("optimizer.lr=-1", "greater than 0"),
        ("optimizer.lr=.nan", "greater than 0"),
        ("optimizer.betas=[0.9]", "required"),
        ("dtype=fp16", "'auto', 'bf16' or 'fp32'"),
        ("zero_stage=4", "0, 1, 2 or 3"),
        ("model.tie_embeddings=3", "boolean"),
        ("sample.prompts=abc", "tuple"),
        ("data.val_fraction=1", "less than 1"),
        ("model=3", "dictionary"),
        ("optimizer=null", "dictionary"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_would_be_valid(
    argument: str, valid: str
) -> None:
    message = refusal(argument)
    assert message.startswith(argument.partition("=")[0])
    assert valid in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("named={a: x}", "named.a='x': should be a valid integer, unable to parse string"),
        ("named.a.b=1", "named.a={'b': 1}: should be a valid integer"),
        ("named=1", "named=1: should be a valid dictionary"),
        ("inner.by_number={9: {b: x}}", "inner.by_number.9.b='x': should be a valid integer"),
        ("inner.by_number={0: {b: 1}}", "inner.by_number: its key 0 should be greater than or eq"),
        ("inner.by_number={a: {b: 1}}", "inner.by_number: its key a should be a valid integer"),
        ("inner.by_numbr=1", "inner.by_numbr: unknown key; did you mean inner.by_number?"),
        ("by_number={9: {b: 1}}", "by_number: unknown key; did you mean inner.by_number?"),
    ],
)
def test_a_wrong_entry_of_a_dict_is_named_with_its_own_key(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Outer, [argument])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_no_number_can_be_given_as_true() -> None:
    kinds = re.findall(r"^  ([\w.]+): (int|float)\b", help_text(PretrainConfig), re.MULTILINE)
    assert len(kinds) > 30
    for key, _ in kinds:
        said = refusal(f"{key}=true")
        for other in ("'auto'", "a valid tuple"):
            said = said.removesuffix(f" or should be {other}")
        assert said == f"{key}=True: should be a number, not true or false"


def test_several_mistakes_are_all_listed() -> None:
    message = refusal("lr=1", "model.n_layer=true", "dtype=fp16", "model.preset=zzz", "seed=-1")
    head, *lines = message.splitlines()
    assert head == "5 problems in the config:"
    assert sorted(re.match(r"  ([\w.]+)", line)[1] for line in lines) == sorted(  # type: ignore[index]
        ["lr", "model.n_layer", "dtype", "model.preset", "seed"]
    )


def test_several_problems_across_keys_are_all_listed() -> None:
    message = refusal("seq_len=512", "model.n_head=3", "schedule.kind=wsd", "schedule.warmup=0.9")
    assert message.startswith("3 problems in the config:\n")
    for part in ("seq_len=512", "model.n_embd=256", "schedule.warmup + decay"):
        assert f"\n  {part}" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        assert refusal(str(path)).startswith(f"'{path}': no such config file")


@pytest.mark.parametrize(
    "content",
    ["a: [1", "a: b: c", "seed: 1\nseed: 2\n", "- seed", "3", "name: ${", b"name: \xff\n"],
)
def test_a_broken_file_is_named_in_one_line(content: str | bytes, tmp_path: Path) -> None:
    file = write(tmp_path, content)
    message = refusal(file)
    assert file in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "argument",
    [
        "=3",
        "seed='",
        "seed=[1",
        "seed=${",
        "seed=${missing}",
        "name=${",
        "[=1",
        "a\\=b",
        f"seed={'9' * 5000}",
    ],
)
def test_a_broken_argument_is_refused_in_one_line(argument: str) -> None:
    assert "\n" not in refusal(argument)


def test_a_list_and_keys_under_one_key_are_refused() -> None:
    assert "model" in refusal("model=[1]", "model.n_layer=2")


# --- problems that span keys ---------------------------------------------------------------------


@few
@given(
    st.integers(1, 20_000), st.integers(1, 256), st.integers(1, 5), st.none() | st.integers(1, 9)
)
@example(100, 256, 1, None)  # less than one sequence: only a larger batch divides
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(
    tokens: int, seq_len: int, workers: int, micro: int | None
) -> None:
    unit = seq_len * workers * (micro or 1)
    keys = [f"seq_len={seq_len}", f"num_workers={workers}"]
    keys += [f"micro_batch_size={micro}"] if micro else []
    if tokens % unit == 0:
        c = load(PretrainConfig, [*keys, f"tokens_per_batch={tokens}"])
        assert c.grad_accum_steps(0) * c.micro_batch * c.workers * c.sequence_length == tokens
        return
    message = refusal(*keys, f"tokens_per_batch={tokens}")
    assert message.startswith(f"tokens_per_batch={tokens} does not divide by ")
    named = [int(n) for n in message.rpartition("nearest that do: ")[2].split(" and ")]
    assert named == [n for n in (tokens - tokens % unit, tokens - tokens % unit + unit) if n]
    for n in named:
        c = load(PretrainConfig, [*keys, f"tokens_per_batch={n}"])
        assert c.grad_accum_steps(0) * c.micro_batch * c.workers * c.sequence_length == n


def test_a_sequence_beyond_the_context_is_refused_with_both_remedies() -> None:
    message = refusal("seq_len=512")
    assert "at most 256" in message
    assert "model.context_length=512" in message
    assert load(PretrainConfig, ["seq_len=512", "model.context_length=512"]).sequence_length == 512


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/..", "a/../b", ".", "./a", "/a", "a/", "a//b", ".a", "", "a b", "a\n"]
)
def test_a_run_cannot_leave_its_folder_by_its_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^name="):
        from_dict(PretrainConfig, {"name": name})


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../x", "/a", "", "a b"])
def test_a_dataset_cannot_leave_its_folder_by_its_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^name="):
        from_dict(DataConfig, {"name": name})


@pytest.mark.parametrize("name", ["a", "a/b-c_d.1", "x..y", "-a", "über"])
def test_ordinary_names_are_allowed(name: str) -> None:
    assert from_dict(PretrainConfig, {"name": name}).name == name


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
                "preset": st.sampled_from(sorted(PRESETS)),
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


# --- help ----------------------------------------------------------------------------------------


def documented(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a config class, inherited ones and groups' too, with its docstring, as the
    source has them."""
    docstrings: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                is_docstring = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                docstrings[field.target.id] = str(after.value.value) if is_docstring else ""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from documented(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, docstrings[field.name]


@pytest.mark.parametrize("cls", [PretrainConfig, SweepConfig])
def test_help_has_every_key_with_its_docstring(cls: type) -> None:
    paragraphs = re.split(r"^  (?=[\w.]+: )", help_text(cls), flags=re.MULTILINE)[1:]
    shown = {p.partition(":")[0]: " ".join(p.split()) for p in paragraphs}
    keys = dict(documented(cls))
    assert shown.keys() == keys.keys()
    assert [key for key, text in keys.items() if not text] == []
    assert [key for key, text in keys.items() if " ".join(text.split()) not in shown[key]] == []


def test_help_shows_what_is_in_a_dict() -> None:
    assert help_text(Outer).splitlines()[::2] == [
        "  named: {str: int} = {}",
        '  inner.by_number: {int: {str: int}} = {"8000": {"a": 1}}',
        "  inner.n: int = 0",
    ]


def test_help_has_a_keys_type_and_default_on_one_line() -> None:
    form = re.compile(r"  [\w.]+: \S.* = \S.*|      \S.*")
    lines = help_text(PretrainConfig).splitlines()
    assert [line for line in lines if not form.fullmatch(line)] == []


# --- run_job -------------------------------------------------------------------------------------


def run(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[PretrainConfig], Any], *arguments: str
) -> int:
    """The exit code of a job with this main and these arguments."""
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    main.__module__ = __name__
    with pytest.raises(SystemExit) as caught:
        run_job(main, PretrainConfig)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_default_config_is_for_arguments_that_name_no_other(tmp_path: Path) -> None:
    default, other = tmp_path / "default.yaml", tmp_path / "other.yaml"
    default.write_text("seed: 5\nmodel: {n_layer: 3}\n")
    other.write_text("log_every: 7\n")

    def loaded(*arguments: str) -> tuple[int, int, int]:
        c = load(PretrainConfig, with_default(list(arguments), default))
        return c.seed, c.model.n_layer, c.log_every

    assert loaded() == (5, 3, 10)
    assert loaded("seed=6", "name=mine") == (6, 3, 10)
    assert loaded(str(other)) == (1337, 4, 7)
    assert loaded("model.preset=gpt2-124m") == (1337, 12, 10)
    assert loaded("seed=6", "model.depth=2") == (6, 2, 10)
    assert with_default(["seed=6"], None) == ["seed=6"]


def never(config: PretrainConfig) -> None:
    pytest.fail("the job ran")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["lr=1", "--help"]])
def test_help_exits_0_and_runs_nothing(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, never, *arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Configs and run_job, as the tests' reader meets them")
    assert help_text(PretrainConfig) in out
    assert err == ""


def test_dry_run_exits_0_runs_nothing_and_prints_a_config_that_loads_equal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["seed=7", "model.preset=gpt2-124m", "tokens_per_batch=4096", "total_tokens=9000"]
    assert run(monkeypatch, never, *arguments, "--dry-run") == 0
    out, err = capsys.readouterr()
    assert load(PretrainConfig, [write(tmp_path, out)]) == load(PretrainConfig, arguments)
    assert "# steps: 3\n" in out
    assert err == ""


def test_a_problem_exits_2_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: PretrainConfig) -> None:
        raise DataError("a.txt: no such file")

    assert run(monkeypatch, main) == 2
    assert capsys.readouterr() == ("", "error: a.txt: no such file\n")
    assert run(monkeypatch, never, "lr=1") == 2
    assert capsys.readouterr().err == "error: lr: unknown key; did you mean optimizer.lr?\n"
    assert run(monkeypatch, never, "lr=1", "--dry-run") == 2


def test_other_ends_have_their_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def defect(config: PretrainConfig) -> None:
        raise ZeroDivisionError("of mine")

    def interrupted(config: PretrainConfig) -> None:
        raise KeyboardInterrupt

    seen: list[PretrainConfig] = []
    assert run(monkeypatch, seen.append, "seed=7") == 0
    assert [c.seed for c in seen] == [7]
    assert run(monkeypatch, defect) == 1
    assert "Traceback" in capsys.readouterr().err
    assert run(monkeypatch, interrupted) == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_a_job_started_by_a_person_ends_with_one_line_on_stderr(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), "optimzer.lr=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: optimzer: unknown key; did you mean optimizer?\n"
