"""Configs from files and arguments: what they become, what is refused, and the messages."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.configs import Inner, Outer, refusal, write
from manta.config import from_dict, help_text, load, to_yaml
from manta.data.recipe import DataConfig
from manta.errors import ConfigError
from manta.model.presets import PRESETS
from manta.train.settings import PretrainConfig

few = settings(deadline=None, max_examples=25)


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
        # A written config has such keys as text; arguments override them all the same.
        again = write(tmp_path, to_yaml(load(Outer, [file])), "again.yaml")
        assert load(Outer, [again, later]) == c
    assert load(Outer, ["inner={n: 1}", "inner={by_number: {}}"]).inner == Inner({}, 1)


def test_a_long_value_is_a_value_and_not_a_file_name() -> None:
    prompt = "once upon a time " * 100
    assert load(PretrainConfig, [f"sample.prompts=['{prompt}']"]).sample.prompts == (prompt,)


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
        ("sample.prompts=abc", "should be a list"),
        ("data.val_fraction=1", "less than 1"),
        ("model=3", "group of keys"),
        ("optimizer=null", "group of keys"),
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
        for other in ("'auto'", "a list, as [1, 2]"):
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
