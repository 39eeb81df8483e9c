"""Generation: the tokens of a plain loop, one wait for the device per token, no cuDNN."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.models import SMALL, small_model
from manta.config import load
from manta.errors import ConfigError
from manta.evaluate.inference_settings import GenerateConfig, place_of
from manta.model.generate import Sampling, generate, generate_batch
from manta.model.gpt import LanguageModel
from manta.model.inference import inference
from manta.model.sampling import nucleus, pick

few = settings(deadline=None, max_examples=15)
temperatures = st.just(0.0) | st.floats(0.2, 3)
shares_of_one = st.just(1.0) | st.floats(0, 1, exclude_min=True)
has_gpu = torch.cuda.is_available()


# The same tokens as a plain loop


def plain_pick(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    random: torch.Generator,
    top_p: float = 1.0,
) -> int:
    """Picks one id from (V,) logits."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    shares = torch.softmax(logits.double() / temperature, dim=0)
    if top_p < 1:
        shares = plain_nucleus(shares, top_p)
    sums = shares.cumsum(0)
    drawn = torch.rand(1, generator=random, dtype=torch.float64) * sums[-1]
    below = sums[-1].nextafter(sums.new_zeros(()))
    return int(torch.searchsorted(sums, drawn.minimum(below), right=True))


def plain_nucleus(shares: Tensor, top_p: float) -> Tensor:
    """Takes the largest of (V,) shares, one after the other, until their sum is `top_p`."""
    found, total = torch.zeros_like(shares), 0.0
    for index in sorted(range(len(shares)), key=lambda i: -shares[i]):
        found[index] = shares[index]
        total += shares[index].item()
        if total >= top_p:
            break
    return found


@torch.no_grad()
def plain_generate(
    model: LanguageModel,
    prompt: list[int],
    count: int,
    seed: int,
    temperature: float,
    top_k: int | None,
) -> list[int]:
    """Generates one row without a cache, one number at a time."""
    length = model.window or len(prompt) + count
    random = torch.Generator().manual_seed(seed)
    window, found = prompt[-length:], []
    for _ in range(count):
        if len(window) > length:
            window = window[-max(1, length // 2) :]
        found.append(plain_pick(model(torch.tensor([window]))[0, -1], temperature, top_k, random))
        window = [*window, found[-1]]
    return found


@given(
    rows=st.lists(
        st.lists(st.floats(-4, 4) | st.sampled_from([-torch.inf, 1.0]), min_size=9, max_size=9),
        min_size=1,
        max_size=5,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    temperature=temperatures,
    top_k=st.none() | st.integers(1, 12),
    top_p=shares_of_one,
    seed=st.integers(0, 2**62),
)
@settings(deadline=None, max_examples=300)
def test_rows_are_drawn_at_once_as_each_is_alone(
    rows: list[list[float]],
    dtype: torch.dtype,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
) -> None:
    """Rows are equal to the bit, also with equal logits and with logits that are never drawn."""
    logits = torch.tensor([[*row, 0.0] for row in rows], dtype=dtype)
    randoms = [torch.Generator().manual_seed(seed + index) for index in range(len(rows))]
    numbers = torch.stack([torch.rand((), generator=r, dtype=torch.float64) for r in randoms])
    for index, random in enumerate(randoms):
        random.manual_seed(seed + index)
    expected = [
        plain_pick(row.float(), temperature, top_k, random, top_p)
        for row, random in zip(logits, randoms, strict=True)
    ]
    assert pick(logits, Sampling(temperature, top_k, top_p), numbers).tolist() == expected


@pytest.mark.parametrize("name", SMALL)
@given(
    prompts=st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=12), min_size=1, max_size=4),
    context_length=st.integers(1, 9),
    temperature=temperatures,
    top_k=st.none() | st.integers(1, 60),
    stop=st.none() | st.integers(0, 49),
    seed=st.integers(0, 2**60),
)
@few
def test_tokens_are_those_of_a_plain_loop_over_each_prompt(
    name: str,
    prompts: list[list[int]],
    context_length: int,
    temperature: float,
    top_k: int | None,
    stop: int | None,
    seed: int,
) -> None:
    model = small_model(name, context_length)
    seeds = [seed + index for index in range(len(prompts))]
    found: list[list[int]] = [[] for _ in prompts]
    sampling = Sampling(temperature, top_k)
    for new in generate_batch(model, prompts, 14, seeds=seeds, stop=stop, sampling=sampling):
        for row, token in new.items():
            found[row].append(token)
    for prompt, own, tokens in zip(prompts, seeds, found, strict=True):
        expected = plain_generate(model, prompt, 14, own, temperature, top_k)
        assert tokens == expected[: expected.index(stop)] if stop in expected else expected


def test_a_long_text_draws_the_numbers_of_its_seed_one_after_the_other() -> None:
    """The text needs more numbers than are drawn at once."""
    model = small_model("modern", context_length=5)
    expected = plain_generate(model, [3], 600, 7, temperature=1.0, top_k=None)
    assert list(generate(model, [3], 600, seed=7)) == expected


@settings(deadline=None, max_examples=20)
@given(
    logits=st.lists(st.floats(-4, 4) | st.just(float("-inf")), min_size=2, max_size=12),
    temperature=st.floats(0.3, 3),
    top_k=st.none() | st.integers(1, 12),
    top_p=shares_of_one,
    seed=st.integers(0, 99),
)
def test_tokens_are_drawn_as_often_as_the_softmax_says(
    logits: list[float], temperature: float, top_k: int | None, top_p: float, seed: int
) -> None:
    row = torch.tensor([1.0, *logits])
    wanted = row / temperature
    if top_k is not None and top_k < len(row):
        wanted = wanted.masked_fill(row < row.topk(top_k).values[-1], float("-inf"))
    share = wanted.double().softmax(0)
    if top_p < 1:
        share = plain_nucleus(share, top_p)
        share /= share.sum()
    random, draws = torch.Generator().manual_seed(seed), 2000
    numbers = torch.rand(draws, generator=random, dtype=torch.float64)
    found = torch.bincount(
        pick(row.expand(draws, -1), Sampling(temperature, top_k, top_p), numbers),
        minlength=len(row),
    )
    assert not found[share == 0].any()
    deviation = (draws * share * (1 - share)).sqrt()
    assert ((found - draws * share).abs() <= 6 * deviation + 2).all()


@few
@given(seed=st.integers(0, 2**32), top_p=st.floats(0.01, 0.999), size=st.integers(2, 300))
def test_the_nucleus_is_that_of_transformers(seed: int, top_p: float, size: int) -> None:
    from transformers import TopPLogitsWarper

    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, size, generator=random, dtype=torch.float64)
    theirs = TopPLogitsWarper(top_p)(torch.empty(4, 0), logits).isfinite()
    assert torch.equal(nucleus(logits.softmax(1), top_p) > 0, theirs)


