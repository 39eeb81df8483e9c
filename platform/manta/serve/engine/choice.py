"""The next token of each text in a batch, from its logits and its request's settings.

Shapes: R texts, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from manta.model.inference import send
from manta.model.sampling import Sampling, pick
from manta.serve.engine.request import Penalties, Token
from manta.serve.engine.row import Row
from manta.serve.engine.scores import index_of, scored


def choose(rows: Sequence[Row], logits: Tensor, vocab_size: int) -> list[Token]:
    """Chooses a token for each row from (R, V) logits. Ids from `vocab_size` on stand for no text
    and are never chosen.

    What a row gets depends on its own logits and settings only. Rows with equal settings are drawn
    together.
    """
    adjusted = _adjusted(rows, logits)[:, :vocab_size]
    groups: dict[Sampling, list[int]] = {}
    for place, row in enumerate(rows):
        sampling = row.request.sampling
        is_greedy = sampling.temperature == 0
        plain = Sampling(temperature=0, vocab_size=sampling.vocab_size)
        groups.setdefault(plain if is_greedy else sampling, []).append(place)
    chosen = logits.new_empty(len(rows), dtype=torch.long)
    for sampling, places in groups.items():
        index = index_of(places, logits)
        some = adjusted if len(places) == len(rows) else adjusted[index]
        if sampling.temperature == 0:
            numbers = logits.new_zeros(len(places), dtype=torch.float64)
        else:
            drawn = torch.cat([rows[place].number for place in places])
            numbers = send(drawn, logits.device)
        chosen[index] = pick(some, sampling, numbers)
    for place, row in enumerate(rows):
        if row.seen is not None and row.counts is not None:
            row.seen[chosen[place]] = True
            row.counts[chosen[place]] += 1
    wanted = [
        (place, row.request.alternatives)
        for place, row in enumerate(rows)
        if row.request.alternatives is not None
    ]
    ids = chosen.tolist()  # the host waits for the device
    found = [Token(id) for id in ids]
    if wanted:
        places = [place for place, _ in wanted]
        scores = scored(
            logits[index_of(places, logits)],
            [ids[place] for place in places],
            [count for _, count in wanted],
        )
        for place, token in zip(places, scores, strict=True):
            found[place] = token
    return found


def _adjusted(rows: Sequence[Row], logits: Tensor) -> Tensor:
    """The (R, V) logits after penalties and biases. The bias comes last: what it forbids or forces
    stays so."""
    punished = [p for p, row in enumerate(rows) if row.request.penalties != Penalties()]
    biased = [p for p, row in enumerate(rows) if row.request.logit_bias]
    if not punished and not biased:
        return logits
    adjusted = logits.float().clone()
    if punished:
        index = index_of(punished, logits)
        adjusted[index] = _punished([rows[place] for place in punished], adjusted[index])
    for place in biased:
        bias = rows[place].request.logit_bias
        values = send(torch.tensor(list(bias.values()), dtype=torch.float32), logits.device)
        adjusted[place].index_add_(0, index_of(list(bias), logits), values)
    return adjusted


def _punished(rows: Sequence[Row], logits: Tensor) -> Tensor:
    """The (R, V) logits after each row's penalties."""
    for row in rows:
        if row.seen is None:
            row.seen = logits.new_zeros(logits.size(1), dtype=torch.bool)
            row.seen[index_of(row.ids, logits)] = True
            row.counts = logits.new_zeros(logits.size(1))
            answer = index_of(row.answer, logits)
            row.counts.index_add_(0, answer, torch.ones_like(answer, dtype=logits.dtype))
    seen = torch.stack([row.seen for row in rows if row.seen is not None])
    counts = torch.stack([row.counts for row in rows if row.counts is not None])
    penalties = [row.request.penalties for row in rows]
    columns = [[p.repetition for p in penalties], [p.presence for p in penalties]]
    columns.append([p.frequency for p in penalties])
    repetition, presence, frequency = send(torch.tensor(columns), logits.device).unsqueeze(2)
    weaker = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen, weaker, logits)
    return logits - presence * (counts > 0) - frequency * counts
