"""lm-eval's LM interface over Manta's workers."""

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from manta.errors import DataError
from manta.evaluate.completions import prompts_of
from manta.evaluate.conversation import ChatForm, Conversation, cut, ids_of
from manta.evaluate.rows import Pair, batches_of, rows_of
from manta.evaluate.worker import Pool, Scored, Worker, pool_of
from manta.model.gpt import LanguageModel
from manta.text.tokenizer import Tokenizer

TOKENS_PER_BATCH = 4096
LOGITS_PER_BATCH = 1 << 26  # 256 MB of fp32


def loglikelihood_requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    """lm-eval's requests for (context, continuation) pairs outside a task."""
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def in_process(model: LanguageModel, tokenizer: Tokenizer, dtype: str = "fp32") -> "MantaLM":
    """An LM for lm-eval that computes in this process."""
    c = model.config
    assert c.vocab_size is not None
    return MantaLM(
        pool_of(Worker(model, tokenizer, dtype)), tokenizer, c.context_length, c.vocab_size
    )


class MantaLM(TemplateLM):
    """Log-likelihoods and completions, computed by the workers of a pool. Requests are batched in
    the same way for any number of workers, so no score depends on that number.

    `begin(count)` is called with the number of requests before they are answered. It returns a
    function that is called with the number of requests just done.
    """

    begin: Callable[[int], Callable[[int], None]] = staticmethod(lambda _: lambda _: None)

    def __init__(
        self,
        pool: Pool,
        tokenizer: Tokenizer,
        context_length: int,
        vocab_size: int,
        seed: int = 0,
        chat: ChatForm | None = None,
    ):
        super().__init__()
        self._pool = pool
        self.encoding = tokenizer
        self._context_length = context_length
        self._vocab_size = vocab_size
        self._seed = seed
        self._chat = chat

    @property
    def eot_token_id(self) -> int:
        return self.encoding.eot

    @property
    def prefix_token_id(self) -> int:
        return self.encoding.start

    @property
    def max_length(self) -> int:
        return self._context_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_options: Any
    ) -> list[int]:
        del add_special_tokens  # Manta's tokenizers add none
        return ids_of(string, self.encoding)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> Conversation:
        """A conversation by the model's chat template. What its texts spell stays text."""
        assert self._chat is not None, "an LM for chats is made with a form"
        return self._chat(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the chat template; empty if it is not used."""
        return self._chat.template.source if chat_template and self._chat is not None else ""

    @property
    def tokenizer_name(self) -> str:
        return self.encoding.name

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihoods of whole texts. Each token is predicted once, from the token that
        opens a document or from the tokens before it in its window, as lm-eval defines it."""
        del disable_tqdm  # `begin` shows progress
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append(Pair(tuple(context), tuple(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        advance = self.begin(len(pairs))
        for owner, scored in zip(owners, self._score(pairs, advance), strict=True):
            totals[owner] += scored.log_likelihood
        return totals

    def _encode_pair(
        self, context: str | tuple[int, ...], continuation: str | tuple[int, ...]
    ) -> tuple[list[int], list[int]]:
        """Cuts texts as lm-eval does; tokens (`choices.TokenChoices`) are cut already."""
        if isinstance(context, Conversation) and isinstance(continuation, str):
            return cut(context, continuation, self.encoding)
        if isinstance(context, str) and isinstance(continuation, str):
            encoded: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return encoded
        return [int(t) for t in context], [int(t) for t in continuation]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_options: Any,
    ) -> list[tuple[float, bool]]:
        del disable_tqdm  # `begin` shows progress
        for (context_text, _), _, continuation in requests:
            if not continuation:  # lm-eval's own models fail an assertion
                raise DataError(
                    f"the task has an empty continuation, after {context_text[-60:]!r}: it has no "
                    "tokens to score; leave the document out, or choose another task"
                )
        # A context may be empty, as white space moves to the continuation: the token that opens a
        # document then takes its place.
        pairs = [
            Pair(tuple(context or [self.prefix_token_id]), tuple(continuation))
            for _, context, continuation in requests
        ]
        found = self._score(pairs, self.begin(len(pairs)))
        return [(scored.log_likelihood, scored.is_greedy) for scored in found]

    def _score(self, pairs: list[Pair], advance: Callable[[int], None]) -> list[Scored]:
        """The scores of the pairs, in their order."""
        rows = rows_of(pairs, self.max_length)
        most_logits = max(1, LOGITS_PER_BATCH // self._vocab_size)
        found: dict[int, Scored] = {}
        for batch in self._pool("score", batches_of(rows, TOKENS_PER_BATCH, most_logits)):
            found |= {scored.pair: scored for scored in batch}
            advance(len(batch))
        return [found[index] for index in range(len(pairs))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions; each ends before the first of its stop strings."""
        del disable_tqdm  # `begin` shows progress
        prompts = prompts_of(requests, self.encoding, self.max_length, self._seed)
        completions = []
        advance = self.begin(len(prompts))
        for completion in self._pool("complete", prompts):
            completions.append(completion)
            advance(1)
        return completions