@pytest.mark.parametrize("name", SMALL)
@given(
    known=st.integers(1, 50),
    sampling=st.builds(Sampling, temperatures, st.none() | st.integers(1, 60), shares_of_one),
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=5),
)
@few
def test_ids_that_the_tokenizer_lacks_are_never_chosen(
    name: str, known: int, sampling: Sampling, prompt: list[int]
) -> None:
    """The model is all but sure of such ids, as a model is that was trained on other data."""
    model = small_model(name)
    with torch.no_grad():
        model.head.weight[known:50] *= 50
    sampling = dataclasses.replace(sampling, vocab_size=known)
    for use_cache in (True, False):
        found = list(generate(model, prompt, 12, sampling=sampling, use_cache=use_cache))
        assert len(found) == 12 and max(found) < known


# Waits of the host for the device


# Everything that reads a tensor calls one of these functions or operators.
READING_FUNCTIONS = {"tolist", "cpu", "numpy"}
READING_OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}


class Reads(TorchFunctionMode):
    """Counts calls with which the host reads a tensor, and would wait for a GPU; also tensors made
    of the host's own numbers, which would have to be copied to the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.made = 0, 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.reads += getattr(function, "__name__", "") in READING_FUNCTIONS
        self.made += function in (torch.tensor, torch.as_tensor, torch.from_numpy)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Adds to the same count the operators that read a tensor."""

    def __init__(self, counts: Reads):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        by_booleans = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.counts.reads += name in READING_OPERATORS or by_booleans
        return function(*args, **(kwargs or {}))


def with_an_empty_weight(model: LanguageModel) -> LanguageModel:
    """Gives the model an empty weight, as ZeRO stage 3 does. Inference mode, in which not all reads
    can be counted, is then not used."""
    model.empty = torch.nn.Parameter(torch.empty(0))
    return model


