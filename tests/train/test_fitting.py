"""The verdict on memory: it flips where the cost model crosses the limit, and what is said to fit
does fit."""

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from manta.config import from_dict, merged
from manta.errors import ConfigError
from manta.model.memory import ALLOWANCE, GIB, USABLE, costs
from manta.train.fitting import (
    SAVED,
    Way,
    changed,
    kinds,
    largest_micro_batch,
    needs_less,
    verdict,
    ways,
)
from manta.train.settings import PretrainConfig, memory_setup

few = settings(deadline=None, max_examples=25)


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    workers = draw(st.sampled_from([1, 2, 8]))
    micro = draw(st.sampled_from([1, 2, 8]))
    muon = draw(st.booleans())
    return {
        "model": {
            "family": draw(st.sampled_from(["gpt2", "modern"])), "n_layer": draw(st.integers(1, 8)),
            "n_embd": 64 * draw(st.integers(1, 16)), "n_head": 4, "context_length": 256,
            "vocab_size": draw(st.sampled_from([1000, 50257])),
        },
        "num_workers": workers, "gpus_per_worker": 1, "micro_batch_size": micro,
        "tokens_per_batch": 256 * workers * micro * draw(st.sampled_from([1, 4, 12])),
        "zero_stage": draw(st.integers(0, 2 if muon else 3)),
        "optimizer": {"kind": "muon" if muon else "adamw"},
        "activation_checkpointing": draw(st.sampled_from(["none", "selective", "full"])),
    }  # fmt: skip


def setup_of(c: PretrainConfig) -> Any:
    setup = memory_setup(c, c.model, "bf16", "cuda")
    return dataclasses.replace(setup, micro_batch_size=c.micro_batch)


