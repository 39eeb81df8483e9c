"""Weights for a tokenizer that has got tokens for a chat."""

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import model_of, save
from manta.model.gpt import GPT
from manta.text import templates, tokenizer
from manta.train.checkpoints import checkpoint
from manta.train.plan import with_vocabulary

TEXTS = ["The cat sat on the mat, and the dog did not."] * 9


@pytest.mark.parametrize("more", [0, 40])
@pytest.mark.parametrize(
    "keys", [{}, {"family": "gpt2"}, {"tie_embeddings": False}], ids=["modern", "gpt2", "untied"]
)
def test_rows_of_new_tokens_begin_at_the_mean_of_the_others(
    keys: dict[str, object], more: int, tmp_path: Path
) -> None:
    """`more`: rows that the model has beyond its tokenizer's ids, as nanoGPT's have."""
    made = tokenizer.train(TEXTS, 262)
    known = made.vocab_size
    old = model_of(keys, known + more)
    path = save(old, made, tmp_path)
    chat = templates.with_template(made, templates.CHATML, "the test's template")
    assert chat.extends(made) and not made.extends(chat) and chat.vocab_size == known + 2
    model = GPT(with_vocabulary(old.config, chat, extending=True)).eval()
    checkpoint.load_weights_for(path, chat, model)
    for name in ("embedding", "head"):
        was, now = (getattr(m, name).weight.detach() for m in (old, model))
        assert torch.equal(now[:known], was[:known])
        assert torch.allclose(now[known : known + 2], was[:known].mean(0).expand(2, -1))
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens)[..., :known], old(tokens)[..., :known])
