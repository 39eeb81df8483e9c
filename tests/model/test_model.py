"""The model against transformers' own models, and what generation, loss and presets promise."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from manta.config import from_dict
from manta.errors import ConfigError
from manta.model.attention import attend, document_mask, document_positions, has_flex_kernel
from manta.model.cost import flops_per_token
from manta.model.generate import generate, generate_batch
from manta.model.gpt import GPT, IGNORED, KVCache, ModelConfig, num_parameters
from manta.model.presets import PRESETS

R50K_SIZE = 50257
VOCAB = 97
few = settings(deadline=None, max_examples=15)

# One of each kind of attention and position; small, so that a context is soon full.
SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "modern": {"family": "modern"},
    "modern-gqa": {"n_kv_head": 2, "tie_embeddings": False},
    "modern-qk-norm": {"n_kv_head": 1, "qk_norm": True},
}


def config_of(**keys: Any) -> ModelConfig:
    return from_dict(ModelConfig, keys)


def tiny_config(**keys: Any) -> ModelConfig:
    """Two layers, 64 wide, four heads: the shape that the Hugging Face models get, too."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 32, "vocab_size": VOCAB}
    return config_of(**{**shape, **keys})


def small_model(name: str, context_length: int = 8, **keys: Any) -> GPT:
    shape = {"n_embd": 32, "context_length": context_length, "vocab_size": 50, **SMALL[name]}
    model = GPT(tiny_config(**{**shape, **keys}))
    return scramble(model, seed=1).eval()


def scramble(model: Any, seed: int) -> Any:
    """Random numbers on every parameter, biases and norms too: at their first values, 0 and 1,
    these would hide a mistake."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=random)
    return model


def some_tokens(batch: int, length: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, length), generator=random)


# Parity with transformers


def gpt2_weights(theirs: Any) -> dict[str, Tensor]:
    """A GPT2LMHeadModel's weights under our names."""
    state = theirs.state_dict()
    found = {
        "embedding.weight": state["transformer.wte.weight"],
        "positions.weight": state["transformer.wpe.weight"],
        "norm.weight": state["transformer.ln_f.weight"],
        "norm.bias": state["transformer.ln_f.bias"],
        "head.weight": state["lm_head.weight"],
    }
    for layer in range(theirs.config.n_layer):
        for ours, name, is_conv1d in (
            ("attention_norm", "ln_1", False),
            ("attention.qkv", "attn.c_attn", True),
            ("attention.out", "attn.c_proj", True),
            ("mlp_norm", "ln_2", False),
            ("mlp.up", "mlp.c_fc", True),
            ("mlp.down", "mlp.c_proj", True),
        ):
            weight = state[f"transformer.h.{layer}.{name}.weight"]
            # GPT-2's Conv1D holds (in, out), nn.Linear (out, in).
            found[f"blocks.{layer}.{ours}.weight"] = weight.T if is_conv1d else weight
            found[f"blocks.{layer}.{ours}.bias"] = state[f"transformer.h.{layer}.{name}.bias"]
    return found


def llama_weights(theirs: Any) -> dict[str, Tensor]:
    """A LlamaForCausalLM's or Qwen3ForCausalLM's weights under our names."""
    state = theirs.state_dict()
    found = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    for layer in range(theirs.config.num_hidden_layers):
        block, attention = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
        # Ours is one matrix: all queries, then all keys, then all values.
        found[f"blocks.{layer}.attention.qkv.weight"] = torch.cat(
            [state[f"{attention}.{part}_proj.weight"] for part in ("q", "k", "v")]
        )
        for ours, name in (
            ("attention_norm", f"{block}.input_layernorm"),
            ("attention.out", f"{attention}.o_proj"),
            ("attention.q_norm", f"{attention}.q_norm"),
            ("attention.k_norm", f"{attention}.k_norm"),
            ("mlp_norm", f"{block}.post_attention_layernorm"),
            ("mlp.gate", f"{block}.mlp.gate_proj"),
            ("mlp.up", f"{block}.mlp.up_proj"),
            ("mlp.down", f"{block}.mlp.down_proj"),
        ):
            if f"{name}.weight" in state:
                found[f"blocks.{layer}.{ours}.weight"] = state[f"{name}.weight"]
    return found


