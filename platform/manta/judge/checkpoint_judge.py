"""A checkpoint as a judge, by the probabilities of its verdicts.

It is not asked to write a verdict, which a small model seldom does in the form that was asked for.
A score is the mean of the grades 0, 10, ..., 100, each weighted by its probability among them; of a
pair, the likeliest of A, B and tie wins. So each prompt that fits has a verdict, and always the
same.
"""

from collections.abc import Iterator, Sequence

from manta.evaluate.adapter import LOGITS_PER_BATCH, TOKENS_PER_BATCH
from manta.evaluate.rows import Pair, batches_of, rows_of
from manta.evaluate.worker import Worker
from manta.judge.answers import Speaker
from manta.judge.prompts import FIRST, SECOND, TIE
from manta.text.conversations import Turn
from manta.text.rows import BadRow

GRADES = {str(grade): float(grade) for grade in range(0, 101, 10)}
SIDES = {"A": FIRST, "B": SECOND, "tie": TIE}
PROMPTS_AT_ONCE = 32

TOO_LONG = "longer than the judge's context"
REFUSED = "refused by the judge's chat template"


class CheckpointJudge:
    """Judges with a loaded model."""

    def __init__(self, speaker: Speaker, mode: str, dtype: str):
        self._speaker = speaker
        self._worker = Worker(speaker.model, speaker.tokenizer, dtype)
        self._is_score = mode == "score"
        values = GRADES if self._is_score else SIDES
        self._values = [*values.values()]
        encode = speaker.tokenizer.encode
        self._endings = [tuple(encode(speaker.form.lead + name)) for name in values]

    def verdicts(self, prompts: Sequence[str]) -> Iterator[tuple[float | None, str]]:
        """Yields (verdict, "") for each prompt, or (None, why there is none), in their order."""
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            yield from self._of(prompts[start : start + PROMPTS_AT_ONCE])

    def _of(self, prompts: Sequence[str]) -> list[tuple[float | None, str]]:
        found: list[tuple[float | None, str]] = [(None, "")] * len(prompts)
        pairs: list[Pair] = []
        asked: list[int] = []
        longest = max(map(len, self._endings))
        for index, prompt in enumerate(prompts):
            try:
                ids = tuple(self._speaker.form.whole([Turn("user", prompt)]))
            except BadRow:
                found[index] = None, REFUSED
                continue
            if len(ids) + longest - 1 > self._speaker.context_length:
                found[index] = None, TOO_LONG
                continue
            asked.append(index)
            pairs += [Pair(ids, ending) for ending in self._endings]
        scores = self._log_likelihoods(pairs)
        size = len(self._endings)
        for place, index in enumerate(asked):
            found[index] = self._verdict(scores[place * size : (place + 1) * size]), ""
        return found

    def _log_likelihoods(self, pairs: list[Pair]) -> list[float]:
        rows = rows_of(pairs, self._speaker.context_length)
        most_logits = max(1, LOGITS_PER_BATCH // (self._speaker.model.config.vocab_size or 1))
        found = {
            scored.pair: scored.log_likelihood
            for batch in batches_of(rows, TOKENS_PER_BATCH, most_logits)
            for scored in self._worker.score(batch)
        }
        return [found[index] for index in range(len(pairs))]

    def _verdict(self, scores: list[float]) -> float:
        import torch

        shares = torch.tensor(scores, dtype=torch.float64).softmax(0)
        if self._is_score:
            return float((shares * torch.tensor(self._values, dtype=torch.float64)).sum())
        return self._values[int(shares.argmax())]
