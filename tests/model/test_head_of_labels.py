"""A model with a head for labels: its shape, what it costs, and that its head has no padding."""

import dataclasses

import pytest
import torch

from manta.config import from_dict
from manta.errors import ConfigError
from manta.model.cost import flops_per_token, parameters
from manta.model.families import num_parameters
from manta.model.gpt import GPT, ModelConfig

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 16, "vocab_size": 100}


@pytest.mark.parametrize("family", ["gpt2", "modern"])
@pytest.mark.parametrize("count", [2, 100, 128])
def test_it_has_the_rows_and_the_cost_of_its_labels(family: str, count: int) -> None:
    """There may be as many labels as there are tokens, with or without the vocabulary's padding."""
    base = from_dict(ModelConfig, {**SHAPE, "family": family})
    c = base.classifying(tuple(f"label {i}" for i in range(count)))
    model = GPT(c)
    assert parameters(c).total == sum(weight.numel() for weight in model.parameters())
    assert num_parameters(c) - num_parameters(base) == count * c.n_embd
    assert flops_per_token(c, 16) < flops_per_token(base, 16)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert state["head.weight"].shape == (count, c.n_embd)
    again = GPT(c)
    again.load_state_dict(state)
    tokens = torch.randint(100, (3, 16))
    logits = again(tokens, last_only=True)
    assert logits.shape == (3, 1, count) and torch.equal(logits, model(tokens, last_only=True))


def test_labels_that_make_no_classifier_are_refused() -> None:
    for labels, tied, message in (
        (["a"], False, "at least two are needed, all different"),
        (["a", "a"], False, "at least two are needed, all different"),
        (["a", ""], False, "at least two are needed, all different"),
        (["a", "b"], True, "labels are for tie_embeddings=false"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict(ModelConfig, {**SHAPE, "labels": labels, "tie_embeddings": tied})
    c = from_dict(ModelConfig, SHAPE)
    assert dataclasses.replace(c.classifying(("a", "b")), labels=()).tie_embeddings is False
