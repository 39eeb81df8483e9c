"""What a task asks of a completion (lm-eval's generation_kwargs): its length, ends and sampling."""

import dataclasses
import hashlib
from collections import Counter
from typing import Any, Literal

from lm_eval.api.instance import Instance

from manta import config as configs
from manta.config import Count, NonNegativeFloat, PositiveFraction, config
from manta.errors import ConfigError
from manta.evaluate.conversation import ids_of
from manta.evaluate.worker import Prompt
from manta.model.sampling import Sampling
from manta.text.tokenizer import Tokenizer

# lm-eval has all these names for one number; the first of them counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@config
class Generation:
    max_gen_toks: Count = 256
    """Most tokens of the completion."""
    until: str | tuple[str, ...] | None = None
    """The completion ends before the first of these strings; empty ones are ignored, as in
    lm-eval."""
    do_sample: bool | None = None
    """Whether tokens are drawn; null: if a temperature above 0 is given, as in lm-eval."""
    temperature: NonNegativeFloat | None = None
    """Divides the logits of drawn tokens; 0: the likeliest token, null: 1."""
    top_k: int | None = None
    """Draw among this many of the likeliest tokens; null, 0 and -1: all."""
    top_p: PositiveFraction | None = None
    """Draw among the likeliest tokens that together have this probability; null: all."""
    num_beams: Literal[1] = 1
    """Manta has no beam search; tasks give 1 to say so."""

    @property
    def stops(self) -> tuple[str, ...]:
        given = (self.until,) if isinstance(self.until, str) else self.until or ()
        return tuple(stop for stop in given if stop)

    def sampling(self, vocab_size: int) -> Sampling:
        is_drawn = self.do_sample if self.do_sample is not None else bool(self.temperature)
        if not is_drawn:
            return Sampling(temperature=0.0, vocab_size=vocab_size)
        temperature = 1.0 if self.temperature is None else self.temperature
        top_k = None if self.top_k in (0, -1) else self.top_k
        return Sampling(temperature, top_k, self.top_p or 1.0, vocab_size)

    def problems(self) -> list[str]:
        if self.top_k is not None and self.top_k < -1:
            return [f"top_k={self.top_k}: should be at least 1; 0, -1 or null mean all"]
        return []


def prompts_of(
    requests: list[Instance], tokenizer: Tokenizer, context_length: int, seed: int
) -> list[Prompt]:
    """The prompts of generate_until requests, in their order.

    A prompt is cut as lm-eval's `hf` model cuts it: its last tokens that leave room for
    max_gen_toks. A request that is asked several times has a seed for each time. These seeds follow
    from `seed`, the request and how often it was asked before, and from nothing else.

    Raises:
        ConfigError: a task asks for what Manta does not support, or its completions are as long as
            the context.
    """
    times: Counter[tuple[str, str]] = Counter()
    prompts = []
    for request in requests:
        text, options = request.args
        task = f"task {request.task_name}: " if request.task_name else ""
        asked = _generation(options, f"{task}generation_kwargs.")
        room = context_length - asked.max_gen_toks
        if room < 1:
            raise ConfigError(
                f"{task}generation_kwargs.max_gen_toks={asked.max_gen_toks} leaves no room for a "
                f"prompt in the model's context of {context_length}: choose a model with a longer "
                "context, or a task with shorter completions"
            )
        tokens = ids_of(text, tokenizer) or [tokenizer.start]
        key = (text, repr(asked))
        prompts.append(
            Prompt(
                tuple(tokens[-room:]),
                asked.max_gen_toks,
                asked.stops,
                asked.sampling(tokenizer.vocab_size),
                _seed(seed, *key, times[key]),
            )
        )
        times[key] += 1
    return prompts


def _generation(options: dict[str, Any], prefix: str) -> Generation:
    lengths = [options[name] for name in LENGTHS if options.get(name) is not None]
    tree = {key: value for key, value in options.items() if key not in LENGTHS}
    if lengths:
        tree["max_gen_toks"] = lengths[0]
    known = [field.name for field in dataclasses.fields(Generation)]
    others = [f"{key}={value!r}" for key, value in tree.items() if key not in known]
    if others:
        raise ConfigError(
            f"{prefix}{', '.join(others)}: Manta has no such way to generate (it has "
            f"{', '.join(known)}): choose another task"
        )
    try:
        return configs.from_dict(Generation, tree)
    except ConfigError as e:
        raise ConfigError(f"{prefix}{e}") from None


def _seed(*parts: object) -> int:
    """A seed of 63 bits that differs for other parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
