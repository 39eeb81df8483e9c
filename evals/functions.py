"""What the suites beside this file compute; lm-eval's own functions where it has them."""

from typing import Any

from lm_eval.api.registry import METRIC_REGISTRY, register_metric
from lm_eval.tasks.hellaswag.utils import process_docs as hellaswag_docs
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results as wikitext_results
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer as wikitext_text

from manta.evaluate.choices import Core, HellaSwagCompletion
from manta.evaluate.conversation import Conversation

__all__ = [
    "Core",
    "HellaSwagCompletion",
    "hellaswag_docs",
    "perplexity_results",
    "perplexity_text",
    "wikitext_results",
    "wikitext_text",
]

if "token_perplexity" not in METRIC_REGISTRY:  # this file is read once per evaluation
    register_metric(
        metric="token_perplexity",
        higher_is_better=False,
        output_type="loglikelihood_rolling",
        aggregation="weighted_perplexity",
    )(lambda items: items)


def perplexity_text(doc: dict[str, Any]) -> str:
    """A document's text, which has ids of its own if it is a conversation with special tokens."""
    ids = doc.get("ids")
    return Conversation(doc["text"], ids) if ids is not None else str(doc["text"])


def perplexity_results(doc: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """(log-likelihood, count) of a document, for each unit that perplexity is given per."""
    (loglikelihood,) = results
    num_bytes = len(doc["text"].encode())
    return {
        "token_perplexity": (loglikelihood, doc["num_tokens"]),
        "word_perplexity": (loglikelihood, max(1, len(doc["text"].split()))),
        "byte_perplexity": (loglikelihood, num_bytes),
        "bits_per_byte": (loglikelihood, num_bytes),
    }
