"""The head's loss in chunks, the vocabulary's padding, and what is computed anew: each against the
plain form."""

import contextlib
import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manta.config import from_dict
from manta.model import loss as losses
from manta.model.generate import generate
from manta.model.gpt import GPT, ModelConfig, num_parameters
from manta.model.loss import IGNORED, Head

few = settings(deadline=None, max_examples=30)
FAMILIES = {
    "gpt2": {"family": "gpt2"},
    "modern": {"qk_norm": True, "n_kv_head": 2, "tie_embeddings": False},
}


def model_of(family: str, vocab_size: int = 50, **keys: Any) -> GPT:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 16}
    return GPT(from_dict(ModelConfig, shape | FAMILIES[family] | {"vocab_size": vocab_size} | keys))


def batch_of(vocab_size: int, rows: int = 3, length: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(vocab_size, (rows, length + 1))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(found) == len(list(module.parameters()))
    return found


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CPU_CHUNK", 7)


@few
@given(
    count=st.integers(1, 40),
    vocab_size=st.integers(2, 200),
    chunk=st.integers(1, 50),
    ignored=st.floats(0, 1),
    bf16=st.booleans(),
)
def test_the_loss_in_chunks_is_cross_entropy_with_its_gradient(
    count: int, vocab_size: int, chunk: int, ignored: float, bf16: bool
) -> None:
    torch.manual_seed(count)
    head = Head(8, vocab_size, -(-vocab_size // 128) * 128)
    x = torch.randn(count, 8, requires_grad=True)
    targets = torch.randint(vocab_size, (count,)).masked_fill(torch.rand(count) < ignored, IGNORED)
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with pytest.MonkeyPatch.context() as patch, context:
        patch.setattr(losses, "CPU_CHUNK", chunk)
        loss = head(x, targets)
        with torch.no_grad():
            mean, each = head(x, targets), head(x, targets, "none")
    (3 * loss).backward()
    assert head.weight.grad is not None and x.grad is not None
    found = [loss, x.grad, head.weight.grad]
    assert all(t.dtype == torch.float32 for t in (*found, each))

    weight = head.weight.detach()[:vocab_size].clone().requires_grad_()
    again = x.detach().clone().requires_grad_()
    nats = F.cross_entropy(again @ weight.T, targets, ignore_index=IGNORED, reduction="none")
    plain = nats.sum() / max(1, int((targets != IGNORED).sum()))
    (3 * plain).backward()
    assert again.grad is not None and weight.grad is not None
    tolerance = {"rtol": 0.05, "atol": 0.05} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss, plain, **tolerance)
    torch.testing.assert_close(mean, loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(each, nats.detach(), **tolerance)
    torch.testing.assert_close(x.grad, again.grad, **tolerance)
    torch.testing.assert_close(head.weight.grad[:vocab_size], weight.grad, **tolerance)
    assert not head.weight.grad[vocab_size:].any()


def test_the_loss_in_chunks_equals_torchs_own() -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    head = Head(16, 256, 256)
    x, targets = torch.randn(30, 16), torch.randint(256, (30,))
    torch.testing.assert_close(head(x, targets), F.linear_cross_entropy(x, head.weight, targets))


def test_a_logit_that_is_not_a_number_is_seen_unless_its_target_is_ignored() -> None:
    head = Head(8, 20, 128)
    x, targets = torch.randn(4, 8), torch.tensor([1, 2, 3, IGNORED])
    x[3] = torch.nan
    x.requires_grad_()
    loss = head(x, targets)
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()
    assert head(x.detach(), torch.tensor([1, 2, 3, 4])).isnan()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_padding_of_the_vocabulary_is_invisible(
    family: str, tie_embeddings: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = model_of(family, vocab_size=50, tie_embeddings=tie_embeddings)
    assert padded.embedding.weight.shape == padded.head.weight.shape == (128, 32)
    weights = padded.state_dict()
    assert weights["embedding.weight"].shape == weights["head.weight"].shape == (50, 32)

    monkeypatch.setattr("manta.model.shape.VOCAB_TILE", 1)
    plain = model_of(family, vocab_size=50, tie_embeddings=tie_embeddings)
    assert plain.head.weight.shape == (50, 32)
    plain.load_state_dict(weights)
    assert num_parameters(plain.config) == sum(p.numel() for p in plain.parameters())
    tokens, targets = batch_of(50)
    assert torch.equal(padded(tokens), plain(tokens))
    for model in (padded, plain):
        model(tokens, targets).backward()
    torch.testing.assert_close(padded(tokens, targets), plain(tokens, targets))
    for name, gradient in gradients(plain).items():
        whole = gradients(padded)[name]
        torch.testing.assert_close(whole[: len(gradient)], gradient)
        assert not whole[len(gradient) :].any()
    for temperature in (0.0, 5.0):
        drawn = [
            list(generate(model, [1, 2], 30, temperature=temperature)) for model in (padded, plain)
        ]
        assert drawn[0] == drawn[1] and max(drawn[0]) < 50
    monkeypatch.undo()
    again = model_of(family, vocab_size=50, tie_embeddings=tie_embeddings)
    again.load_state_dict(weights)
    assert torch.equal(again(tokens), plain(tokens))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_computing_activations_anew_changes_nothing(family: str, mode: Any, dropout: float) -> None:
    tokens, targets = batch_of(50)
    documents = (torch.arange(16) // 5).expand(3, 16)
    found = []
    for recompute in ("none", mode):
        for of in (None, documents):
            model = model_of(family, dropout=dropout)
            model.recompute = recompute
            torch.manual_seed(5)
            loss = model(tokens, targets, documents=of)
            loss.backward()
            found.append((loss, gradients(model)))
    for (loss, grads), (loss_anew, grads_anew) in zip(found[:2], found[2:], strict=True):
        assert torch.equal(loss, loss_anew)
        assert all(torch.equal(grads[name], grads_anew[name]) for name in grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_computing_activations_anew_keeps_less(family: str) -> None:
    """Bytes that the backward pass holds: each mode less than the one before."""
    tokens, targets = batch_of(50, rows=8)
    held = []
    for mode in ("none", "selective", "full"):
        model = model_of(family, n_layer=4)
        model.recompute = mode  # type: ignore[assignment]
        model(tokens, targets)  # what is made once
        before = allocated()
        loss = model(tokens, targets)
        held.append(allocated() - before)
        loss.backward()
    assert held[0] > 1.2 * held[1] > 1.44 * held[2]


def allocated() -> int:
    """Bytes of all tensors that are alive, as the autograd graph sees them."""
    import gc

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_a_config_survives_json() -> None:
    c = model_of("modern", depth=3).config
    assert from_dict(ModelConfig, json.loads(json.dumps(dataclasses.asdict(c)))) == c