def with_weights(c: ModelConfig, weights: dict[str, Tensor]) -> GPT:
    """A model of ours with these weights, all of them used; biases that it lacks must be 0."""
    model = GPT(c).eval()
    lacking = weights.keys() - model.state_dict().keys()
    for name in lacking:
        assert name.endswith(".bias") and not weights[name].any(), name
    model.load_state_dict({k: v for k, v in weights.items() if k not in lacking}, strict=True)
    return model


def assert_same_logits(ours: GPT, theirs: Any) -> None:
    tokens = some_tokens(3, ours.config.context_length)
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        found = ours(tokens)
    assert expected.std() > 0.5, "logits near 0 would agree by themselves"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("keys", "zeroed"),
    [
        ({}, ()),
        ({"qkv_bias": False}, ("attn.c_attn.bias",)),
        ({"bias": False}, (".bias",)),
        ({"bias": False, "qkv_bias": True}, ("proj.bias", "c_fc.bias", "ln_1.bias", "ln_2.bias")),
        ({"tie_embeddings": False}, ()),
        ({"mlp_hidden": 96, "norm_eps": 0.1}, ()),
    ],
    ids=str,
)
def test_gpt2_family_equals_transformers_gpt2(
    keys: dict[str, Any], zeroed: tuple[str, ...]
) -> None:
    """GPT2LMHeadModel always has biases: where ours has none, its are 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = tiny_config(family="gpt2", **keys)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=c.context_length,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_inner=c.hidden,
            layer_norm_epsilon=c.norm_eps,
            tie_word_embeddings=c.tie_embeddings,
        )
    )
    scramble(theirs, seed=0)
    if not c.has_bias:
        zeroed = (*zeroed, "ln_f.bias")
    for name, parameter in theirs.named_parameters():
        if name.endswith(zeroed):
            parameter.data.zero_()
    assert_same_logits(with_weights(c, gpt2_weights(theirs)), theirs)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"n_kv_head": 2},
        {"n_kv_head": 1, "tie_embeddings": False},
        {"tie_embeddings": False, "mlp_hidden": 80},
        {"rope_theta": 500.0, "norm_eps": 0.1},
        {"qk_norm": True},
        {"qk_norm": True, "n_kv_head": 2, "tie_embeddings": False, "norm_eps": 0.1},
    ],
    ids=str,
)
def test_modern_family_equals_transformers_llama_and_with_qk_norm_qwen3(
    keys: dict[str, Any],
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    c = tiny_config(family="modern", **keys)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": c.n_embd,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "max_position_embeddings": c.context_length,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
    }
    theirs: Any = (
        Qwen3ForCausalLM(Qwen3Config(**shape))
        if c.qk_norm
        else LlamaForCausalLM(LlamaConfig(**shape))
    )
    scramble(theirs, seed=0)
    assert_same_logits(with_weights(c, llama_weights(theirs)), theirs)


# Presets and cost


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-163m", 163_009_536),
        ("gpt2-350m", 354_823_168),
        ("lf-269m", 269_600_768),
        ("casa-350m", 350_357_504),
        ("gpt2-1.5b", 1_557_611_200),
    ],
)
def test_presets_have_their_published_parameter_counts(preset: str, count: int) -> None:
    assert num_parameters(config_of(preset=preset, vocab_size=R50K_SIZE)) == count


def test_quickstart_has_4_million_parameters_with_its_own_vocabulary() -> None:
    # The MLP's width is 8/3 of 256, rounded up to a multiple of 64: 704.
    layer = 4 * 256 * 256 + 3 * 256 * 704 + 2 * 256
    count = num_parameters(config_of(preset="quickstart", vocab_size=4096))
    assert count == 4096 * 256 + 4 * layer + 256
    assert 3e6 < count < 6e6


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_transformers_counts_the_same_parameters(preset: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    c = config_of(preset=preset, vocab_size=R50K_SIZE)
    with torch.device("meta"):
        theirs: Any
        if c.family == "gpt2":
            theirs = GPT2LMHeadModel(
                GPT2Config(
                    n_positions=c.context_length,
                    n_embd=c.n_embd,
                    n_layer=c.n_layer,
                    n_head=c.n_head,
                    tie_word_embeddings=c.tie_embeddings,
                )
            )
        else:
            theirs = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=R50K_SIZE,
                    hidden_size=c.n_embd,
                    intermediate_size=c.hidden,
                    num_hidden_layers=c.n_layer,
                    num_attention_heads=c.n_head,
                    tie_word_embeddings=c.tie_embeddings,
                )
            )
    # transformers' GPT-2 cannot leave out the biases on query, key and value.
    lacking = 0 if c.family == "modern" or c.has_qkv_bias else 3 * c.n_embd * c.n_layer
    assert num_parameters(c) == theirs.num_parameters() - lacking


@pytest.mark.parametrize("name", SMALL)
def test_counted_parameters_are_those_of_the_model(name: str) -> None:
    model = small_model(name)
    weights = {weight.data_ptr(): weight.numel() for weight in model.state_dict().values()}
    assert num_parameters(model.config) == sum(weights.values())


def test_flops_of_gpt2_124m_equal_the_hand_calculation() -> None:
    # A layer: 12 C^2 in matrices, 13 C in biases and norms; then the last norm and the head,
    # which is the embedding. The position table does not multiply.
    n = 12 * (12 * 768 * 768 + 13 * 768) + 2 * 768 + 50257 * 768
    assert n == 124_439_808 - 1024 * 768
    expected = 6 * n + 12 * 12 * 768 * 1024
    assert expected == 855_166_464
    assert flops_per_token(config_of(preset="gpt2-124m", vocab_size=R50K_SIZE), 1024) == expected


def test_flops_do_not_count_an_embedding_that_is_only_looked_up() -> None:
    gpt2 = config_of(preset="gpt2-163m", vocab_size=R50K_SIZE)
    n = 163_009_536 - 1024 * 768 - 50257 * 768
    assert flops_per_token(gpt2, 256) == 6 * n + 12 * 12 * 768 * 256
    tied, untied = (
        config_of(preset="lf-269m", vocab_size=R50K_SIZE, tie_embeddings=tie)
        for tie in (True, False)
    )
    assert flops_per_token(tied, 2048) == flops_per_token(untied, 2048)


# Cache and generation


@pytest.mark.parametrize("name", SMALL)
@given(data=st.data())
@few
def test_cached_logits_equal_the_full_forward_in_any_chunks(name: str, data: st.DataObject) -> None:
    model = small_model(name, context_length=16)
    length = data.draw(st.integers(1, 16))
    tokens = some_tokens(2, length, vocab=50, seed=data.draw(st.integers(0, 99)))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())))
    cache = KVCache(model.config, 2, 16, torch.device("cpu"))
    with torch.no_grad():
        expected = model(tokens)
        chunks = [
            model(tokens[:, a:b], cache=cache)
            for a, b in zip([0, *cuts], [*cuts, length], strict=True)
        ]
    assert cache.lengths == [length, length]
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_last_only_gives_the_last_of_all_logits(name: str) -> None:
    model = small_model(name)
    tokens = some_tokens(3, 8, vocab=50)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, last_only=True), model(tokens)[:, -1:])


@pytest.mark.parametrize("name", SMALL)
@given(
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=20),
    context_length=st.integers(2, 9),
    temperature=st.just(0.0) | st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, 60),
    seed=st.integers(0, 2**32),
)
@few
def test_generation_with_cache_equals_generation_without(
    name: str,
    prompt: list[int],
    context_length: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> None:
    """The prompt may be longer than the context, and 20 new tokens overflow it several times."""
    model = small_model(name, context_length)
    cached, uncached = (
        list(
            generate(
                model,
                prompt,
                20,
                temperature=temperature,
                top_k=top_k,
                seed=seed,
                use_cache=use_cache,
            )
        )
        for use_cache in (True, False)
    )
    assert cached == uncached
    assert len(cached) == 20


def test_generation_reads_only_the_context_and_after_overflow_only_its_newer_half() -> None:
    model = small_model("modern", context_length=8)
    prompt = some_tokens(1, 20, vocab=50)[0].tolist()
    # The 8 last tokens of the prompt fill the context: the second token sees the 4 last.
    first, second = generate(model, prompt, 2, temperature=0)
    with torch.no_grad():
        assert model(torch.tensor([prompt[-8:]]))[0, -1].argmax() == first
        assert model(torch.tensor([[*prompt[-3:], first]]))[0, -1].argmax() == second


def test_a_seed_gives_the_same_text_again_and_another_seed_another() -> None:
    model = small_model("modern")
    same = [list(generate(model, [1, 2], 30, seed=7)) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != list(generate(model, [1, 2], 30, seed=8))


def test_temperature_0_and_top_1_take_the_likeliest_token_whatever_the_seed() -> None:
    model = small_model("gpt2")
    greedy = list(generate(model, [3], 30, temperature=0, seed=1))
    assert greedy == list(generate(model, [3], 30, temperature=0, seed=2))
    assert greedy == list(generate(model, [3], 30, temperature=1.5, top_k=1, seed=3))


def test_top_k_draws_only_from_the_k_likeliest_tokens() -> None:
    model = small_model("modern")
    with torch.no_grad():
        likeliest = set(model(torch.tensor([[5, 6]]))[0, -1].topk(3).indices.tolist())
    drawn = {next(generate(model, [5, 6], 1, temperature=5, top_k=3, seed=s)) for s in range(60)}
    assert drawn == likeliest


@pytest.mark.parametrize("name", SMALL)
@given(
    prompts=st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=12), min_size=1, max_size=5),
    context_length=st.integers(1, 9),
    temperature=st.just(0.0) | st.floats(0.2, 3),
    stop=st.none() | st.integers(0, 49),
    use_cache=st.booleans(),
)
@few
def test_each_prompt_of_a_batch_gets_what_it_gets_alone(
    name: str,
    prompts: list[list[int]],
    context_length: int,
    temperature: float,
    stop: int | None,
    use_cache: bool,
) -> None:
    model = small_model(name, context_length=context_length)
    seeds = list(range(len(prompts)))
    found: list[list[int]] = [[] for _ in prompts]
    batch = generate_batch(
        model, prompts, 14, seeds=seeds, temperature=temperature, stop=stop, use_cache=use_cache
    )
    for new in batch:
        for i, token in new.items():
            found[i].append(token)
    for prompt, seed, tokens in zip(prompts, seeds, found, strict=True):
        alone = generate(model, prompt, 14, seed=seed, temperature=temperature, stop=stop)
        assert tokens == list(alone)


def test_what_memory_held_before_reaches_no_row() -> None:
    model = small_model("modern")
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # and so torch.empty is filled with NaN
    try:
        batch = generate_batch(model, [[1], [2, 3, 4, 5], [6, 7]], 8, seeds=[0, 1, 2])
        assert [len(new) for new in batch] == [3] * 8
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_ends_before_the_stop_token(use_cache: bool) -> None:
    model = small_model("modern")
    whole = list(generate(model, [1], 30, seed=5, use_cache=use_cache))
    stop = whole[10]
    stopped = list(generate(model, [1], 30, seed=5, stop=stop, use_cache=use_cache))
    assert stopped == whole[: whole.index(stop)]
    unused = next(t for t in range(50) if t not in whole)
    assert list(generate(model, [1], 30, seed=5, stop=unused, use_cache=use_cache)) == whole


def test_generation_uses_no_dropout_and_leaves_the_model_training() -> None:
    model = small_model("gpt2", dropout=0.5)
    expected = list(generate(model, [1], 20, temperature=0))
    assert not model.training
    model.train()
    assert list(generate(model, [1], 20, temperature=0)) == expected
    assert model.training


# Loss and causality


@pytest.mark.parametrize("name", ["gpt2", "modern-gqa"])
@given(kept=st.lists(st.booleans(), min_size=14, max_size=14).filter(any), seed=st.integers(0, 99))
@few
def test_loss_counts_exactly_the_targets_that_are_not_ignored(
    name: str, kept: list[bool], seed: int
) -> None:
    model = small_model(name)
    tokens, labels = some_tokens(2, 14, vocab=50, seed=seed).split(7, dim=1)
    mask = torch.tensor(kept).view(2, 7)
    targets = labels.masked_fill(~mask, IGNORED)
    with torch.no_grad():
        log_probabilities = model(tokens).log_softmax(dim=-1)
        mean, each = model(tokens, targets), model(tokens, targets, reduction="none")
    by_hand = -log_probabilities.gather(2, labels.unsqueeze(2)).squeeze(2) * mask
    torch.testing.assert_close(each, by_hand)
    torch.testing.assert_close(mean, by_hand.sum() / mask.sum())
    torch.testing.assert_close(each.sum(), mean * mask.sum())
    assert (each[~mask] == 0).all()


@pytest.mark.parametrize("name", ["gpt2", "modern-gqa"])
@given(kept=st.lists(st.booleans(), min_size=14, max_size=14).filter(any), seed=st.integers(0, 99))
@few
def test_the_mean_loss_and_its_gradients_are_those_of_pytorch(
    name: str, kept: list[bool], seed: int
) -> None:
    model = small_model(name)
    tokens, targets = some_tokens(2, 14, vocab=50, seed=seed).split(7, dim=1)
    targets = targets.masked_fill(~torch.tensor(kept).view(2, 7), IGNORED)
    loss = model(tokens, targets)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    found, theirs = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for gradient, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def test_the_loss_of_no_targets_is_0_with_gradients_of_0() -> None:
    model = small_model("modern")
    tokens = some_tokens(2, 8, vocab=50)
    loss = model(tokens, torch.full_like(tokens, IGNORED))
    assert loss == 0
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), key


def test_a_broken_model_still_says_nan() -> None:
    model = small_model("modern")
    tokens = some_tokens(2, 8, vocab=50)
    targets = tokens.clone()
    targets[:, 1:] = IGNORED
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
        assert model(tokens, targets).isnan()


@pytest.mark.parametrize("name", SMALL)
@given(changed=st.integers(0, 7), token=st.integers(0, 49), seed=st.integers(0, 99))
@few
def test_a_token_changes_no_logits_before_it(
    name: str, changed: int, token: int, seed: int
) -> None:
    model = small_model(name)
    tokens = some_tokens(1, 8, vocab=50, seed=seed)
    other = tokens.clone()
    other[0, changed] = token
    with torch.no_grad():
        before, after = model(tokens), model(other)
    torch.testing.assert_close(after[:, :changed], before[:, :changed], atol=1e-5, rtol=1e-5)
    if token != tokens[0, changed]:
        difference = (after - before)[0, changed:].abs().amax(dim=-1)
        assert (difference > 1e-4).all(), "all from there on see it"


@pytest.mark.parametrize("name", SMALL)
def test_a_new_model_predicts_nearly_uniformly(name: str) -> None:
    torch.manual_seed(0)
    model = GPT(tiny_config(**SMALL[name]))
    tokens, targets = some_tokens(8, 64).split(32, dim=1)
    uniform = torch.tensor(float(VOCAB)).log()
    torch.testing.assert_close(model(tokens, targets), uniform, atol=0.2, rtol=0)


def test_dropout_acts_in_training_only() -> None:
    model = small_model("gpt2", dropout=0.5)
    tokens = some_tokens(1, 8, vocab=50)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), model(tokens))
        model.train()
        assert not torch.allclose(model(tokens), model(tokens))


def test_every_parameter_gets_a_gradient() -> None:
    for name in SMALL:
        model = small_model(name)
        tokens, targets = some_tokens(2, 16, vocab=50).split(8, dim=1)
        F.relu(model(tokens, targets)).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (name, key)


# Documents: several in one row, each as if alone


cuts_of_two_rows = st.lists(st.sets(st.integers(0, 15), max_size=6), min_size=2, max_size=2)


def numbered(cuts: list[set[int]], length: int = 16) -> Tensor:
    """(B, length) document numbers: in each row a new document begins at each of its cuts."""
    opens = torch.zeros(len(cuts), length, dtype=torch.long)
    for row, at in enumerate(cuts):
        opens[row, sorted(at)] = 1
    return opens.cumsum(dim=1)


def places(documents: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each document: its row, and a (T,) mask of where it is."""
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


