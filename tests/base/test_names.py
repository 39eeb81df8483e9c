"""The names that a person gives to runs, datasets and sweeps: the same check for all jobs."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta import layout
from manta.bench.settings import BenchConfig
from manta.cluster import connection
from manta.config import from_dict, name_of_dataset, name_of_run
from manta.data.recipe import PrepareConfig
from manta.errors import ConfigError
from manta.export.convert import ImportConfig
from manta.monitor.metrics import Metrics
from manta.sweep.settings import SweepConfig
from manta.train.settings import PretrainConfig

KEYS: list[tuple[type, dict[str, Any], str]] = [
    (PretrainConfig, {}, "name"),
    (PretrainConfig, {}, "data.name"),
    (SweepConfig, {}, "name"),
    (SweepConfig, {}, "data.name"),
    (BenchConfig, {}, "name"),
    (ImportConfig, {"path": "model"}, "name"),
    (PrepareConfig, {}, "name"),
]
BAD = [
    "", ".", "..", "../../escaped", "/absolute", ".hidden", "a//b", "a/", "a/../b", "a/.b", "a b",
    "a\n", "a\0", "a" * 201, "é" * 101, "~", "s3://bucket/a", "*",
]  # fmt: skip


def made(cls: type, keys: dict[str, Any], key: str, name: str) -> Any:
    group, _, last = key.rpartition(".")
    return from_dict(cls, keys | ({group: {last: name}} if group else {last: name}))


@pytest.mark.parametrize(("cls", "keys", "key"), KEYS)
@pytest.mark.parametrize("name", BAD, ids=repr)
def test_a_bad_name_is_refused_by_every_job(
    cls: type, keys: dict[str, Any], key: str, name: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        made(cls, keys, key, name)
    assert str(caught.value).startswith(f"{key}={name!r}: ")
    assert "are valid" in str(caught.value) or "longer than 200 bytes" in str(caught.value)


@pytest.mark.parametrize(("cls", "keys", "key"), KEYS)
@pytest.mark.parametrize("name", ["a", "é", "A-1_b.c", "n" * 195])
def test_a_good_name_is_taken(cls: type, keys: dict[str, Any], key: str, name: str) -> None:
    made(cls, keys, key, name)


@settings(deadline=None, max_examples=300)
@given(st.text(st.sampled_from("aé./-_ ~\n")) | st.text(max_size=300))
def test_a_name_that_is_taken_is_a_folder_in_the_home(name: str) -> None:
    for check, folder, most in (
        (name_of_run, layout.run_folder("/home", name), 800),
        (name_of_dataset, layout.dataset_folder("/home", name), 200),
    ):
        try:
            check(name)
        except ValueError:
            continue
        assert str(Path(folder)) == folder and not {"..", "."} & set(Path(folder).parts)
        assert not any(part.startswith(".") for part in Path(folder).parts)
        assert len(name.encode()) <= most
        assert max(len(part.encode()) for part in Path(folder).parts) <= 200


def test_a_name_made_from_the_source_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"made from source and tokenizer\): longer than 200"):
        from_dict(PrepareConfig, {"source": "/texts/" + "n" * 250})
    from_dict(PrepareConfig, {"source": "/texts/" + "n" * 250, "name": "short"})


def test_the_best_trial_of_a_sweep_has_a_name_too() -> None:
    with pytest.raises(ConfigError, match=r"the best trial's name, n+-best, is longer than 200"):
        from_dict(SweepConfig, {"name": "n" * 196})


@settings(deadline=None, max_examples=50)
@given(st.text(st.sampled_from("aé東🐟./-_"), min_size=1, max_size=800))
def test_ray_takes_every_name(name: str) -> None:
    """Ray cannot encode other letters than ASCII's, neither in its records nor in its metrics."""
    plain = connection.plain_name(name)
    assert plain.isascii() and "/" not in plain and len(plain) <= 100
    Metrics(name).publish({"step": 1, "loss": 2.0})
