"""The head's loss in chunks, the vocabulary's padding, and recomputation, each against the plain
form."""

import contextlib
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manta.config import from_dict
from manta.model import loss as losses
from manta.model.families import num_parameters
from manta.model.generate import Sampling, generate
from manta.model.gpt import GPT, ModelConfig
from manta.model.loss import IGNORED, Head
from manta.model.traffic import loss_traffic

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


@few
@example(count=21, vocab_size=195, chunk=1, ignored=0.0, bf16=True)
@given(
    count=st.integers(1, 40),
    vocab_size=st.integers(2, 200),
    chunk=st.integers(1, 50),
    ignored=st.floats(0, 1),
    bf16=st.booleans(),
)
def test_the_loss_of_each_target_has_the_gradient_of_cross_entropy(
    count: int, vocab_size: int, chunk: int, ignored: float, bf16: bool
) -> None:
    torch.manual_seed(count)
    head = Head(8, vocab_size, -(-vocab_size // 128) * 128)
    x = torch.randn(count, 8, requires_grad=True)
    targets = torch.randint(vocab_size, (count,)).masked_fill(torch.rand(count) < ignored, IGNORED)
    factors = torch.randn(count)
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with pytest.MonkeyPatch.context() as patch, context:
        patch.setattr(losses, "CPU_CHUNK", chunk)
        each = head(x, targets, "none")
        with torch.no_grad():
            assert torch.equal(each, head(x, targets, "none"))
        (factors * each).sum().backward()
    found = [each, x.grad, head.weight.grad]
    again, weight = x.detach().requires_grad_(), head.weight[:vocab_size].detach().requires_grad_()
    nats = F.cross_entropy(again @ weight.T, targets, ignore_index=IGNORED, reduction="none")
    (factors * nats).sum().backward()
    assert weight.grad is not None
    padding = torch.zeros(len(head.weight) - vocab_size, 8)
    expected = [nats, again.grad, torch.cat([weight.grad, padding])]
    # In bf16 each chunk's share of the weight's gradient is rounded: the errors of many add up.
    most = 0.05 * max(1.0, math.sqrt(count) / 2) if bf16 else 1e-5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and ours.dtype == torch.float32
        assert torch.allclose(ours, theirs, rtol=0, atol=most)


def test_nothing_of_the_size_of_the_logits_is_kept_for_the_loss_of_each_target() -> None:
    head, kept = Head(8, 500, 512), list[int]()
    x, targets = torch.randn(64, 8, requires_grad=True), torch.randint(500, (64,))

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head(x, targets, "none").sum().backward()
    assert kept and max(kept) <= head.weight.numel() < 64 * 500


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


@few
@given(
    count=st.integers(1, 30),
    vocab_size=st.integers(2, 200),
    ignored=st.floats(0, 1),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
    bf16=st.booleans(),
)
def test_both_forms_of_a_chunks_loss_are_one_formula(
    count: int, vocab_size: int, ignored: float, scale: float, bf16: bool
) -> None:
    """The plain form and the one for compilation, against torch's own loss in double precision."""
    torch.manual_seed(count)
    dtype = torch.bfloat16 if bf16 else torch.float32
    logits = (scale * torch.randn(count, -(-vocab_size // 128) * 128)).to(dtype)
    targets = torch.randint(vocab_size, (count,)).masked_fill(torch.rand(count) < ignored, IGNORED)
    exact = logits[:, :vocab_size].double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=IGNORED, reduction="sum")
    expected.backward()
    assert exact.grad is not None
    gradient = F.pad(exact.grad, (0, logits.size(1) - vocab_size))
    tolerance = {"rtol": 1e-2, "atol": 4e-3} if bf16 else {"rtol": 1e-5, "atol": 1e-5}
    for form in (losses.plain_loss, losses.fused_loss):
        nats, found = form(logits.clone(), targets, vocab_size)
        assert nats.dtype == torch.float32 and found.dtype == dtype
        torch.testing.assert_close(nats.double(), expected.detach(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.double(), gradient, **tolerance)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_compiled_loss_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    monkeypatch.setattr(losses, "CPU_CHUNK", 16)  # two whole chunks, and a shorter one
    torch.manual_seed(0)
    head = Head(8, 200, 256)
    targets = torch.randint(200, (40,))
    targets[::7] = IGNORED
    found = []
    for compiled in (False, True):
        head.compiled, head.weight.grad = compiled, None
        x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, each = head(x, targets), head(x, targets, "none")
        (loss + (torch.linspace(-1, 1, 40) * each).sum()).backward()
        found.append((loss, each, x.grad, head.weight.grad))
    tolerance = {"rtol": 1e-2, "atol": 1e-4} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled, **tolerance)


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write: each operand once and each result once. (Matrix
    products are left out, and lookups and scatters, which touch one value per token.)"""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if op.is_view or name in ("mm", "addmm_", "empty_like", "detach"):
            return result
        if name in ("gather", "scatter_", "fill_"):  # a value for each token, or the padding
            return result
        tensors = [t for t in (*tree_leaves(args), result) if isinstance(t, Tensor)]
        self.moved += sum(t.numel() * t.element_size() for t in tensors)
        return result


@pytest.mark.parametrize("bf16", [False, True])
def test_the_traffic_of_the_loss_is_what_is_counted_by_hand(
    monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    monkeypatch.setattr(losses, "CPU_CHUNK", 64)
    tokens, channels, vocab = 192, 8, 1024
    head = Head(channels, vocab, vocab)
    x = torch.randn(tokens, channels, requires_grad=True)
    with Traffic() as traffic, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        head(x, torch.randint(vocab, (tokens,)))
    sizes = (tokens, channels, vocab, 64, 2 if bf16 else 4, "cpu")
    by_hand = loss_traffic(*sizes, compiled=False)
    assert traffic.moved == pytest.approx(by_hand, rel=0.02)
    assert loss_traffic(*sizes, compiled=True) < (0.3 if bf16 else 0.8) * by_hand


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
            list(generate(model, [1, 2], 30, sampling=Sampling(temperature=temperature)))
            for model in (padded, plain)
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
    """The bytes that the backward pass holds: each mode holds less than the one before."""
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
            # (A compilation leaves placeholder tensors behind that hold nothing.)
            with contextlib.suppress(NotImplementedError, RuntimeError):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_a_config_survives_json() -> None:
    c = model_of("modern", depth=3).config
    assert from_dict(ModelConfig, json.loads(json.dumps(dataclasses.asdict(c)))) == c
