"""The kernel that attention takes, and what is compiled for it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from manta.model import cpu_attention
from manta.model.attention import attend, document_mask, fused_kernels
from manta.model.compilation import compiled, recompile_limit


def test_the_limit_of_compilations_goes_where_torch_takes_it() -> None:
    def newer(model: Any, *, recompile_limit: int | None = None) -> None: ...

    def older(model: Any, *, fullgraph: bool = False) -> None: ...

    assert recompile_limit(64, newer) == {"recompile_limit": 64}
    before = torch._dynamo.config.recompile_limit
    try:
        assert recompile_limit(before + 3, older) == {}  # torch 2.11 and 2.12
        assert torch._dynamo.config.recompile_limit == before + 3
        assert recompile_limit(before, older) == {}
        assert torch._dynamo.config.recompile_limit == before + 3  # it is never lowered
    finally:
        torch._dynamo.config.recompile_limit = before


def test_a_compiled_block_mask_is_the_one_of_its_documents_and_compiles_once() -> None:
    torch._dynamo.utils.counters.clear()
    for seed in range(3):
        torch.manual_seed(seed)
        documents = (torch.rand(2, 256) < 0.05).long().cumsum(1)

        def sees(
            b: Tensor, h: Tensor, query: Tensor, key: Tensor, documents: Tensor = documents
        ) -> Tensor:
            return (query >= key) & (documents[b, query] == documents[b, key])

        made = compiled(create_block_mask)(sees, 2, None, 256, 256, device=documents.device)
        plain = document_mask(documents, flex=True)
        assert torch.equal(made.to_dense(), plain.to_dense())
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "q_indices"):
            assert torch.equal(getattr(made, name), getattr(plain, name)), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_cpu_has_none_of_a_gpus_kernels() -> None:
    assert fused_kernels(torch.device("cpu"), torch.bfloat16, 64) == []


def heads_of(sequences: int, length: int, heads: int, groups: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(length)
    made = torch.randn(sequences, length, (heads + 2) * groups, 8).to(dtype)
    return made.requires_grad_()


def gradient(function: Any, made: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Attention's output, and the gradients of its inputs: queries, keys, values."""
    made = made.detach().clone().requires_grad_()
    heads = made.size(2) - 2 * groups
    out = function(*made.transpose(1, 2).split([heads, groups, groups], dim=1))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    (out * weights).sum().backward()
    assert made.grad is not None
    return out.detach(), made.grad


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@settings(deadline=None, max_examples=40)
@given(
    sequences=st.integers(1, 4),
    length=st.integers(2, 40),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    rows=st.integers(1, 48),
    scores=st.integers(1, 9000),
)
def test_attention_by_whole_products_is_torchs_own(
    sequences: int, length: int, heads: int, groups: int, rows: int, scores: int
) -> None:
    made = heads_of(sequences, length, heads * groups, 1, torch.float32)
    made = torch.cat([made, made[:, :, : 2 * (groups - 1)]], dim=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "ROWS", rows)
        patch.setattr(cpu_attention, "SCORES", scores)
        ours = gradient(cpu_attention.causal_attention, made, groups)
    for a, b in zip(ours, gradient(plain, made, groups), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_by_whole_products_is_as_near_as_bf16_is() -> None:
    made = heads_of(2, 200, 4, 1, torch.bfloat16)
    exact = gradient(plain, made.double(), 1)
    for a, b in zip(gradient(cpu_attention.causal_attention, made, 1), exact, strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()


def test_the_operation_of_whole_products_is_one_that_torch_can_compile() -> None:
    heads = heads_of(2, 20, 4, 1, torch.float32).transpose(1, 2).split([4, 1, 1], dim=1)
    torch.library.opcheck(cpu_attention.causal_attention, heads)


@pytest.mark.parametrize("pays", [True, False])
def test_whole_products_are_for_training_in_bf16_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    monkeypatch.setattr(cpu_attention, "pays", lambda: pays)
    calls: list[torch.dtype] = []
    monkeypatch.setattr(
        cpu_attention, "causal_attention", lambda q, k, v: calls.append(q.dtype) or plain(q, k, v)
    )
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = heads_of(1, 5, 2, 1, dtype).transpose(1, 2).split([2, 1, 1], dim=1)
        attend(q, k, v, None, True, 0.0)
        attend(q, k, v, None, False, 0.0)
        attend(q, k, v, None, True, 0.1)
        attend(q, k, v, torch.ones(5, 5).tril().bool(), False, 0.0)
        with torch.no_grad():
            attend(q, k, v, None, True, 0.0)
    assert calls == [torch.bfloat16] * pays
