"""The page that shows a model's surprise: the text itself, and the loss that evaluation
measures."""

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from helpers.checkpoints import MODELS, model_of, save
from helpers.common import ROOT, TEXT
from manta.config import load
from manta.errors import ConfigError, DataError
from manta.evaluate.adapter import in_process
from manta.evaluate.surprise import MOST_BITS, SurpriseConfig, colour, page, pieces, surprise
from manta.model.gpt import GPT
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([TEXT], 330)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return model_of(MODELS["qwen3"], tokenizer.vocab_size)


class Text(HTMLParser):
    """Collects the text in the page's <pre>."""

    def __init__(self, source: str):
        super().__init__()
        self.text, self.inside = "", False
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.inside |= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag != "pre"

    def handle_data(self, data: str) -> None:
        self.text += data * self.inside


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1)
)
@settings(deadline=None, max_examples=50)
def test_the_page_has_the_text_and_the_loss_of_lm_evals_rolling_perplexity(
    text: str, model: GPT, tokenizer: Tokenizer
) -> None:
    found = pieces(model, tokenizer, tokenizer.encode(text))
    assert "".join(piece.text for piece in found) == text
    shown = Text(page(found, "<title> & more", "a line")).text
    assert shown == text
    lm = in_process(model, tokenizer)
    (expected,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    bits = sum(piece.bits for piece in found)
    assert bits == pytest.approx(-expected / math.log(2), rel=1e-4)
    assert all(0 <= share <= 1 for piece in found for _, share in piece.guesses)


def test_a_page_in_bf16_is_near_that_in_fp32_and_leaves_cudnn_attention_out(
    model: GPT, tokenizer: Tokenizer
) -> None:
    during = []
    hook = model.blocks[0].register_forward_hook(
        lambda *_: during.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    tokens = tokenizer.encode(TEXT)[:200]
    try:
        exact, rounded = (pieces(model, tokenizer, tokens, dtype) for dtype in ("fp32", "bf16"))
    finally:
        hook.remove()
    assert during and not any(during) and torch.backends.cuda.cudnn_sdp_enabled()
    bits = [sum(piece.bits for piece in found) for found in (exact, rounded)]
    assert bits[0] != bits[1] and bits[0] == pytest.approx(bits[1], rel=0.02)


def test_colours_go_from_white_to_deep_red() -> None:
    assert colour(0) == "#ffffff" and colour(MOST_BITS) == colour(99) == "#bd0026"
    greens = [int(colour(bits / 4)[3:5], 16) for bits in range(int(4 * MOST_BITS))]
    assert greens == sorted(greens, reverse=True)


def test_the_job_writes_a_page_and_says_what_is_wrong(
    model: GPT, tokenizer: Tokenizer, tmp_path: Path, load_job: Any, capsys: Any
) -> None:
    save(model, tokenizer, tmp_path)
    keys = [f"home={tmp_path}", "checkpoint=run", f"out={tmp_path / 'page.html'}"]
    file = f"text_path={ROOT / 'README.md'}"
    keys += ["device=cpu", "dtype=fp32"]
    load_job("surprise").main(load(SurpriseConfig, [*keys, file, "max_tokens=300"]))
    assert "300 tokens" in capsys.readouterr().out
    assert (
        (ROOT / "README.md").read_text().startswith(Text((tmp_path / "page.html").read_text()).text)
    )
    with pytest.raises(ConfigError, match="give overwrite=true"):
        surprise(load(SurpriseConfig, [*keys, "text=x"]))
    (tmp_path / "dangling.html").symlink_to(tmp_path / "thesis")
    with pytest.raises(ConfigError, match="it is a symbolic link"):
        surprise(load(SurpriseConfig, [*keys, f"out={tmp_path / 'dangling.html'}", "text=x"]))
    surprise(load(SurpriseConfig, [*keys, "text=x y", "overwrite=true"]))
    (tmp_path / "page.html").write_text("my own words")
    with pytest.raises(ConfigError, match="has been changed since Manta wrote it"):
        surprise(load(SurpriseConfig, [*keys, "text=x", "overwrite=true"]))
    (tmp_path / "page.html").unlink()
    with pytest.raises(ConfigError, match="text, text_path: give one of them"):
        load(SurpriseConfig, keys)
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 2"):
        surprise(
            load(SurpriseConfig, [*keys, f"text_path={tmp_path / 'bad.txt'}", "overwrite=true"])
        )
