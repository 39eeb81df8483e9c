"""The LSTM: parity with torch's cell, its state between calls, its cost, and the keys that it
refuses."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.models import config_of, small_model, some_tokens
from manta.config import load
from manta.errors import ConfigError
from manta.model.activations import activations
from manta.model.cost import flops_per_token, hidden_matrices, parameters, weights
from manta.model.families import model_of, num_parameters
from manta.model.generate import Sampling, generate
from manta.model.init import InitConfig, initialise
from manta.model.lstm import LSTM
from manta.model.reader import Reader
from manta.model.shape import ModelConfig
from manta.train.settings import PretrainConfig

few = settings(deadline=None, max_examples=20)


def lstm_of(**keys: Any) -> ModelConfig:
    return config_of(**{"family": "lstm", "n_layer": 2, "n_embd": 32, "vocab_size": 50, **keys})


def by_cells(model: LSTM, tokens: Tensor) -> Tensor:
    """The logits (B, T, V) by torch's LSTMCell, one token and one layer at a time."""
    c, x = model.config, model.embedding(tokens)
    for layer in range(c.n_layer):
        cell = nn.LSTMCell(c.n_embd, c.n_embd)
        cell.load_state_dict(
            {name: getattr(model.blocks, f"{name}_l{layer}") for name in cell.state_dict()}
        )
        state, outputs = None, []
        for step in x.unbind(1):
            state = cell(step, state)
            outputs.append(state[0])
        x = torch.stack(outputs, dim=1)
    return x @ model.head.weight[: c.vocab_size].T


@pytest.mark.parametrize("tie", [True, False])
def test_logits_are_those_of_torchs_cell_step_by_step(tie: bool) -> None:
    model = small_model("lstm", context_length=16, n_layer=3, tie_embeddings=tie)
    tokens = some_tokens(3, 16, vocab=50)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), by_cells(model, tokens), atol=1e-5, rtol=1e-5)


@few
@given(texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=6))
def test_a_reader_gives_the_logits_of_a_text_that_grows_is_cut_or_goes_another_way(
    texts: list[list[int]],
) -> None:
    model = small_model("lstm", context_length=12)
    with torch.no_grad():
        reader = Reader(model)
        for ids in [*texts, texts[0], texts[0] + texts[-1]][: len(texts) + 1]:
            expected = model(torch.tensor([ids]))[:, -1]
            torch.testing.assert_close(reader.logits(ids), expected, atol=1e-5, rtol=1e-5)


def test_a_text_that_was_interrupted_is_read_again() -> None:
    """Ctrl-C may come when the cache has tokens that the reader does not know of yet."""
    model = small_model("lstm", context_length=12)
    with torch.no_grad():
        reader = Reader(model)
        reader.logits([1, 2, 3])
        model(torch.tensor([[4]]), cache=reader._cache)
        expected = model(torch.tensor([[1, 2, 3, 5]]))[:, -1]
        torch.testing.assert_close(reader.logits([1, 2, 3, 5]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_reads_and_writes_beyond_the_context(use_cache: bool) -> None:
    """A model with a short context generates what the same weights do with a long one."""
    prompt = some_tokens(1, 20, vocab=50)[0].tolist()
    greedy = Sampling(temperature=0)
    short, long = (small_model("lstm", length) for length in (4, 64))
    long.load_state_dict(short.state_dict())
    first, second = (
        list(generate(model, prompt, 30, sampling=greedy, use_cache=use_cache))
        for model in (short, long)
    )
    assert first == second and len(first) == 30


def test_dropout_is_after_each_layer_and_in_training_only() -> None:
    tokens = some_tokens(2, 8, vocab=50)
    for layers in (1, 2):  # torch warns of dropout in a single layer
        model = small_model("lstm", dropout=0.5, n_layer=layers)
        with torch.no_grad():
            assert torch.equal(model(tokens), model(tokens))
            model.train()
            assert not torch.allclose(model(tokens), model(tokens))


def test_a_new_model_has_open_forget_gates_and_orthogonal_recurrent_weights() -> None:
    torch.manual_seed(0)
    model = model_of(lstm_of(n_embd=64))
    for name, weight in model.blocks.named_parameters():
        gates = weight.detach().chunk(4)
        if "weight_hh" in name:
            for gate in gates:
                torch.testing.assert_close(gate @ gate.T, torch.eye(64), atol=1e-5, rtol=0)
        elif "weight_ih" in name:
            assert weight.std().item() == pytest.approx(2 / math.sqrt(64), rel=0.05)
        else:
            opened = [1.0, 1.0] if "bias_ih" in name else [0.0, 0.0]
            assert [gates[1].min().item(), gates[1].max().item()] == opened
            assert not any(gates[i].any() for i in (0, 2, 3))
    initialise(model, InitConfig(embedding_rms=0.05))
    assert model.embedding.weight[:50].std().item() == pytest.approx(0.05, rel=0.1)


def test_it_learns_to_repeat_a_sentence() -> None:
    torch.manual_seed(0)
    model = model_of(lstm_of())
    text = some_tokens(1, 17, vocab=50)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(text[:, :-1], text[:, 1:])
        loss.backward()
        adam.step()
        adam.zero_grad()
    assert loss.item() < 0.2
    found = generate(model, text[0, :1].tolist(), 16, sampling=Sampling(temperature=0))
    assert list(found) == text[0, 1:].tolist()


# Cost


@given(
    layers=st.integers(1, 4),
    width=st.integers(1, 40),
    vocab=st.integers(1, 300),
    tie=st.booleans(),
)
@few
def test_weights_parameters_and_flops_are_those_of_the_model(
    layers: int, width: int, vocab: int, tie: bool
) -> None:
    c = lstm_of(n_layer=layers, n_embd=width, vocab_size=vocab, tie_embeddings=tie)
    with torch.device("meta"):
        model = model_of(c)
    assert sorted(tuple(p.shape) for p in model.parameters()) == sorted(
        w.shape for w in weights(c) for _ in range(w.count)
    )
    assert parameters(c).total == sum(p.numel() for p in model.parameters())
    matrices = [p for name, p in model.named_parameters() if "blocks" in name and p.dim() == 2]
    assert hidden_matrices(c) == sum(p.numel() for p in matrices)
    looked_up = 0 if tie else vocab * width
    assert flops_per_token(c, 7) == flops_per_token(c, 70)
    assert flops_per_token(c, 7) == 6 * (num_parameters(c) - looked_up)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_flops_are_those_that_torch_counts() -> None:
    """torch counts the products of the layers where no kernel of oneDNN hides them. The products of
    weights count six times; biases, which multiply nothing there, are the rest."""
    c = lstm_of(n_embd=64, vocab_size=128)
    model, tokens = model_of(c), some_tokens(4, 16, vocab=128)
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    biases = 2 * c.n_layer * 4 * c.n_embd
    # The input of the first step's recurrent product is a constant, without a gradient.
    first = 2 * 4 * c.n_layer * 4 * c.n_embd * c.n_embd
    counted = counter.get_total_flops()
    expected = tokens.numel() * (flops_per_token(c, 16) - 6 * biases)
    assert expected - first <= counted <= expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(96, 2, 3, 64), (96, 3, 5, 32), (128, 1, 3, 64)])
