"""The verdict on memory: it flips where the cost model crosses the limit, and what is said to fit
does fit."""

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from manta.config import from_dict, merged
from manta.model.memory import costs
from manta.plan.fitting import verdict, ways
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
    assert len(found) == len({way.text for way in found})
    for way in found:
        changed = from_dict(PretrainConfig, merged(tree, nested(way.keys)))
        setup = setup_of(changed)
        assert verdict(changed, setup, usable, most).fits is True, way.text
        assert costs(setup).peak == way.peak, way.text
        assert most is None or changed.most_workers <= max(most, c.most_workers)


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
    found = verdict(c, setup_of(c), 1e6, 8)
    assert found.fits is False and found.ways == ()


@pytest.mark.parametrize("stage", [0, 3])
def test_few_devices_are_not_exceeded(stage: int) -> None:
    tree = {
        "model": {"preset": "gpt2-124m", "vocab_size": 50257}, "num_workers": 2,
        "zero_stage": stage, "gpus_per_worker": 1, "tokens_per_batch": 65536, "micro_batch_size": 8,
    }  # fmt: skip
    c = from_dict(PretrainConfig, tree)
    for way in ways(c, setup_of(c), 4e9, 2):
        assert "num_workers" not in way.keys