@pytest.mark.parametrize("name", SMALL)
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
@pytest.mark.parametrize("name", SMALL)
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


def test_documents_train_with_dropout() -> None:
    model = small_model("modern-gqa", dropout=0.5).train()
    tokens = some_tokens(2, 8, vocab=50)
    documents = numbered([{2}, {4}], length=8)
    torch.manual_seed(0)
    first, second = (model(tokens, tokens, documents=documents) for _ in range(2))
    assert first != second
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_documents_go_neither_with_a_cache_nor_with_other_tokens() -> None:
    model = small_model("modern")
    tokens = some_tokens(2, 8, vocab=50)
    cache = KVCache(model.config, 2, 8, torch.device("cpu"))
    with pytest.raises(AssertionError, match="cache"):
        model(tokens, documents=tokens * 0, cache=cache)
    with pytest.raises(AssertionError, match=r"for torch\.Size"):
        model(tokens, documents=tokens[:1] * 0)


# Configs


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"n_embd": 100, "n_head": 3}, "n_embd=100 does not divide by n_head=3"),
        ({"n_embd": 12, "n_head": 4}, "RoPE needs an even head size"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head=4 does not divide by n_kv_head=3"),
        ({"n_head": 4, "n_kv_head": 8}, "n_head=4 does not divide by n_kv_head=8"),
        ({"bias": True}, "bias=true is for family=gpt2"),
        ({"qkv_bias": True}, "qkv_bias=true is for family=gpt2"),
        ({"family": "gpt2", "qk_norm": True}, "qk_norm and n_kv_head are for family=modern"),
        ({"family": "gpt2", "n_kv_head": 2}, "qk_norm and n_kv_head are for family=modern"),
        ({"family": "llama"}, "family='llama'"),
        ({"preset": "gpt2-125m"}, "did you mean gpt2-124m"),
        ({"n_layers": 4}, "did you mean n_layer"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"n_head": True}, "n_head=True"),
        ({"context_length": "long"}, "context_length='long'"),
        ({"dropout": 1.5}, "dropout=1.5"),
    ],
    ids=str,
)
def test_a_wrong_shape_is_refused_by_name(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(**keys)
    assert said in str(refused.value)


def test_all_problems_of_a_shape_are_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*n_embd=100.*n_kv_head=2.*bias=true"):
        config_of(n_embd=100, n_head=3, n_kv_head=2, bias=True)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_keys_go_over_a_preset(preset: str) -> None:
    c = config_of(preset=preset, n_layer=7, vocab_size=R50K_SIZE)
    assert c.n_layer == 7
    expected = {**PRESETS[preset], "n_layer": 7}
    assert {key: getattr(c, key) for key in expected} == expected