@contextlib.contextmanager
def counted() -> Iterator[Reads]:
    reads = Reads()
    with reads, Operators(reads):
        yield reads


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: int(x[0]),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: torch.arange(5)[x[0] :],
    ],
)
def test_every_way_to_read_a_tensor_counts(read: Any) -> None:
    x = torch.tensor([1, 2, 3])
    with counted() as counts:
        read(x)
    assert counts.reads == 1


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0), Sampling(top_k=5), Sampling(top_p=0.5)],
    ids=str,
)
@pytest.mark.parametrize("prompts", [[[1]], [[1, 2], [3, 4]], [[1], [2, 3, 4], [5, 6]]], ids=str)
def test_the_host_reads_once_a_token_and_sends_nothing(
    name: str, sampling: Sampling, prompts: list[list[int]]
) -> None:
    model = with_an_empty_weight(small_model(name, context_length=64))
    made = []
    with counted() as counts:
        seeds = list(range(len(prompts)))
        batch = generate_batch(model, prompts, 20, seeds=seeds, sampling=sampling)
        for step, _ in enumerate(batch, 1):
            assert counts.reads == step
            made.append(counts.made)
    assert made == made[:1] * 20  # the prompts, before the first token


def test_the_host_reads_once_a_token_where_rows_end_and_a_context_is_full() -> None:
    torch.manual_seed(0)
    model = with_an_empty_weight(small_model("modern", context_length=4))
    prompts = [[1], [2, 3, 4], [5, 6], [7]]
    lengths = []
    with counted() as counts:
        batch = generate_batch(
            model, prompts, 60, seeds=[0, 1, 2, 3], sampling=Sampling(temperature=2), stop=9
        )
        for step, new in enumerate(batch, 1):
            assert counts.reads == step
            lengths.append(len(new))
    assert lengths.count(4) > 4 > lengths[-1]


@pytest.mark.skipif(not has_gpu, reason="needs a GPU")
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gpu_is_waited_for_once_a_token(name: str, dtype: str) -> None:
    """torch itself counts the calls that synchronise; and in fp32 the tokens are the CPU's."""
    model = small_model(name, context_length=64)
    prompts, found = [[1], [2, 3, 4], [5, 6]], []
    expected = list(generate_batch(model, prompts, 20, seeds=[0, 1, 2]))
    batch = generate_batch(model.cuda(), prompts, 20, seeds=[0, 1, 2])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for step in range(20):
            with (
                warnings.catch_warnings(record=True) as said,
                inference(torch.device("cuda"), dtype),
            ):
                warnings.simplefilter("always")
                found.append(next(batch))
            waits = [w for w in said if "synchronizing CUDA operation" in str(w.message)]
            assert len(waits) == 1 or step == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert dtype == "bf16" or found == expected


# The state while a token is made, and while the caller has it


@pytest.mark.parametrize("use_cache", [True, False])
def test_cudnn_attention_is_left_out_of_generation_and_of_nothing_else(use_cache: bool) -> None:
    model = small_model("modern")
    during = []
    model.blocks[0].register_forward_hook(
        lambda *_: during.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    assert torch.backends.cuda.cudnn_sdp_enabled()
    for _ in generate(model, [1], 3, use_cache=use_cache):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert during == [False] * 3
    with inference(torch.device("cpu"), "fp32"):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        next(generate(model, [1], 3))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_an_error_while_a_token_is_made_leaves_cudnn_as_it_was() -> None:
    model = small_model("modern")

    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    model.blocks[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        next(generate(model, [1], 3))
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_the_caller_may_train_between_two_tokens() -> None:
    model = small_model("modern-qk-norm")
    expected = list(generate(model, [1, 2], 4))
    found = []
    for token in generate(model, [1, 2], 4):
        found.append(token)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        tokens = torch.tensor([[1, 2, token]])
        model(tokens, tokens).backward()
    assert found == expected
    assert all(p.grad is not None for p in model.parameters())


# The device that a model runs on


def test_auto_is_the_gpu_where_there_is_one_and_bf16_only_there() -> None:
    device, dtype = place_of(load(GenerateConfig))
    assert device.type == ("cuda" if has_gpu else "cpu")
    assert has_gpu or dtype == "fp32"
    assert place_of(load(GenerateConfig, ["device=cpu"])) == (torch.device("cpu"), "fp32")
    assert place_of(load(GenerateConfig, ["device=cpu", "dtype=bf16"]))[1] == "bf16"


@pytest.mark.skipif(has_gpu, reason="has a GPU")
def test_a_gpu_that_torch_does_not_find_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"device=cuda.*set device=cpu"):
        place_of(load(GenerateConfig, ["device=cuda"]))


def test_inference_in_bf16_is_autocast_without_gradients_and_fp32_overrides_it() -> None:
    model, tokens = small_model("modern"), torch.tensor([[1, 2]])
    with inference(torch.device("cpu"), "bf16"):
        rounded = model(tokens)
        assert rounded.dtype == torch.bfloat16 and not rounded.requires_grad
        with inference(torch.device("cpu"), "fp32"):
            exact = model(tokens)
    assert torch.equal(exact, model(tokens)) and not torch.equal(exact, rounded.float())
