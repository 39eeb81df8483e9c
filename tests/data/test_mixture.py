"""Mixes of datasets: their keys, batches that grow, reading back from YAML, and datasets that are
missing or do not go together."""

import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from manta import config as configs
from manta import layout
from manta.config import from_dict, load, to_dict, to_yaml
from manta.data import mixture
from manta.data.manifest import Manifest, Shard
from manta.data.order import Phase, make_stages, stage_of
from manta.data.recipe import DataConfig
from manta.data.shards import ShardWriter
from manta.errors import ConfigError, DataError
from manta.text import tokenizer
from manta.train.resume import data_identity
from manta.train.settings import PretrainConfig

few = settings(deadline=None, max_examples=25)


def refusal(cls: type, *arguments: str) -> str:
    """The message with which `load` refuses these arguments."""
    with pytest.raises(ConfigError) as caught:
        load(cls, arguments)
    return str(caught.value)


def write(folder: Path, text: str, name: str = "config.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# --- the keys of a mix ---------------------------------------------------------------------------


def test_a_mix_is_read_from_arguments_and_files(tmp_path: Path) -> None:
    assert DataConfig().mix == DataConfig().mix_switches == {}
    for arguments in (
        ["mix={a: 0.7, b: 0.3}"],
        ["mix.a=0.7", "mix.b=0.3"],
        ["mix={a: 0.7, b: 1}", "mix.b=0.3"],
        [write(tmp_path, "mix: {a: 0.7, b: 0.3}\n")],
    ):
        assert load(DataConfig, arguments).mix == {"a": 0.7, "b": 0.3}
    c = load(PretrainConfig, ["data.mix={web: 3, code: 1}"])
    assert c.data.mix == {"web": 3.0, "code": 1.0}
    assert c.data.datasets == ["web", "code"]


def test_switches_have_whole_numbers_as_keys_however_they_are_written(tmp_path: Path) -> None:
    first = write(tmp_path, "mix: {a: 1}\nmix_switches:\n  8_000_000: {b: 1}\n")
    for arguments in (
        [first],
        ["mix={a: 1}", "mix_switches={8_000_000: {b: 1.0}}"],
        ["mix={a: 1}", "mix_switches={'8000000': {b: 1}}"],
        ["mix={a: 1}", "mix_switches.8000000.b=1"],
        ["mix={a: 1}", "mix_switches.8000000={b: 1}"],
        [write(tmp_path, to_yaml(load(DataConfig, [first])), "again.yaml")],
    ):
        c = load(DataConfig, arguments)
        assert c.mix_switches == {8_000_000: {"b": 1.0}}
        assert c.datasets == ["a", "b"]
        assert c.phases(100) == (Phase(0, (1000, 0)), Phase(80_000, (0, 1000)))
        assert c.phases(3)[1].start == -(-8_000_000 // 3)  # a sequence is all of one mix


def test_phases_are_in_order_and_have_all_datasets_of_the_run() -> None:
    c = load(DataConfig, ["mix={a: 0.7, b: 0.3, c: 0}", "mix_switches={900: {d: 1}, 500: {b: 1}}"])
    assert c.datasets == ["a", "b", "d"]
    assert c.phases(10) == (
        Phase(0, (700, 300, 0)),
        Phase(50, (0, 1000, 0)),
        Phase(90, (0, 0, 1000)),
    )
    assert DataConfig().phases(10) == (Phase(0, (1000,)),)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mix={a: 0, b: 0}"], "mix={'a': 0.0, 'b': 0.0}: at least one weight has to be more"),
        (["mix={a: 1}", "mix_switches={9: {}}"], "mix_switches.9={}: at least one weight"),
        (["mix={a: 1}", "mix_switches={9: {b: 0}}"], "mix_switches.9={'b': 0.0}: at least one"),
        (["mix={a: -1, b: 1}"], "mix.a=-1: should be greater than or equal to 0"),
        (["mix={a: .nan}"], "mix.a=nan: should be"),
        (["mix={a: .inf}"], "mix.a=inf: should be a finite number"),
        (["mix={a: true}"], "mix.a=True: should be a number, not true or false"),
        (["mix={a: much}"], "mix.a='much': should be a valid number"),
        (["mix=[a, b]"], "mix=['a', 'b']: should be a valid dictionary"),
        (["mix={a: 1, b: 0.0004}"], "mix.b=0.0004 is less than a thousandth of the mix: raise it"),
        (["mix={a: 1}", "mix_switches={9: {b: 5, c: 1e-3}}"], "mix_switches.9.c=0.001 is less"),
        (["mix={a: 1}", "mix_switches={9: {b: -1}}"], "mix_switches.9.b=-1: should be greater"),
        (["mix={a: 1}", "mix_switches={9: 1}"], "mix_switches.9=1: should be a valid dictionary"),
        (["mix={a: 1}", "mix_switches={0: {b: 1}}"], "mix_switches: its key 0 should be greater"),
        (["mix={a: 1}", "mix_switches={-9: {b: 1}}"], "mix_switches: its key -9 should be"),
        (["mix={a: 1}", "mix_switches={x: {b: 1}}"], "mix_switches: its key x should be a valid i"),
        (["mix={a: 1}", "mix_switches={1.5: {b: 1}}"], "mix_switches: its key 1.5 should be"),
        (["mix={a: 1}", "mix_switches={true: {b: 1}}"], "mix_switches: its key True should be a n"),
        (["mix_switches={9: {b: 1}}"], "mix_switches is for a mix: set mix too"),
        (["mix={a: 1}", "source=x.txt"], "source is for preparing one dataset; those of a mix"),
        (["mix={a: 1}", "name=x"], "name is for preparing one dataset"),
        (["mix={a: 1}", "val_fraction=0.2"], "val_fraction is for preparing one dataset"),
        (["mix={../a: 1}"], "mix.../a: the name of a dataset is needed"),
        (["mix={a/b: 1}"], "mix.a/b: the name of a dataset is needed"),
        (["mix={'': 1}"], "mix.: the name of a dataset is needed"),
        (["mix={.a: 1}"], "mix..a: the name of a dataset is needed"),
        (["mix={a: 1}", "mix_switches={9: {b c: 1}}"], "mix_switches.9.b c: the name of a dataset"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_in_one_line(arguments: list[str], words: str) -> None:
    assert refusal(DataConfig, *arguments).startswith(words)
    message = refusal(PretrainConfig, *(f"data.{argument}" for argument in arguments))
    assert message.startswith(f"data.{words}")
    assert "\n" not in message


def test_everything_that_is_wrong_with_a_mix_is_listed() -> None:
    message = refusal(DataConfig, "mix={a b: 1, c: 1e-9}", "source=x", "tokenizer=r50k_base")
    head, *lines = message.splitlines()
    assert head == "4 problems in the config:"
    keys = [line.split()[0] for line in lines]
    assert sorted(keys) == ["mix.a", "mix.c=1e-09", "source", "tokenizer"]


def test_what_does_not_prepare_data_goes_with_a_mix() -> None:
    keys = ["verify=true", "packing=best_fit", "on_corrupt=skip", "log_fingerprint=true"]
    assert load(DataConfig, ["mix={a: 1}", *keys]).packing == "best_fit"
    assert load(DataConfig, ["mix={a: 0.9995, b: 0.0006}"]).phases(1)[0].counts == (999, 1)
    assert load(DataConfig, ["mix={a: 1e308, b: 1e308}"]).phases(1)[0].counts == (500, 500)


# --- there and back ------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "web-1.5", "ü", "7"])
MIXES = st.dictionaries(NAMES, st.integers(0, 9).map(float) | st.floats(0.5, 9), min_size=1).filter(
    lambda mix: any(mix.values())
)
TREES = st.fixed_dictionaries(
    {"mix": MIXES}, optional={"mix_switches": st.dictionaries(st.integers(1, 2**60), MIXES)}
)
RAMPS = st.dictionaries(st.integers(1, 9).map(lambda n: n * 256), st.integers(1, 2**50)).filter(
    lambda ramp: len({*ramp.values()}) == len(ramp)
)


@few
@given(TREES, RAMPS)
def test_mixes_and_ramps_come_back_equal(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any], ramp: dict[int, int]
) -> None:
    c = from_dict(PretrainConfig, {"data": data, "batch_ramp": ramp})
    assert c.data.mix == data["mix"]
    assert c.data.mix_switches == data.get("mix_switches", {})
    assert c.batch_ramp == ramp
    assert from_dict(PretrainConfig, to_dict(c)) == c
    assert from_dict(PretrainConfig, yaml.safe_load(to_yaml(c))) == c
    differing = configs.differences(c)
    assert differing.keys() == {"data", *(["batch_ramp"] if ramp else [])}
    assert from_dict(PretrainConfig, differing) == c
    folder = tmp_path_factory.mktemp("config")
    for tree in (c, differing):
        again = load(PretrainConfig, [write(folder, to_yaml(tree))])
        assert again == c
        # Equal dicts may differ in order, and the order of the datasets must stay.
        assert again.data.datasets == c.data.datasets


def test_a_later_argument_changes_a_runs_own_config(tmp_path: Path) -> None:
    arguments = ["data.mix={a: 1, b: 1}", "data.mix_switches={9000: {b: 1}}"]
    file = write(tmp_path, to_yaml(load(PretrainConfig, [*arguments, "batch_ramp={256: 9000}"])))
    for given_later, switches in (
        ("data.mix_switches={9000: {a: 1}}", {9000: {"a": 1}}),
        ("data.mix_switches.9000={a: 1}", {9000: {"a": 1}}),
        ("data.mix_switches.9000.a=1", {9000: {"a": 1, "b": 1}}),
        ("data.mix_switches.12000={a: 1}", {9000: {"b": 1}, 12000: {"a": 1}}),
        ("data.mix_switches={}", {}),
    ):
        c = load(PretrainConfig, [file, given_later])
        assert c.data.mix_switches == switches
        assert c.data.mix == {"a": 1, "b": 1}
    assert load(PretrainConfig, [file, "batch_ramp={}"]).batch_ramp == {}
    assert load(PretrainConfig, [file, "batch_ramp.256=10_000"]).batch_ramp == {256: 10_000}


def test_help_shows_what_a_mix_and_a_ramp_look_like() -> None:
    text = configs.help_text(PretrainConfig)
    assert "\n  data.mix: {str: float} = {}\n" in text
    assert "\n  data.mix_switches: {int: {str: float}} = {}\n" in text
    assert "\n  batch_ramp: {int: int} = {}\n" in text


# --- batches that grow ---------------------------------------------------------------------------


def test_a_ramp_whose_batches_do_not_divide_is_refused() -> None:
    assert refusal(PretrainConfig, "batch_ramp={1000: 100000}") == (
        "batch_ramp=1000 does not divide by seq_len 256 x num_workers 1 = 256; nearest that do: "
        "768 and 1024"
    )
    keys = ["tokens_per_batch=6144", "num_workers=3", "micro_batch_size=2"]
    message = refusal(PretrainConfig, *keys, "batch_ramp={1024: 9, 1536: 10, 4096: 11}")
    assert re.findall(r"batch_ramp=\d+", message) == ["batch_ramp=1024", "batch_ramp=4096"]
    assert (
        "seq_len 256 x num_workers 3 x micro_batch_size 2 = 1536; nearest that do: 1536" in message
    )


@pytest.mark.parametrize(
    ("ramp", "words"),
    [
        ("{1024: 0}", "batch_ramp.1024=0: should be greater than or equal to 1"),
        ("{1024: x}", "batch_ramp.1024='x': should be a valid integer"),
        ("{1024: true}", "batch_ramp.1024=True: should be a number, not true or false"),
        ("{0: 1024}", "batch_ramp: its key 0 should be greater than or equal to 1"),
        ("1024", "batch_ramp=1024: should be a valid dictionary"),
    ],
)
def test_a_ramp_is_whole_numbers_from_one_on(ramp: str, words: str) -> None:
    assert refusal(PretrainConfig, f"batch_ramp={ramp}").startswith(words)


@few
@given(
    st.dictionaries(st.integers(1, 6), st.integers(1, 60_000), max_size=3),
    st.integers(1, 6),
    st.integers(1, 3),
    st.none() | st.just(2),
    st.integers(1, 90_000),
)
def test_steps_tokens_and_micro_batches_add_up(
    ramp: dict[int, int], size: int, workers: int, micro: int | None, total_tokens: int
) -> None:
    assume(len(set(ramp.values())) == len(ramp))  # the same end twice is refused
    unit = 32 * workers * 2
    tree = {
        "seq_len": 32,
        "num_workers": workers,
        "micro_batch_size": micro,
        "tokens_per_batch": size * unit,
        "batch_ramp": {n * unit: until for n, until in ramp.items()},
        "total_tokens": total_tokens,
    }
    c = from_dict(PretrainConfig, tree)
    assert c.tokens_before(c.total_steps - 1) < total_tokens <= c.tokens_before(c.total_steps)
    assert c.micro_batch == (micro or c.micro_batch)
    for step in range(c.total_steps + 2):
        tokens = c.tokens_before(step + 1) - c.tokens_before(step)
        assert tokens in (size * unit, *c.batch_ramp)
        assert tokens == stage_of(c.stages, step).sequences_per_batch * 32
        assert c.grad_accum_steps(step) * c.micro_batch * workers * 32 == tokens
        if tokens != size * unit:  # in the ramp
            assert c.tokens_before(step) < c.batch_ramp[tokens]
    assert c.derived()["steps"] == c.total_steps


def test_a_batch_ramp_by_hand() -> None:
    c = load(PretrainConfig, ["batch_ramp={512: 1500, 1024: 4000}", "total_tokens=8000"])
    steps = [c.tokens_before(step + 1) - c.tokens_before(step) for step in range(c.total_steps)]
    assert steps == [512] * 3 + [1024] * 3 + [2048] * 2
    assert [c.grad_accum_steps(step) for step in (0, 3, 6)] == [1, 2, 4]


# --- the datasets themselves ---------------------------------------------------------------------

Make = Callable[..., Manifest]


@pytest.fixture(scope="module")
def tokenizers() -> list[tokenizer.Tokenizer]:
    return [tokenizer.train([text], 260) for text in ("some text", "any other words, any other")]


@pytest.fixture
def make(tmp_path: Path, tokenizers: list[tokenizer.Tokenizer]) -> Make:
    """Makes a dataset of random ids under tmp_path/data."""

    def made(name: str, tokens: int = 300, which: int = 0, seed: int = 0) -> Manifest:
        path = tmp_path / "data" / name
        path.mkdir(parents=True)
        used = tokenizers[which]
        shards: list[Shard] = []
        for split, count in (("train", tokens - 40), ("train", 40), ("val", 50)):
            ids = np.random.default_rng((seed, len(shards))).integers(0, 259, count, np.uint16)
            ids[-1] = used.eot
            file = f"{split}-{len(shards):05d}.parquet"
            writer = ShardWriter(str(path / file), ids.dtype, 64)
            writer.write(ids)
            written = writer.close()
            shards.append(Shard(file, split, 1, count, count, int(ids.max()), *written))  # type: ignore[arg-type]
        (path / layout.ENCODING).write_bytes(used.serialized)
        manifest = Manifest(
            str(path), {"of": name}, used.name, used.sha256, used.vocab_size, used.eot, "uint16",
            64, {}, {}, tuple(shards),
        )  # fmt: skip
        manifest.save()
        return manifest

    return made


def ready(home: Path, *arguments: str, said: list[str] | None = None) -> tuple[Manifest, ...]:
    return mixture.open_datasets(
        load(DataConfig, arguments), str(home), ([] if said is None else said).append
    )


def test_the_datasets_of_a_mix_are_found_checked_and_told_of(make: Make, tmp_path: Path) -> None:
    a, b, c = make("a"), make("b", seed=1), make("c", seed=2)
    said: list[str] = []
    arguments = ["mix={b: 0.5, a: 0.5}", "mix_switches={9: {c: 1}}", "verify=true"]
    assert ready(tmp_path, *arguments, said=said) == (b, a, c)
    assert [line.split()[1] for line in said] == [f"{m.path}:" for m in (b, a, c)]
    assert all("300 train and 50 val tokens" in line for line in said)
    assert ready(tmp_path, "mix={b: 1, a: 0, none: 0}") == (b,)


def test_a_dataset_that_is_missing_is_named_with_those_that_are_there(
    make: Make, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        ready(tmp_path, "mix={code: 1}")
    assert str(caught.value) == (
        f"data.mix names code, but {tmp_path}/data/code is no dataset (there are: none); prepare "
        "it: python jobs/prepare.py data.name=code data.source=..."
    )
    make("web"), make("books")
    (tmp_path / "data" / "unfinished").mkdir()
    (tmp_path / "data" / ".books.lock").write_text("")
    for arguments in (["mix={web: 1, code: 1}"], ["mix={web: 1}", "mix_switches={9: {code: 1}}"]):
        with pytest.raises(DataError, match=r"names code, but .* \(there are: books, web\); "):
            ready(tmp_path, *arguments)


def test_datasets_of_another_tokenizer_are_refused_with_what_to_do(
    make: Make, tmp_path: Path
) -> None:
    a, b = make("a"), make("b", which=1)
    with pytest.raises(DataError) as caught:
        ready(tmp_path, "mix={a: 1, b: 1}")
    assert str(caught.value) == (
        f"data.mix: b has another tokenizer ({b.tokenizer}) than a ({a.tokenizer}); prepare it "
        f"with data.tokenizer={a.path}/encoding.json"
    )
    assert ready(tmp_path, "mix={b: 1, a: 0}") == (b,)


def test_a_damaged_dataset_of_a_mix_is_named(make: Make, tmp_path: Path) -> None:
    make("a"), make("b")
    file = tmp_path / "data" / "b" / "train-00001.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"^{file}: \d+ bytes, but its manifest says ") as caught:
        ready(tmp_path, "mix={a: 1, b: 1}")
    assert "\n" not in str(caught.value)


def test_too_little_data_is_refused(make: Make) -> None:
    a, b = make("a"), make("b", tokens=50)
    phases = (Phase(0, (500, 500)),)
    with pytest.raises(DataError, match=r"has 350 tokens, fewer than one batch of 400 "):
        mixture.make_order((a, b), phases, make_stages({400: 9}, 10, 20), 0, 10)
    with pytest.raises(DataError, match=rf"{b.path}: its train split has 50 tokens, not one seq"):
        mixture.make_order((a, b), phases, make_stages({}, 50, 100), 0, 50)
    order = mixture.make_order((a, b), phases, make_stages({}, 49, 98), 7, 49)
    assert [line.shards.tolist() for line in order.lines] == [[260, 40], [10, 40]]
    assert {line.seed for line in order.lines} == {7}


# --- what a run keeps to -------------------------------------------------------------------------


def test_a_dataset_is_known_by_its_train_tokens_wherever_it_is(make: Make, tmp_path: Path) -> None:
    a, again, other, longer = make("a"), make("b"), make("c", seed=1), make("d", tokens=400)
    assert mixture.identity(a) == mixture.identity(again)
    assert len({mixture.identity(m) for m in (a, other, longer)}) == 3
    val_only = dataclasses.replace(a, shards=a.shards[:2], path=str(tmp_path))
    assert mixture.identity(val_only) == mixture.identity(a)
    stages, phases = make_stages({}, 10, 20), (Phase(0, (500, 500)),)
    keys = [line.key for line in mixture.make_order((a, other), phases, stages, 0, 10).lines]
    assert keys[0] != keys[1]


def test_shares_are_of_datasets_by_what_is_in_them(make: Make) -> None:
    a, b = make("a"), make("b", seed=1)
    phases = load(DataConfig, ["mix={a: 3, b: 1}", "mix_switches={900: {b: 1}}"]).phases(10)
    names = [mixture.identity(m) for m in (a, b)]
    expected = {"0": {names[0]: 750, names[1]: 250}, "90": {names[1]: 1000}}
    assert mixture.shares((a, b), phases) == expected


def test_what_comes_after_may_still_be_changed() -> None:
    mixes = {"0": {"a": 1000}, "90": {"b": 1000}, "100": {"a": 500, "b": 500}}
    for sequences, met in ((0, 1), (1, 1), (90, 1), (91, 2), (100, 2), (101, 3), (10**15, 3)):
        assert mixture.so_far(mixes, sequences) == dict(itertools.islice(mixes.items(), met))
    assert mixture.so_far({}, 10) == {}


def test_a_run_may_change_only_the_mixes_that_it_has_not_met(make: Make) -> None:
    manifests = {"a": make("a"), "b": make("b", seed=1)}

    def mixes(*arguments: str) -> dict[str, Any]:
        c = load(PretrainConfig, arguments)
        return data_identity(c, tuple(manifests[name] for name in c.data.datasets))["mix"]

    first = mixes("data.mix={a: 1, b: 1}", "data.mix_switches={25600: {b: 1}}")
    later = mixes("data.mix={b: 1, a: 1}", "data.mix_switches={51200: {a: 1}}")
    assert first == {"0": first["0"], "100": {mixture.identity(manifests["b"]): 1000}}
    assert mixture.so_far(first, 100) == mixture.so_far(later, 100)
    assert mixture.so_far(first, 101) != mixture.so_far(later, 101)
