"""Which kernel attention takes, and what is compiled for it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from manta.model.attention import document_mask, fused_kernels
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
