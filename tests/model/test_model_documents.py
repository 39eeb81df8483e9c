"""Several documents in one row: the model treats each as if it were alone."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from helpers.models import SMALL, SMALL_GPTS, small_model, some_tokens
from manta.model.attention import attend, document_mask, document_positions, has_flex_kernel

few = settings(deadline=None, max_examples=15)


cuts_of_two_rows = st.lists(st.sets(st.integers(0, 15), max_size=6), min_size=2, max_size=2)


def numbered(cuts: list[set[int]], length: int = 16) -> Tensor:
    """Document numbers, (B, length): in each row a new document begins at each of its cuts."""
    opens = torch.zeros(len(cuts), length, dtype=torch.long)
    for row, at in enumerate(cuts):
        opens[row, sorted(at)] = 1
    return opens.cumsum(dim=1)


def places(documents: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The row of each document, and a (T,) mask of its places."""
    for row, numbers in enumerate(documents):
        for number in numbers.unique():
            yield row, numbers == number


@pytest.mark.parametrize("name", SMALL)
@given(cuts=cuts_of_two_rows, seed=st.integers(0, 99))
@few
def test_a_packed_document_has_the_logits_that_it_has_alone(
    name: str, cuts: list[set[int]], seed: int
) -> None:
    model, documents = small_model(name, context_length=16), numbered(cuts)
    tokens = some_tokens(2, 16, vocab=50, seed=seed)
    with torch.no_grad():
        packed = model(tokens, documents=documents)
        for row, there in places(documents):
            alone = model(tokens[row : row + 1, there])[0]
            torch.testing.assert_close(packed[row, there], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_packed_documents_have_the_gradients_that_they_have_alone(name: str) -> None:
    model, documents = small_model(name, context_length=16), numbered([{0, 1, 6}, {9, 15}])
    tokens, targets = some_tokens(2, 32, vocab=50).split(16, dim=1)
    packed = model(tokens, targets, documents=documents)
    alone = sum(
        model(tokens[row : row + 1, there], targets[row : row + 1, there]) * int(there.sum())
        for row, there in places(documents)
    )
    parameters = list(model.parameters())
    found = torch.autograd.grad(packed * targets.numel(), parameters)
    expected = torch.autograd.grad(alone, parameters)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
@given(
    cuts=cuts_of_two_rows,
    changed=st.integers(0, 15),
    token=st.integers(0, 49),
    seed=st.integers(0, 99),
)
@few
def test_a_token_changes_only_its_own_document_from_there_on(
    name: str, cuts: list[set[int]], changed: int, token: int, seed: int
) -> None:
    model, documents = small_model(name, context_length=16), numbered(cuts)
    tokens = some_tokens(2, 16, vocab=50, seed=seed)
    other = tokens.clone()
    other[0, changed] = token
    with torch.no_grad():
        before, after = (model(row, documents=documents) for row in (tokens, other))
    seen = documents == documents[0, changed]
    seen[0, :changed] = False
    seen[1] = False
    assert torch.equal(after[~seen], before[~seen])
    if token != tokens[0, changed]:
        assert ((after - before)[seen].abs().amax(dim=-1) > 1e-4).all()


@pytest.mark.parametrize("name", SMALL)
@given(number=st.integers(0, 9), length=st.integers(1, 16), last_only=st.booleans())
@few
def test_one_document_everywhere_is_the_plain_causal_model(
    name: str, number: int, length: int, last_only: bool
) -> None:
    model = small_model(name, context_length=16)
    tokens = some_tokens(2, length, vocab=50)
    with torch.no_grad():
        plain = model(tokens, last_only=last_only)
        found = model(tokens, documents=torch.full_like(tokens, number), last_only=last_only)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_the_end_of_text_token_opens_a_document_at_position_0() -> None:
    tokens = torch.tensor([[5, 6, 0, 7, 7, 0, 0, 8], [0, 1, 1, 1, 1, 1, 1, 0]])
    positions = document_positions((tokens == 0).cumsum(dim=1))
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]
    assert document_positions(torch.tensor([[3]])).tolist() == [[0]]


@pytest.mark.parametrize("name", SMALL_GPTS)
@given(cuts=cuts_of_two_rows)
@settings(deadline=None, max_examples=5)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_logits_of_the_dense_mask(name: str, cuts: list[set[int]]) -> None:
    model, documents = small_model(name, context_length=16), numbered(cuts)
    tokens = some_tokens(2, 16, vocab=50)
    with torch.no_grad():
        model.flex = False
        dense = model(tokens, documents=documents)
        model.flex = True
        torch.testing.assert_close(model(tokens, documents=documents), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_skips_whole_blocks_of_other_documents() -> None:
    """Blocks are 128 long: one is skipped, one is whole, and the last is cut off by T."""
    documents = numbered([{128}, {100, 290}], length=300)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 300, 16, generator=random) for heads in (4, 2, 2))
    blocks, dense = document_mask(documents, flex=True), document_mask(documents, flex=False)
    assert isinstance(blocks, BlockMask) and isinstance(dense, Tensor)
    assert blocks.to_dense()[0, 0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    found, expected = (attend(q, k, v, mask, False, 0.0) for mask in (blocks, dense))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_flex_attention_is_for_cuda_without_dropout() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert has_flex_kernel(cuda, head_size=16, dropout=0.0)
    assert not has_flex_kernel(cuda, head_size=16, dropout=0.1)
    assert not has_flex_kernel(cuda, head_size=8, dropout=0.0)
    assert not has_flex_kernel(cpu, head_size=16, dropout=0.0)


def test_what_flex_attention_cannot_do_is_an_error_and_not_another_path() -> None:
    model = small_model("modern", dropout=0.5)
    tokens = some_tokens(2, 8, vocab=50)
    model.flex = True
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        model(tokens, documents=tokens * 0)
    model.train()
    with torch.no_grad(), pytest.raises(AssertionError, match="dropout"):
        model(tokens, documents=tokens * 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SMALL_GPTS)
@pytest.mark.parametrize("length", [100, 300])
def test_flex_attention_on_a_gpu_equals_the_dense_mask_in_loss_and_gradients(
    name: str, length: int
) -> None:
    model = small_model(name, context_length=300, n_embd=64).cuda()
    documents = numbered([{0, 7, 60}, {99}], length).cuda()
    tokens, targets = some_tokens(2, 2 * length, vocab=50).cuda().split(length, dim=1)
    found = []
    for flex in (None, False):
        model.flex = flex
        loss = model(tokens, targets, documents=documents)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["modern-gqa", "lstm"])
def test_documents_train_with_dropout(name: str) -> None:
    model = small_model(name, dropout=0.5).train()
    tokens = some_tokens(2, 8, vocab=50)
    documents = numbered([{2}, {4}], length=8)
    torch.manual_seed(0)
    first, second = (model(tokens, tokens, documents=documents) for _ in range(2))
    assert first != second
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["modern", "lstm"])
def test_documents_go_neither_with_a_cache_nor_with_other_tokens(name: str) -> None:
    model = small_model(name)
    tokens = some_tokens(2, 8, vocab=50)
    cache = model.new_cache(2, 8)
    with pytest.raises(AssertionError, match="cache"):
        model(tokens, documents=tokens * 0, cache=cache)
    with pytest.raises(AssertionError, match=r"for torch\.Size"):
        model(tokens, documents=tokens[:1] * 0)
