"""Idle texts: the longest common beginning is found, and the oldest is forgotten first."""

import types
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from helpers.models import config_of
from manta.model.cache import KVCache, StateCache
from manta.model.memory import cache_bytes
from manta.model.reader import common
from manta.serve.engine.budget import working_bytes
from manta.serve.engine.prefixes import Prefixes

texts = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)


def cache(kind: type, size: int = 1) -> Any:
    made = object.__new__(kind)
    made.store = types.SimpleNamespace(nbytes=size)
    return made


@given(kept=st.lists(texts, max_size=12), wanted=texts)
def test_the_longest_common_beginning_is_found(
    kept: list[tuple[int, ...]], wanted: tuple[int, ...]
) -> None:
    prefixes = Prefixes()
    for text in kept:
        prefixes.put(text, cache(KVCache))
    found = prefixes.find(wanted)
    longest = max((common(text, wanted) for text in kept), default=0)
    expected = min(longest, len(wanted) - 1)
    assert (found[1] if found else 0) == expected
    assert found is None or common(found[0], wanted) >= expected
    inside = [(a, b) for a in prefixes.texts for b in prefixes.texts if a != b == a[: len(b)]]
    assert not inside, "no text is kept that begins another one"
    assert prefixes.nbytes == len(prefixes.texts)


@given(kept=st.lists(texts, max_size=12), wanted=texts)
def test_a_state_is_found_only_of_a_whole_text(
    kept: list[tuple[int, ...]], wanted: tuple[int, ...]
) -> None:
    prefixes = Prefixes()
    for text in kept:
        prefixes.put(text, cache(StateCache))
    begins = [text for text in kept if len(text) < len(wanted) and wanted[: len(text)] == text]
    longest = max(begins, key=len, default=None)
    assert prefixes.find(wanted) == (longest and (longest, len(longest)))
    assert set(prefixes.texts) == set(kept)


@given(uses=st.lists(st.tuples(st.sampled_from("ptf"), st.integers(0, 5)), max_size=30))
def test_the_oldest_is_the_one_that_was_used_longest_ago(uses: list[tuple[str, int]]) -> None:
    prefixes, order = Prefixes(), list[int]()
    for how, n in uses:
        text = (n, n, n)
        if how == "p":
            prefixes.put(text, cache(KVCache, n))
            order = [*(x for x in order if x != n), n]
        elif n in order and how == "t":
            prefixes.take(text)
            order.remove(n)
        elif n in order:
            assert prefixes.find((*text, 9)) == (text, 3)
            order = [*(x for x in order if x != n), n]
        assert prefixes.texts == [(x, x, x) for x in order]
        assert prefixes.oldest() == ((order[0],) * 3 if order else None)
        if len(order) > 1:
            assert prefixes.oldest((order[0],) * 3) == (order[1],) * 3
        assert prefixes.nbytes == sum(order)


def test_the_cost_models_bytes_are_those_of_the_caches() -> None:
    import torch

    for keys in ({"n_kv_head": 2}, {"family": "gpt2"}, {"family": "lstm"}):
        c = config_of(n_layer=2, n_head=4, n_embd=32, context_length=8, vocab_size=50, **keys)
        kind = StateCache if c.is_recurrent else KVCache
        args = (c, 1) if c.is_recurrent else (c, 1, 7)
        made = kind(*args, torch.device("cpu"))
        assert made.nbytes == cache_bytes(c, 7, "fp32")
        assert working_bytes(c, "fp32", 4, 8) < working_bytes(c, "fp32", 8, 8)
