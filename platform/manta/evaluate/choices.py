"""Tasks scored by tokens: HellaSwag in the completion style, and the tasks of CORE.

lm-eval gives a model texts, and compares choices by their log-likelihood, or by that divided by the
number of characters. Here the choice with the likeliest tokens on average wins, and texts are cut
where tokens end.
"""

from collections.abc import Sequence
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from manta.text.tokenizer import Tokenizer

Cut = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of a context, and of a text that may follow it."""
Answers = list[tuple[float, bool]]
"""(Log-likelihood, whether the continuation is the greedy one) of each cut of a document."""


class TokenChoices(ConfigurableTask):
    """An lm-eval task whose requests are tokens; `tokenizer` must be set before the task runs."""

    tokenizer: Tokenizer

    def __init__(self, config: dict[str, Any]):
        # The key "class" named this class; lm-eval's task config has no such key.
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def cuts(self, doc: dict[str, Any]) -> list[Cut]:
        """The cuts to score for a document."""
        raise NotImplementedError

    def doc_to_text(self, *_args: Any, **_options: Any) -> str:
        return ""

    def doc_to_target(self, *_args: Any, **_options: Any) -> str:
        return ""

    def fewshot_context(self, *_args: Any, **_options: Any) -> str:
        return ""

    def construct_requests(
        self, doc: dict[str, Any], ctx: str, *, metadata: Any, **_options: Any
    ) -> list[Instance]:
        del ctx  # a cut includes its context
        return [
            Instance("loglikelihood", doc, cut, index, metadata=metadata)
            for index, cut in enumerate(self.cuts(doc))
        ]

    def likeliest_per_token(self, doc: dict[str, Any], results: Answers) -> int:
        """The index of the document's cut with the largest mean log-likelihood."""
        means = [
            score / len(continuation)
            for (score, _), (_, continuation) in zip(results, self.cuts(doc), strict=True)
        ]
        return means.index(max(means))


class HellaSwagCompletion(TokenChoices):
    """HellaSwag as plain text that continues: context and endings as in the file, each encoded
    alone, the endings after a space. acc: the likeliest ending; acc_norm: the likeliest per token.
    llm.c's and build-nanogpt's evaluations have this style."""

    def cuts(self, doc: dict[str, Any]) -> list[Cut]:
        encode = self.tokenizer.encode
        context = tuple(encode(f"{doc['ctx_a']} {doc['ctx_b']}" if doc["ctx_b"] else doc["ctx_a"]))
        return [(context, tuple(encode(f" {ending}"))) for ending in doc["endings"]]

    def process_results(self, doc: dict[str, Any], results: Answers) -> dict[str, float]:
        sums = [score for score, _ in results]
        label = int(doc["label"])
        return {
            "acc": float(sums.index(max(sums)) == label),
            "acc_norm": float(self.likeliest_per_token(doc, results) == label),
        }


class Core(TokenChoices):
    """A task of CORE (Li et al. 2024, arXiv:2406.11794), with prompts from `core.documents`.

    multiple_choice and schema: the likeliest choice per token, over the tokens that the choices do
    not share. language_modeling: whether each token is the likeliest. The token that opens a
    document precedes each prompt.
    """

    def cuts(self, doc: dict[str, Any]) -> list[Cut]:
        kind: Literal["multiple_choice", "schema", "language_modeling"]
        kind = self.config.metadata["kind"]
        encode, start = self.tokenizer.encode, self.tokenizer.start
        if kind == "language_modeling":
            (context,), (continuation,) = doc["contexts"], doc["continuations"]
            before = len(encode(context)) + 1
            prompts = [(start, *encode(context + continuation))]
            starts = [before]
        else:
            texts = [a + b for a in doc["contexts"] for b in doc["continuations"]]
            prompts = [(start, *encode(text)) for text in texts]
            if kind == "multiple_choice":
                starts = [_common(prompts)] * len(prompts)
            else:
                ends = _common([prompt[::-1] for prompt in prompts])
                starts = [len(prompt) - ends for prompt in prompts]
        # If another choice equals or begins with this one, none of its tokens is its own: the last
        # one counts.
        starts = [min(start, len(p) - 1) for start, p in zip(starts, prompts, strict=True)]
        return [(p[:start], p[start:]) for start, p in zip(starts, prompts, strict=True)]

    def process_results(self, doc: dict[str, Any], results: Answers) -> dict[str, float]:
        if self.config.metadata["kind"] == "language_modeling":
            return {"acc": float(results[0][1])}
        return {"acc": float(self.likeliest_per_token(doc, results) == doc["gold"])}


def _common(sequences: Sequence[tuple[int, ...]]) -> int:
    """The number of tokens at the beginning that all sequences share."""
    for index, column in enumerate(zip(*sequences, strict=False)):
        if len(set(column)) > 1:
            return index
    return min(map(len, sequences))
