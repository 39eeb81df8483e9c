"""Shows what surprises a model: a page that colours each token of a text by its loss."""

import dataclasses
import html
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from manta import layout, ownership, storage
from manta.config import Count, config
from manta.evaluate.files import read_text
from manta.evaluate.inference_settings import InferenceConfig, place_of
from manta.model.gpt import LanguageModel
from manta.model.inference import inference, send
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint

MOST_BITS = 14.0  # at the deepest colour: a chance below one in sixteen thousand
GUESSES = 3


@config
class SurpriseConfig(InferenceConfig):
    text: str | None = None
    """The text to show; or give text_path."""
    text_path: str | None = None
    """File with the text, UTF-8; or give text."""
    max_tokens: Count = 5000
    """Most tokens on the page; the rest of the text is left out."""
    out: str | None = None
    """Path of the page; null: surprise.html in the run's folder."""
    overwrite: bool = False
    """Replace what an earlier run of this job wrote at `out`, if it is still as it was written."""

    def problems(self) -> list[str]:
        if (self.text is None) == (self.text_path is None):
            return ["text, text_path: give one of them"]
        return []


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token, or a few that together form whole characters."""

    text: str
    bits: float
    guesses: tuple[tuple[str, float], ...]
    """The likeliest tokens in place of the piece's first token, each with its probability."""


def surprise(c: SurpriseConfig) -> tuple[Path, str]:
    """Writes the page; returns its path and a line about the text.

    Raises:
        MantaError: the checkpoint, text or device does not exist, or something is at `out`.
    """
    path = checkpoint.resolve(c.checkpoint, c.home_folder)
    folder = layout.split_checkpoint(path)[0]
    out = ownership.new_file(c.out, storage.join(folder, layout.SURPRISE), c.overwrite)
    text = c.text if c.text is not None else read_text(c.text_path or "", "text_path")
    device, dtype = place_of(c)
    model, tokenizer = checkpoint.load_model(path, device), checkpoint.load_tokenizer(path)
    tokens = tokenizer.encode(text)[: c.max_tokens]
    found = pieces(model, tokenizer, tokens, dtype)
    name = folder.rpartition("/")[2]
    line = about(found, len(tokens))
    with storage.writing(str(out), "free some space there, or give another out="):
        storage.write_bytes(str(out), page(found, f"What surprises {name}", line).encode())
        if c.out is not None:
            ownership.record(out)
    return out, line


def about(found: list[Piece], tokens: int) -> str:
    bits = sum(piece.bits for piece in found)
    size = sum(len(piece.text.encode()) for piece in found)
    return (
        f"{tokens:,} tokens, {bits / max(size, 1):.4f} bits per byte, perplexity "
        f"{2 ** (bits / max(tokens, 1)):.2f} a token"
    )


def pieces(
    model: LanguageModel, tokenizer: Tokenizer, tokens: list[int], dtype: str = "fp32"
) -> list[Piece]:
    """The loss of each token, in bits, given the start and the tokens before it in its window, as
    in lm-eval's rolling perplexity: windows side by side, the last one moved back."""
    found: list[Piece] = []
    pending: list[int] = []
    bits = 0.0
    guesses: tuple[tuple[str, float], ...] = ()
    for token, nats, likeliest in _losses(model, [tokenizer.start, *tokens], dtype):
        if not pending:
            bits, guesses = 0.0, tuple((_shown(tokenizer, i), p) for i, p in likeliest)
        pending.append(token)
        bits += nats / math.log(2)
        text = tokenizer.decode(pending)
        if "\ufffd" not in text or len(pending) >= 4:  # no character has more than four bytes
            found.append(Piece(text, bits, guesses))
            pending = []
    if pending:
        found.append(Piece(tokenizer.decode(pending), bits, guesses))
    return found


def _losses(
    model: LanguageModel, line: list[int], dtype: str
) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
    """(token, nats, likeliest tokens with their probabilities) of all tokens but the first."""
    context, device = model.config.context_length, model.embedding.weight.device
    done = 0
    while done < len(line) - 1:
        end = min(done + context, len(line) - 1)
        begin = max(0, end - context)
        tokens = line[done + 1 : end + 1]
        window, targets = (send(torch.tensor(ids), device) for ids in (line[begin:end], tokens))
        with inference(device, dtype):
            logits = model(window.unsqueeze(0))[0, done - begin :].float()
            log_probabilities = logits.log_softmax(dim=-1)
            nats = -log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
            best = log_probabilities.topk(min(GUESSES, logits.size(1)))
            likeliest = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        for token, loss, (ids, shares) in zip(tokens, nats.tolist(), likeliest, strict=True):
            yield token, loss, list(zip(ids, shares, strict=True))
        done = end


def _shown(tokenizer: Tokenizer, token: int) -> str:
    if token >= tokenizer.vocab_size:  # a model may have more ids than its tokenizer
        return f"[unused {token}]"
    return tokenizer.decode([token]).replace("\n", "\u23ce")


def colour(bits: float) -> str:
    """The colour of a loss: white for none, then yellow and orange, to a deep red."""
    share = min(1.0, bits / MOST_BITS)
    stops = [(255, 255, 255), (255, 237, 160), (254, 178, 76), (240, 59, 32), (189, 0, 38)]
    at = share * (len(stops) - 1)
    low = min(int(at), len(stops) - 2)
    mixed = (
        round(a + (b - a) * (at - low)) for a, b in zip(stops[low], stops[low + 1], strict=True)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)


def page(found: list[Piece], title: str, line: str) -> str:
    """The whole page; it loads nothing from elsewhere."""
    spans = []
    for piece in found:
        guesses = ", ".join(f"{text!r} {share:.0%}" for text, share in piece.guesses)
        tip = html.escape(f"{piece.bits:.1f} bits; likeliest: {guesses}", quote=True)
        ink = "#fff" if piece.bits > 0.7 * MOST_BITS else "#111"
        spans.append(
            f'<span style="background:{colour(piece.bits)};color:{ink}" title="{tip}">'
            f"{html.escape(piece.text)}</span>"
        )
    scale = "".join(
        f'<span style="background:{colour(bits)}">&nbsp;{bits:g}&nbsp;</span>'
        for bits in (0, 2, 4, 6, 8, 10)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem;
        background: #fff; color: #111 }}
pre {{ font: 15px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
pre span {{ border-radius: 2px }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(line)}</p>
<p>Bits of surprise: {scale} and more. Point at a token to see what was expected.</p>
<pre>{"".join(spans)}</pre>
</body></html>
"""
