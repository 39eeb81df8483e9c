"""Weights for a tokenizer that has got tokens for a chat."""

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import model_of, save
from manta.config import load
from manta.errors import ConfigError
from manta.model.gpt import GPT
from manta.text import templates, tokenizer
from manta.train.checkpoints import checkpoint
from manta.train.plan import with_vocabulary
from manta.train.resume import check_what_learns
from manta.train.settings import PretrainConfig

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


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        (["trainable=last_block"], "set trainable=all"),
        (["lora.rank=4"], r"set lora\.embeddings=true"),
        (["lora.rank=4", "lora.embeddings=true"], None),
        ([], None),
    ],
)
def test_new_tokens_whose_rows_would_not_learn_are_refused(
    keys: list[str], remedy: str | None, tmp_path: Path
) -> None:
    made = tokenizer.train(TEXTS, 262)
    old = model_of({}, made.vocab_size)
    path = save(old, made, tmp_path)
    chat = templates.with_template(made, templates.CHATML, "the test's template")
    c = load(PretrainConfig, [f"init.checkpoint={path}", "seq_len=32", *keys])
    check_what_learns(c, old.config, made)
    model = with_vocabulary(old.config, chat, extending=True)
    if remedy is None:
        check_what_learns(c, model, chat)
        return
    with pytest.raises(ConfigError, match=rf"tokenizer has 2 tokens that .* not know, .*{remedy}"):
        check_what_learns(c, model, chat)
