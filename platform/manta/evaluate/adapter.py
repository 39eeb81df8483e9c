"""lm-eval's LM over a Manta model."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from manta.errors import DataError
from manta.model.generate import generate
from manta.model.gpt import GPT
from manta.text.tokenizer import Tokenizer

LOGITS_PER_BATCH = 1 << 26  # 256 MB of fp32
DEFAULT_NEW_TOKENS = 256
MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # lm-eval takes them all

Scored = tuple[float, bool]
Pair = tuple[tuple[str, str], list[int], list[int]]


def loglikelihood_requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    """lm-eval's requests for (context, continuation) pairs outside a task."""
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


class MantaLM(TemplateLM):
    """Log-likelihoods (in fp32, or under bf16 autocast) and completions (in fp32) of a model.

    `advance` is called with the number of requests just done.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        dtype: str = "fp32",
        advance: Callable[[int], None] = lambda count: None,
    ):
        super().__init__()
        self.model = model.eval()
        self.encoding = tokenizer
        self._place = model.embedding.weight.device
        self._dtype = dtype
        self._advance = advance

    @property
    def eot_token_id(self) -> int:
        return self.encoding.eot

    @property
    def max_length(self) -> int:
        return self.model.config.context_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.encoding.encode(string)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts: each token is predicted once, from the end-of-text token
        or from what stands before it in its window, as lm-eval defines it."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((("", text), context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._score(pairs, per_pair=False), strict=True):
            totals[owner] += score
        self._advance(len(requests))
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        return self._score(requests, per_pair=True)

    @torch.no_grad()
    def _score(self, pairs: list[Pair], per_pair: bool) -> list[Scored]:
        """(log-likelihood, whether greedy) of each continuation, in the order of `pairs`.

        A pair longer than the context loses its beginning, as with lm-eval's own models. Batches
        are of similar length; padding is at the end, where a causal model does not see it.
        """
        # A context of no tokens (white space moves to the continuation) is the end-of-text token.
        pairs = [(t, context or [self.prefix_token_id], cont) for t, context, cont in pairs]
        for (_, text), _, continuation in pairs:
            if len(continuation) > self.max_length:
                raise DataError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's "
                    f"context of {self.max_length}: '{text[:60]}...'; use a model of a longer one"
                )
        rows = [
            (context + continuation)[-(self.max_length + 1) :] for _, context, continuation in pairs
        ]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        results: list[Scored] = [(0.0, True)] * len(rows)
        while order:
            longest = len(rows[order[0]]) - 1
            vocab_size = self.model.config.vocab_size or 1
            size = max(1, LOGITS_PER_BATCH // (vocab_size * max(longest, 1)))
            batch, order = order[:size], order[size:]
            padded = torch.full((len(batch), longest + 1), self.eot_token_id)
            for row, i in enumerate(batch):
                padded[row, : len(rows[i])] = torch.tensor(rows[i])
            padded = padded.to(self._place)
            with torch.autocast(self._place.type, torch.bfloat16, enabled=self._dtype == "bf16"):
                logits = self.model(padded[:, :-1]).float()
            for row, i in enumerate(batch):
                end = len(rows[i]) - 1
                start = max(0, end - len(pairs[i][2]))
                targets = padded[row, start + 1 : end + 1]
                own = logits[row, start:end]
                score = -F.cross_entropy(own, targets, reduction="sum").item()
                results[i] = score, bool((own.argmax(dim=-1) == targets).all())
            if per_pair:
                self._advance(len(batch))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions, each ending before the first of its stop strings."""
        completions = []
        for request in requests:
            prompt, options = request.args
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            is_sampled = options.get("do_sample", False)
            text = ""
            tokens: list[int] = []
            for token in generate(
                self.model,
                self.tok_encode(prompt) or [self.prefix_token_id],
                next(
                    (options[key] for key in MAX_TOKENS_KEYS if key in options), DEFAULT_NEW_TOKENS
                ),
                temperature=options.get("temperature", 1.0) if is_sampled else 0.0,
                stop=self.eot_token_id,
            ):
                tokens.append(token)
                text = self.encoding.decode(tokens)
                if any(stop in text for stop in stops):
                    break
            ends = [text.index(stop) for stop in stops if stop in text]
            completions.append(text[: min(ends)] if ends else text)
            self._advance(1)
        return completions