def test_what_autograd_saves_is_what_is_predicted(shape: tuple[int, ...], dtype: Any) -> None:
    """This is without what the loss keeps for itself."""
    width, layers, batch, length = shape
    c = lstm_of(n_embd=width, n_layer=layers, vocab_size=300, context_length=length)
    model, tokens = model_of(c), torch.zeros(batch, length, dtype=torch.long)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
    ):
        loss = model(tokens, tokens)
    found = sum(size for key, size in saved.items() if key not in own)
    predicted = activations(c, batch, length, dtype, device="cpu")
    assert found == pytest.approx(predicted.held - predicted.loss, rel=0.03)
    del loss


# Keys


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["model.n_head=2"], "model.n_head: family=lstm has no such thing; omit it"),
        (
            ["model.qk_norm=true", "model.mlp_hidden=64"],
            "model.mlp_hidden and qk_norm: family=lstm has no such thing; omit them",
        ),
        (["model.rope_scaling.kind=linear", "model.rope_scaling.factor=2"], "rope_scaling"),
        (["model.dropouts.mlp=0.1"], "dropouts"),
        (["model.depth=4"], "depth"),
        (["model.preset=gpt2-124m"], "which is a GPT: give one of them, or preset=char-rnn"),
        (["activation_checkpointing=full"], "activation_checkpointing=full is for the blocks of"),
        (["init.kind=identity"], "init.kind=identity and init.bigram_steps are for GPTs"),
    ],
)
def test_keys_of_gpts_are_refused(given: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(PretrainConfig, ["model.family=lstm", *given])
    assert expected in str(refused.value)


def test_a_files_keys_of_gpts_are_dropped_where_an_argument_asks_for_an_lstm(tmp_path: Any) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {n_head: 2, qk_norm: true, n_embd: 128}\n")
    said: list[str] = []
    c = load(PretrainConfig, [str(file), "model.family=lstm"], said.append).model
    assert (c.family, c.n_embd, c.qk_norm) == ("lstm", 128, False)
    assert len(said) == 2 and all("is not used" in line for line in said)


def test_the_preset_has_the_shape_of_the_char_rnn_of_2015() -> None:
    c = config_of(preset="char-rnn", vocab_size=65)
    assert (c.family, c.n_layer, c.n_embd, c.context_length) == ("lstm", 2, 128, 50)
    # Four gates, each with a matrix for the input and one for the state, and two biases.
    assert num_parameters(c) == 2 * 65 * 128 + 2 * 4 * (2 * 128 * 128 + 2 * 128)