def nested(keys: dict[str, object]) -> dict[str, Any]:
    """Keys with dots as a tree."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        *groups, last = key.split(".")
        tree: dict[str, Any] = {last: value}
        for group in reversed(groups):
            tree = {group: tree}
        found = merged(found, tree)
    return found


@given(tree=runs())
@few
def test_the_verdict_flips_where_the_model_crosses_the_limit(tree: dict[str, Any]) -> None:
    c = from_dict(PretrainConfig, tree)
    setup = setup_of(c)
    peak = costs(setup).peak
    assert verdict(c, setup, peak, None).fits is True
    assert verdict(c, setup, peak - 1, None).fits is False
    assert verdict(c, setup, None, None).fits is None


@given(tree=runs(), share=st.floats(0.05, 0.999), most=st.sampled_from([None, 8, 16]))
@few
def test_each_way_is_a_config_that_loads_and_fits(
    tree: dict[str, Any], share: float, most: int | None
) -> None:
    c = from_dict(PretrainConfig, tree)
    usable = share * costs(setup_of(c)).peak
    found = ways(c, setup_of(c), usable, most)
    assert len(found) == len({str(way) for way in found})
    for way in found:
        changed = from_dict(PretrainConfig, merged(tree, nested(way.keys)))
        setup = setup_of(changed)
        assert verdict(changed, setup, usable, most).fits is True, str(way)
        assert costs(setup).peak == way.peak, str(way)
        assert most is None or changed.most_workers <= max(most, c.most_workers)


@given(tree=runs(), share=st.floats(0.05, 0.999))
@few
def test_each_way_is_the_mildest_of_its_kind_that_fits(tree: dict[str, Any], share: float) -> None:
    c = from_dict(PretrainConfig, tree)
    setup = setup_of(c)
    usable = share * costs(setup).peak
    found = ways(c, setup, usable, None)
    expected = []
    for kind in kinds(c, setup, None).values():
        tried = [Way(keys, costs(changed(c, setup, keys)[1]).peak) for keys in kind]
        expected += [way for way in tried if way.peak <= usable][:1]
    if expected:
        assert found == expected[:4]
    else:  # no change alone is enough
        assert all(len(way.keys) > 1 or "model.n_layer" in way.keys or "seq_len" in way.keys
                   for way in found)  # fmt: skip


@given(tree=runs(), share=st.floats(0.05, 0.999))
@few
def test_a_device_of_the_size_that_is_said_is_enough_and_a_smaller_one_is_not(
    tree: dict[str, Any], share: float
) -> None:
    c = from_dict(PretrainConfig, tree)
    said = verdict(c, setup_of(c), share * costs(setup_of(c)).peak).problem
    size = float(said.rpartition("at least ")[2].removesuffix(" GiB"))
    assert "\n" not in said
    assert verdict(c, setup_of(c), USABLE * size * GIB).fits is True
    assert verdict(c, setup_of(c), USABLE * (size - 0.011) * GIB).fits is False


@given(tree=runs(), room=st.floats(0.2, 4))
@few
def test_the_largest_micro_batch_fits_and_the_next_larger_does_not(
    tree: dict[str, Any], room: float
) -> None:
    c = from_dict(PretrainConfig, {**tree, "micro_batch_size": "auto"})
    setup = memory_setup(c, c.model, "bf16", "cuda")
    usable = costs(setup).peak * room

    def peak(n: int) -> int:
        return costs(dataclasses.replace(setup, micro_batch_size=n)).peak

    try:
        found = largest_micro_batch(c, setup, usable)
    except ConfigError as e:
        least = dataclasses.replace(setup, micro_batch_size=1)
        assert peak(1) > usable
        assert str(e) == verdict(c, least, usable).problem
        assert str(e).startswith("micro_batch_size=1 needs ")
    else:
        assert peak(found) <= usable
        assert all(peak(n) > usable for n in c.micro_batches if n > found)


@given(tree=runs())
@few
def test_what_is_said_to_need_less_does(tree: dict[str, Any]) -> None:
    c = from_dict(PretrainConfig, tree)
    peak = costs(setup_of(c)).peak
    said = needs_less(c, setup_of(c))
    for way in ways(c, setup_of(c), (1 - SAVED) * peak, None):
        assert way.peak <= 0.8 * peak and str(way) in said


def test_workers_on_cpus_are_not_multiplied_as_they_share_a_machine() -> None:
    tree = {"model": {"vocab_size": 50257}, "tokens_per_batch": 65536, "micro_batch_size": 8}
    c = from_dict(PretrainConfig, tree)
    for device, has in (("cpu", False), ("cuda", True)):
        setup = memory_setup(c, c.model, "fp32", device)  # type: ignore[arg-type]
        assert any(True for _ in kinds(c, setup, None)["spread"]) == has


def test_an_lstm_recomputes_no_blocks() -> None:
    tree = {
        "model": {"family": "lstm", "n_layer": 8, "n_embd": 1024, "vocab_size": 50000},
        "gpus_per_worker": 1, "tokens_per_batch": 65536,
    }  # fmt: skip
    c = from_dict(PretrainConfig, tree)
    found = [way for size in (1 << 29, 1 << 31) for way in ways(c, setup_of(c), size, None)]
    assert found and not any("activation_checkpointing" in way.keys for way in found)


@given(tree=runs())
@few
def test_a_smaller_micro_batch_comes_first_where_it_is_enough(tree: dict[str, Any]) -> None:
    c = from_dict(PretrainConfig, tree)
    assume(c.micro_batch > 1)
    smaller = max(n for n in c.micro_batches if n < c.micro_batch)
    peak = costs(dataclasses.replace(setup_of(c), micro_batch_size=smaller)).peak
    assume(peak < costs(setup_of(c)).peak)
    first, *_ = ways(c, setup_of(c), peak, None)
    assert first.keys == {"micro_batch_size": smaller}


def test_where_nothing_fits_there_is_no_way() -> None:
    c = from_dict(PretrainConfig, {"model": {"vocab_size": 1000}, "gpus_per_worker": 1})
    found = verdict(c, setup_of(c), ALLOWANCE, 8)
    assert found.fits is False and found.ways == ()
    assert "no setting makes it fit: take a smaller model, or a device of at least" in found.problem


@pytest.mark.parametrize("stage", [0, 3])
def test_few_devices_are_not_exceeded(stage: int) -> None:
    tree = {
        "model": {"preset": "gpt2-124m", "vocab_size": 50257}, "num_workers": 2,
        "zero_stage": stage, "gpus_per_worker": 1, "tokens_per_batch": 65536, "micro_batch_size": 8,
    }  # fmt: skip
    c = from_dict(PretrainConfig, tree)
    for way in ways(c, setup_of(c), 4e9, 2):
        assert "num_workers" not in way.keys
